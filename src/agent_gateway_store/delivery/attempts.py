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
from sqlalchemy import Float, Integer, Text, Uuid
from sqlalchemy.sql.selectable import TextualSelect
from sqlalchemy.types import TypeEngine

from agent_gateway_store._concurrency import BatchQueue
from agent_gateway_store._text import describe
from agent_gateway_store.delivery.policy import Policy
from agent_gateway_store.errors import StoreNotOpenError
from agent_gateway_store.models.base import repaired
from agent_gateway_store.models.delivery import DeliveryStatus, NotificationDelivery
from agent_gateway_store.models.values import Notice
from agent_gateway_store.storage.database import Transactions, dialect_of
from agent_gateway_store.storage.db_clock import clock_sql
from agent_gateway_store.storage.errors import OutageLog, retry_conflicts
from agent_gateway_store.storage.statements import RowsParameter, Statement, typed_text

# A statement with so many rows takes some 10 ms; in a longer one the first rows would wait for the last.
_MOST_RESULTS = 500
# What comes meanwhile is recorded together. Without it asking for approvals with the outbox took 1.39 times as long as
# without, and with it 1.22; a longer one gained nothing.
_PAUSE_S = 0.02
# Between two tries to record while the database is away: as often as a worker looks for due rows by default.
_RETRY_S = 1.0

_logger = logging.getLogger("agent_gateway_store.notifications")

deliveries = NotificationDelivery.__table__


@dataclass(frozen=True, slots=True)
class Delivery:
    """A row leased to this process.

    Attributes:
        notice: What to send; None if the row holds no notice.
        attempt: Number of this attempt, from 1; another worker counts on from there.
        leased_at: When its lease began at the earliest, by `time.monotonic()`.
        cause: The span that caused it, if that was here.
    """

    delivery_id: UUID
    notifier: str
    approval_id: UUID
    attempt: int
    notice: Notice | None
    leased_at: float
    cause: Any = None


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """The result of one attempt: what holds of the row from now on; if it is DUE, after `delay_s` seconds."""

    delivery: Delivery
    status: DeliveryStatus
    attempts: int
    delay_s: float = 0.0
    error: str | None = None

    @classmethod
    def untried(cls, delivery: Delivery) -> AttemptResult:
        """Return the row as if it had not been claimed."""
        return cls(delivery, DeliveryStatus.DUE, delivery.attempt - 1)


_APPROVALS = RowsParameter("approvals", {"notifier": Text(), "approval_id": Uuid()})
_RESULTS = RowsParameter(
    "results",
    {
        "delivery_id": Uuid(),
        "attempt": Integer(),
        "attempts": Integer(),
        "status": Text(),
        "error": Text(),
        "delay_s": Float(53),
        "lease_left_s": Float(53),
    },
)
_TYPES: dict[str, TypeEngine[Any]] = {
    "p_org_id": Text(),
    "p_notifier": Text(),
    "p_limit": Integer(),
    "p_lease_s": Float(53),
    **_APPROVALS.types,
    **_RESULTS.types,
}


def _statement(sql: str, *names: str) -> Statement:
    def of_dialect(dialect: str) -> TextualSelect:
        words = {
            "now": clock_sql(dialect),
            # As a subquery the time is taken once, so that the index finds the rows.
            "is_due": f"next_attempt_at <= (SELECT {clock_sql(dialect)})",
            "is_ours": "(:p_org_id IS NULL OR org_id = :p_org_id) AND notifier = :p_notifier",
            "claim": f"""
                UPDATE notification_deliveries
                SET attempts = attempts + 1, next_attempt_at = {clock_sql(dialect, plus=":p_lease_s")}
                WHERE id IN (SELECT id FROM due)
                RETURNING {", ".join(names)}
                """,  # noqa: S608  names of the program's own
            "lease_end": clock_sql(dialect, plus="given.lease_left_s"),
            "next_time": clock_sql(dialect, plus="given.delay_s"),
            "skip_locked": "FOR UPDATE SKIP LOCKED" if dialect == "postgresql" else "",
            "approvals": _APPROVALS.sql(dialect),
            "results": _RESULTS.sql(dialect),
        }
        return typed_text(sql.format_map(words), _TYPES, [deliveries.c[name] for name in names])

    return Statement(of_dialect)


