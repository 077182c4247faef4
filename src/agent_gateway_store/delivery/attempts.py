"""Attempts to deliver: due rows are claimed, and the result of each attempt is recorded.

A claim moves `next_attempt_at` forward by the lease and counts the attempt: a worker that dies loses its rows to others
when the lease ends, and a notice that kills its worker each time is given up after so many claims. PostgreSQL skips
rows that another worker is just claiming (`FOR UPDATE SKIP LOCKED`); on SQLite there is one writer at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import (
    ColumnElement,
    Float,
    Integer,
    Text,
    Uuid,
    and_,
    bindparam,
    case,
    func,
    literal_column,
    or_,
    select,
    update,
)

from agent_gateway_store._concurrency import BatchQueue
from agent_gateway_store._text import describe
from agent_gateway_store.delivery.policy import Policy
from agent_gateway_store.errors import StoreNotOpenError
from agent_gateway_store.models.delivery import DeliveryStatus, NotificationDelivery
from agent_gateway_store.models.values import Notice
from agent_gateway_store.storage.database import Transactions, dialect_of
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.statements import RowsParameter, Statement, unindexed

# A statement with so many rows takes some 10 ms; in a longer one the first rows would wait for the last.
_MOST_RESULTS = 500
# What comes meanwhile is recorded together. Without it asking for approvals with the outbox took 1.39 times as long as
# without, and with it 1.22; a longer one gained nothing.
_PAUSE_S = 0.02
# Between two tries to record while the database is away: as often as a worker looks for due rows by default.
_RETRY_S = 1.0

_logger = logging.getLogger("agent_gateway_store.notifications")

deliveries = NotificationDelivery.__table__  # type: ignore[attr-defined]
_LEASED = ("id", "delivery_id", "notifier", "approval_id", "attempts", "payload")
_IS_DUE: ColumnElement[str] = literal_column("'DUE'")


@dataclass(frozen=True, slots=True)
class Delivery:
    """A row leased to this process.

    Attributes:
        notifier: To whom.
        notice: What to send; None if the row holds no notice.
        attempt: Number of this attempt, from 1; the row is leased to us while it still says so.
        send_before: Until when the attempt may begin, by `time.monotonic()`.
        cause: The span that caused it, if that was here.
    """

    delivery_id: UUID
    notifier: str
    approval_id: UUID
    attempt: int
    notice: Notice | None
    send_before: float
    cause: Any = None


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """The result of one attempt.

    Attributes:
        delivery: The row.
        status: Its status from now on.
        attempts: How many attempts count from now on.
        delay_s: Seconds until it is due again, if it is DUE.
        error: What went wrong, if anything did.
    """

    delivery: Delivery
    status: DeliveryStatus
    attempts: int
    delay_s: float = 0.0
    error: str | None = None

    @classmethod
    def untried(cls, delivery: Delivery) -> AttemptResult:
        """Return the row as if it had not been claimed."""
        return cls(delivery, DeliveryStatus.DUE, delivery.attempt - 1)


def _due(status: ColumnElement[Any] = deliveries.c.status) -> ColumnElement[bool]:
    # As a subquery the time is taken once, so that the index finds the rows.
    now = select(db_now()).scalar_subquery()
    return and_(status == _IS_DUE, deliveries.c.next_attempt_at <= now)


def _is_first() -> ColumnElement[bool]:
    """No earlier notice of the same approval is still on its way to the same notifier."""
    before = deliveries.alias("before")
    # Few rows have one approval_id, but all of a backlog have this status and notifier: a planner whose statistics are
    # from quiet times takes the index over these two, once for each row. So they are written as no index knows them;
    # and OFFSET keeps PostgreSQL from a join, for which it would read the whole table.
    return (
        ~select(literal_column("1"))
        .select_from(before)
        .where(
            before.c.approval_id == deliveries.c.approval_id,
            unindexed(before.c.notifier) == deliveries.c.notifier,
            unindexed(before.c.status) == _IS_DUE,
            before.c.id + literal_column("0") < deliveries.c.id,
        )
        .limit(literal_column("1"))
        .offset(literal_column("0"))
        .exists()
    )


def _claim(due: Any) -> Any:
    return (
        update(deliveries)
        .where(deliveries.c.id.in_(select(due.c.id)))
        .values(attempts=deliveries.c.attempts + literal_column("1"), next_attempt_at=db_now(plus="p_lease_s"))
        .returning(*(deliveries.c[each] for each in _LEASED))
    )


_org_id: ColumnElement[Any] = bindparam("p_org_id", type_=Text())
_IS_DUE_HERE = and_(
    _due(),
    or_(_org_id.is_(None), deliveries.c.org_id == _org_id),
    deliveries.c.notifier == bindparam("p_notifier", type_=Text()),
)
_FIRST_DUE = Statement(
    select(deliveries.c.id)
    .where(_IS_DUE_HERE)
    # In the order of the index: for any row the planner may read the table, past all that was delivered.
    .order_by(deliveries.c.next_attempt_at, deliveries.c.id)
    .limit(literal_column("1"))
    .offset(literal_column("0"))
)
_CLAIM_DUE = Statement(
    _claim(
        select(deliveries.c.id)
        .where(_IS_DUE_HERE, _is_first())
        .order_by(deliveries.c.next_attempt_at, deliveries.c.id)
        .limit(bindparam("p_limit", type_=Integer()))
        .offset(literal_column("0"))  # SQLite gets one in any case, which would be a parameter
        .with_for_update(skip_locked=True, of=deliveries)
        .cte("due")
    )
)
_APPROVALS = RowsParameter("approvals", {"notifier": Text(), "approval_id": Uuid()})


def _claim_next(dialect: str) -> Any:
    approvals, before = _APPROVALS.table(dialect), deliveries.alias("before")
    first = (
        select(func.min(before.c.id + literal_column("0")))
        .where(
            before.c.approval_id == approvals.c.approval_id,
            unindexed(before.c.notifier) == approvals.c.notifier,
            unindexed(before.c.status) == _IS_DUE,
        )
        .correlate(approvals)
        .scalar_subquery()
    )
    # One look for each approval, and then for its row by id: a join, or another index, would read a whole backlog.
    next_row = (
        select(deliveries.c.id)
        .where(deliveries.c.id == first, _due(unindexed(deliveries.c.status)))
        .with_for_update(skip_locked=True, of=deliveries)
    )
    # It locks rows, so it must run once for each approval.
    due = select(next_row.scalar_subquery().label("id")).select_from(approvals).cte("due").prefix_with("MATERIALIZED")
    return _claim(due)


_CLAIM_NEXT = Statement(_claim_next)


@retry_conflicts
async def is_any_due(transactions: Transactions, notifier: str, *, org_id: str | None = None) -> bool:
    """Return True if a row of one notifier is due; takes no lock, where a claim takes SQLite's only one to find none.

    Raises:
        StoreUnavailableError: The database is away.
    """
    async with transactions.connection("read") as connection:
        return await _FIRST_DUE.first(connection, {"p_notifier": notifier, "p_org_id": org_id}) is not None


@retry_conflicts
async def claim(
    transactions: Transactions, notifier: str, limit: int, policy: Policy, *, org_id: str | None = None
) -> list[Delivery]:
    """Claim due rows of one notifier, the longest overdue first; a decision stays behind the notice before it.

    Args:
        transactions: Where the rows are.
        notifier: Whose.
        limit: At most so many.
        policy: For how long they are leased.
        org_id: Only this organisation's; None: all.

    Raises:
        StoreUnavailableError: The database is away.
    """
    leased_at = time.monotonic()
    values = {"p_notifier": notifier, "p_limit": limit, "p_org_id": org_id, "p_lease_s": policy.lease_s}
    async with transactions.connection("autocommit") as connection:
        return _leased(await _CLAIM_DUE.rows(connection, values), leased_at, policy)


@retry_conflicts
async def claim_next(
    transactions: Transactions, approvals: Iterable[tuple[str, UUID]], policy: Policy
) -> list[Delivery]:
    """Claim the first undelivered row of each pair of notifier and approval id, if it is due.

    Raises:
        StoreUnavailableError: The database is away.
    """
    leased_at = time.monotonic()
    rows = [{"notifier": notifier, "approval_id": approval_id} for notifier, approval_id in approvals]
    async with transactions.connection("autocommit") as connection:
        values = {**_APPROVALS.values(dialect_of(connection), rows), "p_lease_s": policy.lease_s}
        return _leased(await _CLAIM_NEXT.rows(connection, values), leased_at, policy)


def _leased(rows: list[dict[str, Any]], leased_at: float, policy: Policy) -> list[Delivery]:
    send_before = leased_at + policy.send_within_s
    return [
        Delivery(row["delivery_id"], row["notifier"], row["approval_id"], row["attempts"], _notice_of(row), send_before)
        for row in sorted(rows, key=lambda row: row["id"])
    ]


def _notice_of(row: dict[str, Any]) -> Notice | None:
    try:
        return Notice.model_validate({**row["payload"], "delivery_id": row["delivery_id"]})
    except (ValidationError, TypeError):
        return None


_RESULTS = RowsParameter(
    "results",
    {
        "delivery_id": Uuid(),
        "attempt": Integer(),
        "attempts": Integer(),
        "status": Text(),
        "error": Text(),
        "delay_s": Float(53),
    },
)


def _record(dialect: str) -> Any:
    given = _RESULTS.table(dialect).c
    is_delivered = given.status == literal_column("'DELIVERED'")
    return (
        update(deliveries)
        .where(
            deliveries.c.delivery_id == given.delivery_id,
            # What was delivered was delivered, whoever has the lease now; all else is for the one that has it.
            or_(
                and_(is_delivered, deliveries.c.status != literal_column("'DELIVERED'")),
                and_(deliveries.c.status == literal_column("'DUE'"), deliveries.c.attempts == given.attempt),
            ),
        )
        .values(
            status=given.status,
            attempts=given.attempts,
            last_error=given.error,
            delivered_at=case((is_delivered, db_now())),
            next_attempt_at=case(
                (given.status == literal_column("'DUE'"), db_now(plus=given.delay_s)),
                else_=deliveries.c.next_attempt_at,
            ),
        )
        .returning(deliveries.c.delivery_id)
    )


_RECORD = Statement(_record)


@retry_conflicts
async def record(transactions: Transactions, results: Sequence[AttemptResult]) -> None:
    """Record results in one statement. Of a row that was claimed again meanwhile, only that it was delivered counts.

    Raises:
        StoreUnavailableError: The database is away.
    """
    rows = [
        {
            "delivery_id": result.delivery.delivery_id,
            "attempt": result.delivery.attempt,
            "attempts": result.attempts,
            "status": result.status.value,
            "error": result.error,
            "delay_s": result.delay_s,
        }
        for result in results
    ]
    async with transactions.connection("autocommit") as connection:
        await _RECORD.rows(connection, _RESULTS.values(dialect_of(connection), rows))


class ResultRecorder:
    """Records results in the background, those that come together in one statement; keeps them in an outage.

    Args:
        transactions: Where the rows are.
        on_recorded: Is called with what was recorded, after the commit.
    """

    def __init__(self, transactions: Transactions, on_recorded: Callable[[Sequence[AttemptResult]], None]) -> None:
        self._transactions, self._on_recorded = transactions, on_recorded
        self._queue: BatchQueue[AttemptResult, None] = BatchQueue(self._process, max_items=_MOST_RESULTS)
        self._delivered: set[UUID] = set()
        self._fault: Exception | None = None
        self._failed = asyncio.Event()

    @property
    def is_empty(self) -> bool:
        """True if everything is recorded."""
        return len(self._queue) == 0

    def add(self, result: AttemptResult) -> None:
        """Record `result` soon."""
        if result.status is DeliveryStatus.DELIVERED:
            self._delivered.add(result.delivery.delivery_id)
        self._queue.add(result)

    def is_delivered(self, delivery_id: UUID) -> bool:
        """True if it was delivered and that is not recorded yet."""
        return delivery_id in self._delivered

    async def join(self) -> None:
        """Wait until everything is recorded, however long the database is away."""
        await self._queue.join()

    async def failure(self) -> Exception:
        """Wait until something cannot be recorded, and return the error."""
        while self._fault is None:
            self._failed.clear()
            await self._failed.wait()
        return self._fault

    async def close(self, timeout_s: float) -> None:
        """Wait for what there is, `timeout_s` seconds at most; the rest is sent again when its lease ends."""
        await self._queue.close(timeout_s)

    async def _process(self, results: Sequence[AttemptResult]) -> Sequence[None]:
        # Before it writes, not after: cancelled in between, a row that is recorded already would be recorded again.
        await asyncio.sleep(_PAUSE_S)
        while not await self._try(results):
            await asyncio.sleep(_RETRY_S)
        self._delivered.difference_update(result.delivery.delivery_id for result in results)
        return [None] * len(results)

    async def _try(self, results: Sequence[AttemptResult]) -> bool:
        try:
            await record(self._transactions, results)
        except StoreNotOpenError:
            return True  # it was closed meanwhile: these are sent again when their lease ends
        except Exception as exc:
            if self._fault is None:
                _logger.warning(
                    "The results of %d attempts cannot be recorded yet: %s", len(self._queue), describe(exc)
                )
            self._fault = exc
            self._failed.set()
            return False
        self._fault = None
        self._on_recorded(results)
        return True
