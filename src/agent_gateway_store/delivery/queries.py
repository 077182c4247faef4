"""Look at the outbox, and put dead letters back."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, case, delete, func, select, update

from agent_gateway_store.delivery.claims import deliveries
from agent_gateway_store.models.delivery import DeliveryStatus, NotificationDelivery
from agent_gateway_store.results import Page
from agent_gateway_store.storage.database import SqlConnection, db_now
from agent_gateway_store.storage.pagination import decode, encode, invalid_cursor

__all__ = ["COLUMNS", "counts", "page", "prune", "redrive"]

COLUMNS = (
    *("created_at", "notifier", "event", "status", "attempts", "next_attempt_at", "last_error"),
    *("approval_id", "delivery_id"),
)
_COUNTED = ("notifier", "is_loaded", "waiting", "due", "dead", "oldest")


async def page(
    connection: SqlConnection,
    *conditions: ColumnElement[bool],
    scope: bytes,
    limit: int,
    cursor: str | None,
) -> Page[NotificationDelivery]:
    """Read one page, newest first; `scope` binds its cursor to the listing.

    Raises:
        InvalidCursorError: The cursor did not come from this listing.
    """
    statement = select(deliveries).where(*conditions).order_by(deliveries.c.id.desc()).limit(limit + 1)
    if cursor is not None:
        statement = statement.where(deliveries.c.id < _decode(scope, cursor))
    rows = (await connection.execute(statement)).mappings().all()
    found = [NotificationDelivery.from_row(dict(row)) for row in rows[:limit]]
    return Page(found, next_cursor=_encode(scope, found[-1].id or 0) if len(rows) > limit else None, columns=COLUMNS)


def _encode(scope: bytes, row_id: int) -> str:
    return encode(scope, row_id.to_bytes(8))


def _decode(scope: bytes, cursor: str) -> int:
    payload = decode(scope, cursor)
    if len(payload) != 8 or (row_id := int.from_bytes(payload)) >= 2**63:
        raise invalid_cursor()
    return row_id


async def counts(
    connection: SqlConnection, *conditions: ColumnElement[bool], loaded: tuple[str, ...]
) -> Page[dict[str, Any]]:
    """Count what is not delivered, by notifier; every loaded notifier has a line."""
    is_waiting = deliveries.c.status == DeliveryStatus.DUE
    statement = (
        select(
            deliveries.c.notifier,
            func.sum(case((is_waiting, 1), else_=0)).label("waiting"),
            func.sum(case((and_(is_waiting, deliveries.c.next_attempt_at <= db_now()), 1), else_=0)).label("due"),
            func.sum(case((is_waiting, 0), else_=1)).label("dead"),
            func.min(deliveries.c.created_at).label("oldest"),
        )
        .where(deliveries.c.status.in_([DeliveryStatus.DUE, DeliveryStatus.DEAD]), *conditions)
        .group_by(deliveries.c.notifier)
    )
    found = {row["notifier"]: dict(row) for row in (await connection.execute(statement)).mappings()}
    nothing = {"waiting": 0, "due": 0, "dead": 0, "oldest": None}
    return Page(
        [
            {**nothing, **found.get(name, {}), "notifier": name, "is_loaded": name in loaded}
            for name in sorted({*found, *loaded})
        ],
        columns=_COUNTED,
    )


async def redrive(connection: SqlConnection, *conditions: ColumnElement[bool]) -> int:
    """Make dead letters due at once, with all their tries before them; returns how many. Does not commit."""
    statement = (
        update(deliveries)
        .where(deliveries.c.status == DeliveryStatus.DEAD, *conditions)
        .values(status=DeliveryStatus.DUE, attempts=0, next_attempt_at=db_now())
    )
    return int((await connection.execute(statement)).rowcount)  # type: ignore[attr-defined]


async def prune(connection: SqlConnection, *conditions: ColumnElement[bool], older_than: timedelta, limit: int) -> int:
    """Delete at most `limit` rows that were delivered longer ago than `older_than`; returns how many."""
    old = (
        select(deliveries.c.id)
        .where(
            deliveries.c.status == DeliveryStatus.DELIVERED,
            deliveries.c.delivered_at < db_now(plus=-older_than),
            *conditions,
        )
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    ids = (await connection.execute(old)).scalars().all()
    if not ids:
        return 0
    return int((await connection.execute(delete(deliveries).where(deliveries.c.id.in_(ids)))).rowcount)  # type: ignore[attr-defined]