# In the order of the index: for any row the planner may read the table, past all that was delivered.
_FIRST_DUE = _statement(
    """
    SELECT id FROM notification_deliveries WHERE status = 'DUE' AND {is_due} AND {is_ours}
    ORDER BY next_attempt_at, id LIMIT 1
    """,
    "id",
)
_LEASED = ("id", "delivery_id", "notifier", "approval_id", "attempts", "payload")
# Not while an earlier notice of the same approval is still on its way to the same notifier.
# Few rows have one approval_id, but all of a backlog have this status and notifier: a planner whose statistics are from
# quiet times takes the index over these two, once for each row. So they are written as no index knows them (`|| ''`);
# and OFFSET keeps PostgreSQL from a join, for which it would read the whole table.
_CLAIM_DUE = _statement(
    """
    WITH due AS (
        SELECT id FROM notification_deliveries AS delivery
        WHERE status = 'DUE' AND {is_due} AND {is_ours} AND NOT EXISTS (
            SELECT 1 FROM notification_deliveries AS before
            WHERE before.approval_id = delivery.approval_id AND before.notifier || '' = delivery.notifier
                AND before.status || '' = 'DUE' AND before.id + 0 < delivery.id
            LIMIT 1 OFFSET 0
        )
        ORDER BY next_attempt_at, id LIMIT :p_limit {skip_locked}
    )
    {claim}
    """,
    *_LEASED,
)
# One look for each approval, and then for its row by id: a join, or another index, would read a whole backlog. The look
# locks rows, so it must run once for each approval: MATERIALIZED.
_CLAIM_NEXT = _statement(
    """
    WITH due AS MATERIALIZED (
        SELECT (
            SELECT id FROM notification_deliveries
            WHERE status || '' = 'DUE' AND {is_due} AND id = (
                SELECT min(before.id + 0) FROM notification_deliveries AS before
                WHERE before.approval_id = given.approval_id AND before.notifier || '' = given.notifier
                    AND before.status || '' = 'DUE'
            )
            {skip_locked}
        ) AS id
        FROM {approvals} AS given
    )
    {claim}
    """,
    *_LEASED,
)
# What was delivered was delivered, whoever has the lease now; all else is for the one that has it.
_RECORD = _statement(
    """
    UPDATE notification_deliveries AS delivery
    SET status = given.status, attempts = given.attempts, last_error = given.error,
        delivered_at = CASE WHEN given.status = 'DELIVERED' THEN {now} END,
        next_attempt_at = CASE WHEN given.status = 'DUE' THEN {next_time} ELSE delivery.next_attempt_at END
    FROM {results} AS given
    WHERE delivery.delivery_id = given.delivery_id AND (
        given.status = 'DELIVERED' AND delivery.status <> 'DELIVERED'
        OR delivery.status = 'DUE' AND delivery.attempts = given.attempt AND delivery.next_attempt_at < {lease_end}
    )
    RETURNING id
    """,
    "id",
)


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

    Raises:
        StoreUnavailableError: The database is away.
    """
    leased_at = time.monotonic()
    values = {"p_notifier": notifier, "p_limit": limit, "p_org_id": org_id, "p_lease_s": policy.lease_s}
    async with transactions.connection("autocommit") as connection:
        return _leased(await _CLAIM_DUE.rows(connection, values), leased_at)


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
        return _leased(await _CLAIM_NEXT.rows(connection, values), leased_at)


def _leased(rows: list[dict[str, Any]], leased_at: float) -> list[Delivery]:
    return [
        Delivery(row["delivery_id"], row["notifier"], row["approval_id"], row["attempts"], _notice_of(row), leased_at)
        for row in sorted(map(repaired, rows), key=lambda row: row["id"])
    ]


def _notice_of(row: dict[str, Any]) -> Notice | None:
    try:
        # A gateway that is upgraded before its worker may write fields that this version does not know.
        return Notice.model_validate({**row["payload"], "delivery_id": row["delivery_id"]}, extra="ignore")
    except (ValidationError, TypeError):
        return None


@retry_conflicts
async def record(transactions: Transactions, results: Sequence[AttemptResult], policy: Policy) -> None:
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
            # A row whose lease ends later is another worker's, also in an attempt of the same number: a dead letter
            # that is sent again counts from 1.
            "lease_left_s": result.delivery.leased_at + 1.5 * policy.lease_s - time.monotonic(),
        }
        for result in results
    ]
    async with transactions.connection("autocommit") as connection:
        await _RECORD.rows(connection, _RESULTS.values(dialect_of(connection), rows))


class ResultRecorder:
    """Records results in the background, those that come together in one statement; keeps them in an outage.

    `on_recorded` is called with what was recorded, after the commit.
    """

    def __init__(
        self, transactions: Transactions, policy: Policy, on_recorded: Callable[[Sequence[AttemptResult]], None]
    ) -> None:
        self._transactions, self._policy, self._on_recorded = transactions, policy, on_recorded
        self._queue: BatchQueue[AttemptResult, None] = BatchQueue(self._process, max_items=_MOST_RESULTS)
        self._fault: Exception | None = None
        self._failed = asyncio.Event()
        self._log = OutageLog(_logger)

    @property
    def is_empty(self) -> bool:
        """True if everything is recorded."""
        return len(self._queue) == 0

    def add(self, result: AttemptResult) -> None:
        """Record `result` soon."""
        self._queue.add(result)

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
        return [None] * len(results)

    async def _try(self, results: Sequence[AttemptResult]) -> bool:
        try:
            await record(self._transactions, results, self._policy)
        except StoreNotOpenError:
            return True  # it was closed meanwhile: these are sent again when their lease ends
        except Exception as exc:
            self._log.away("The results of %d attempts cannot be recorded yet: %s", len(self._queue), describe(exc))
            self._fault = exc
            self._failed.set()
            return False
        self._fault = None
        self._log.back("The results of attempts are recorded again.")
        self._on_recorded(results)
        return True
