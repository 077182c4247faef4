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
    ColumnElement,
    Integer,
    Text,
    Uuid,
    and_,
    bindparam,
    cast,
    func,
    literal_column,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB

from agent_gateway_store.delivery.policy import Policy
from agent_gateway_store.models.columns import Json
from agent_gateway_store.models.delivery import NotificationDelivery
from agent_gateway_store.models.values import Notice
from agent_gateway_store.storage.database import Transactions
from agent_gateway_store.storage.db_clock import db_now
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


def _due() -> ColumnElement[bool]:
    # As a subquery the time is taken once, so that the index finds the rows.
    now = select(db_now()).scalar_subquery()
    org_id: ColumnElement[Any] = bindparam("p_org_id", type_=Text())
    return and_(
        deliveries.c.status == _IS_DUE,
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


def _members(name: str, dialect: str) -> Any:
    """Select the UUIDs in the JSON list of a parameter."""
    if dialect == "postgresql":
        value = func.jsonb_array_elements_text(bindparam(name, type_=JSONB())).column_valued("value")
        return select(cast(value, Uuid()))
    listed = func.json_each(bindparam(name, type_=Json())).table_valued("value", name="listed")
    return select(func.replace(listed.c.value, literal_column("'-'"), literal_column("''")))


_TAKEN = tuple(deliveries.c[name] for name in ("id", "delivery_id", "approval_id", "attempts", "payload"))


def _claim(dialect: str, *, of_approvals: bool) -> Any:
    conditions = [_due(), deliveries.c.notifier == bindparam("p_notifier", type_=Text()), _is_first()]
    if of_approvals:
        conditions.append(deliveries.c.approval_id.in_(_members("p_approval_ids", dialect)))
    due = (
        select(deliveries.c.id)
        .where(*conditions)
        .order_by(deliveries.c.next_attempt_at, deliveries.c.id)
        .limit(bindparam("p_limit", type_=Integer()))
        .offset(literal_column("0"))  # SQLite gets one in any case, which would be a parameter
        .with_for_update(skip_locked=True, of=deliveries)
        .cte("due")
    )
    return (
        update(deliveries)
        .where(deliveries.c.id.in_(select(due.c.id)))
        .values(attempts=deliveries.c.attempts + literal_column("1"), next_attempt_at=db_now(plus="p_lease_s"))
        .returning(*_TAKEN)
    )


_CLAIM = Statement(lambda dialect: _claim(dialect, of_approvals=False))
_CLAIM_OF = Statement(lambda dialect: _claim(dialect, of_approvals=True))
_NAMES = Statement(select(deliveries.c.notifier).where(_due()).distinct())


async def notifiers_with_due_rows(transactions: Transactions, org_id: str | None = None) -> set[str]:
    """Return the names of notifiers for which a row is due.

    Raises:
        StoreUnavailableError: The database is away.
    """
    async with transactions.connection("read") as connection:
        return {row["notifier"] for row in await _NAMES.rows(connection, {"p_org_id": org_id})}


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
    values = {"p_notifier": notifier, "p_limit": limit, "p_lease_s": policy.lease_s, "p_org_id": org_id}
    statement = _CLAIM
    if approval_ids is not None:
        statement, values = _CLAIM_OF, values | {"p_approval_ids": [str(each) for each in approval_ids]}
    async with transactions.connection("autocommit") as connection:
        rows = await statement.rows(connection, values)
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
