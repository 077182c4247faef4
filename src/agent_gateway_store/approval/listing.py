"""List approvals page by page, and sweep those whose time is over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, select, tuple_

from agent_gateway_store.approval.rows import request_of
from agent_gateway_store.approval.transitions import expire, overdue, read, requests
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.results import Page
from agent_gateway_store.storage.database import SqlConnection
from agent_gateway_store.storage.pagination import decode_cursor, encode_cursor

__all__ = ["COLUMNS", "page", "sweep"]

COLUMNS = (
    "created_at",
    "caller_id",
    "tool_call",
    "status",
    "risk_explanation",
    "approver_id",
    "outcome",
    "approval_id",
)


async def page(
    connection: SqlConnection,
    *conditions: ColumnElement[bool],
    scope: bytes,
    limit: int,
    cursor: str | None,
) -> Page[ApprovalRequest]:
    """Read one page, newest first, ties broken by id.

    Raises:
        InvalidCursorError: The cursor did not come from this listing.
    """
    statement = read(*conditions).order_by(requests.c.created_at.desc(), requests.c.id.desc()).limit(limit + 1)
    if cursor is not None:
        statement = statement.where(
            tuple_(requests.c.created_at, requests.c.id) < tuple_(*decode_cursor(scope, cursor))
        )
    rows = (await connection.execute(statement)).mappings().all()
    found = [request_of(row) for row in rows[:limit]]
    following = encode_cursor(scope, found[-1].created_at, found[-1].id or 0) if len(rows) > limit else None
    return Page(found, next_cursor=following, columns=COLUMNS, record_type=ApprovalRequest)


async def sweep(
    connection: SqlConnection, *conditions: ColumnElement[bool], batch_size: int
) -> tuple[list[Mapping[str, Any]], bool]:
    """Write EXPIRED to one batch of what is overdue; does not commit.

    Rows that another sweep holds are left to it.

    Returns:
        The rows, and True if there may be more.
    """
    batch = (
        select(requests.c.id)
        .where(overdue(), *conditions)
        .order_by(requests.c.id)
        .limit(batch_size)
        .with_for_update(skip_locked=True)
    )
    ids = (await connection.execute(batch)).scalars().all()
    rows = (await connection.execute(expire(requests.c.id.in_(ids)))).mappings().all() if ids else []
    return [dict(row) for row in rows], len(ids) == batch_size
