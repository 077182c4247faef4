"""Take due rows, so that no other worker sends them meanwhile.

A claim moves `next_attempt_at` forward by the lease and counts the try: a worker that dies loses its rows to others
when the lease ends, and a notice that kills its worker each time is given up after so many claims. PostgreSQL skips
rows that another worker is just taking (`FOR UPDATE SKIP LOCKED`); on SQLite there is one writer at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import (
    CTE,
    ColumnElement,
    Integer,
    Text,
    Uuid,
    and_,
    bindparam,
    func,
    literal_column,
    not_,
    or_,
    select,
    update,
)

from agent_gateway_store.delivery.policy import Policy
from agent_gateway_store.models.delivery import NotificationDelivery
from agent_gateway_store.models.values import Notice
from agent_gateway_store.storage.database import Transactions, dialect_of
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.rows import RowsParameter
from agent_gateway_store.storage.statements import Statement, unindexed

__all__ = ["Delivery", "claim", "deliveries", "notifiers_with_due_rows"]

deliveries = NotificationDelivery.__table__  # type: ignore[attr-defined]
_IS_DUE: ColumnElement[str] = literal_column("'DUE'")


@dataclass(frozen=True, slots=True)
class Delivery:
    """A row in this process's hands.

    Attributes:
        notifier: To whom.
        notice: What to tell; None if the row holds no notice.
        attempt: Number of this try, from 1; the row is ours while it still says so.
        send_before: Until when the try may begin, by `time.monotonic()`.
    """

    delivery_id: UUID
    notifier: str
    approval_id: UUID
    attempt: int
    notice: Notice | None
    send_before: float


def _due(status: ColumnElement[Any] = deliveries.c.status) -> ColumnElement[bool]:
    # As a subquery the time is taken once, so that the index finds the rows.
    now = select(db_now()).scalar_subquery()
    org_id: ColumnElement[Any] = bindparam("p_org_id", type_=Text())
    return and_(
        status == _IS_DUE,
        deliveries.c.next_attempt_at <= now,
        or_(org_id.is_(None), deliveries.c.org_id == org_id),
    )


def _is_first() -> ColumnElement[bool]:
    """No earlier notice of the same approval is still on its way to the same notifier."""
    before = deliveries.alias("before")
    # Few rows have one approval_id, but all of a backlog have this status and notifier: a planner whose statistics are
    # from quiet times takes the index over these two, once for each row. So they are written as no index knows them;
    # and OFFSET keeps PostgreSQL from a join, for which it would read the whole table.
    return not_(
        select(literal_column("1"))
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


_TAKEN = tuple(deliveries.c[name] for name in ("id", "delivery_id", "approval_id", "attempts", "payload"))


def _claim(due: CTE) -> Any:
    return (
        update(deliveries)
        .where(deliveries.c.id.in_(select(due.c.id)))
        .values(attempts=deliveries.c.attempts + literal_column("1"), next_attempt_at=db_now(plus="p_lease_s"))
        .returning(*_TAKEN)
    )


def _claim_any(_: str) -> Any:
    due = (
        select(deliveries.c.id)
        .where(_due(), deliveries.c.notifier == bindparam("p_notifier", type_=Text()), _is_first())
        .order_by(deliveries.c.next_attempt_at, deliveries.c.id)
        .limit(bindparam("p_limit", type_=Integer()))
        .offset(literal_column("0"))  # SQLite gets one in any case, which would be a parameter
        .with_for_update(skip_locked=True, of=deliveries)
    )
    return _claim(due.cte("due"))


_APPROVALS = RowsParameter("approvals", {"approval_id": Uuid()})


def _claim_of(dialect: str) -> Any:
    approvals, before = _APPROVALS.table(dialect), deliveries.alias("before")
    first = (
        select(func.min(before.c.id + literal_column("0")))
        .where(
            before.c.approval_id == approvals.c.approval_id,
            unindexed(before.c.notifier) == bindparam("p_notifier", type_=Text()),
            unindexed(before.c.status) == _IS_DUE,
        )
        .correlate(approvals)
        .scalar_subquery()
    )
    # One look for each approval, and then for its row by id: a join, or another index, would read a whole backlog.
    taken = (
        select(deliveries.c.id)
        .where(deliveries.c.id == first, _due(unindexed(deliveries.c.status)))
        .with_for_update(skip_locked=True, of=deliveries)
    )
    # It locks rows, so it must run once for each approval.
    due = select(taken.scalar_subquery().label("id")).select_from(approvals).cte("due").prefix_with("MATERIALIZED")
    return _claim(due)


_CLAIM = Statement(_claim_any)
_CLAIM_OF = Statement(_claim_of)
_NOTIFIERS = RowsParameter("notifiers", {"notifier": Text()})


def _with_due_rows(dialect: str) -> Any:
    notifiers = _NOTIFIERS.table(dialect)
    # One look into the index for each, however long the backlog is; OFFSET keeps PostgreSQL from a join.
    has_due = (
        select(literal_column("1"))
        .select_from(deliveries)
        .where(_due(), deliveries.c.notifier == notifiers.c.notifier)
        .limit(literal_column("1"))
        .offset(literal_column("0"))
        .exists()
    )
    return select(notifiers.c.notifier).where(has_due)


_WITH_DUE_ROWS = Statement(_with_due_rows)


async def notifiers_with_due_rows(
    transactions: Transactions, names: Iterable[str], org_id: str | None = None
) -> set[str]:
    """Return those of the notifiers `names` for which a row is due.

    Raises:
        StoreUnavailableError: The database is away.
    """
    async with transactions.connection("read") as connection:
        asked = _NOTIFIERS.values(dialect_of(connection), [{"notifier": name} for name in names])
        return {row["notifier"] for row in await _WITH_DUE_ROWS.rows(connection, {**asked, "p_org_id": org_id})}


async def claim(
    transactions: Transactions,
    notifier: str,
    limit: int,
    policy: Policy,
    *,
    org_id: str | None = None,
    approval_ids: Iterable[UUID] | None = None,
) -> list[Delivery]:
    """Claim due rows of one notifier, the longest overdue first; a decision stays behind the notice before it.

    Args:
        transactions: Where the rows are.
        notifier: Whose.
        limit: At most so many.
        policy: How long they are kept.
        org_id: Only this organisation's; None: all.
        approval_ids: Only of these approvals; None: of all.

    Raises:
        StoreUnavailableError: The database is away.
    """
    taken_at = time.monotonic()
    values: dict[str, Any] = {"p_notifier": notifier, "p_lease_s": policy.lease_s, "p_org_id": org_id}
    async with transactions.connection("autocommit") as connection:
        if approval_ids is None:
            rows = await _CLAIM.rows(connection, values | {"p_limit": limit})
        else:
            asked = [{"approval_id": each} for each in approval_ids]
            rows = await _CLAIM_OF.rows(connection, values | _APPROVALS.values(dialect_of(connection), asked))
    rows.sort(key=lambda row: row["id"])
    return [
        Delivery(
            delivery_id=row["delivery_id"],
            notifier=notifier,
            approval_id=row["approval_id"],
            attempt=row["attempts"],
            notice=_notice_of(row),
            send_before=taken_at + policy.send_within_s,
        )
        for row in rows
    ]


def _notice_of(row: dict[str, Any]) -> Notice | None:
    try:
        return Notice.model_validate({**row["payload"], "delivery_id": row["delivery_id"]})
    except (ValidationError, TypeError):
        return None
