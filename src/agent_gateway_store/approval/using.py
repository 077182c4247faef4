"""Use an approval: release its one call, note what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement

from agent_gateway_store.approval import refusals
from agent_gateway_store.approval.rows import request_of, standing
from agent_gateway_store.approval.transitions import move, note_outcome, read, requests
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.database import Executor, db_now, first_row

__all__ = ["consume", "record"]

_APPROVED, _USED = ApprovalStatus.APPROVED, ApprovalStatus.USED


async def consume(
    executor: Executor, key: ColumnElement[bool], *, caller_id: str, tool_call_hash: str
) -> Mapping[str, Any]:
    """Move an approval to USED for this caller and this call; does not commit. Returns the row.

    Raises:
        ApprovalError: As `ApprovalManager.consume_token` says.
    """
    bound = (requests.c.caller_id == caller_id, requests.c.tool_call_hash == tool_call_hash)
    found: ApprovalRequest | None = None
    for _ in range(2):
        row = await first_row(executor, move((_APPROVED,), _USED, key, *bound, used_at=db_now()))
        if row is not None:
            return row
        found = await standing(executor, key)
        # On PostgreSQL it may have been approved between the two statements: then a second try decides.
        if found is None or found.status is not _APPROVED:
            break
    raise refusals.cannot_consume(found, caller_id=caller_id, tool_call_hash=tool_call_hash)


async def record(executor: Executor, key: ColumnElement[bool], outcome: str) -> Mapping[str, Any]:
    """Note the outcome of a used approval, once; does not commit. The very same outcome again changes nothing.

    Returns:
        The row as it then stands.

    Raises:
        ApprovalError: As `ApprovalManager.record_outcome` says.
    """
    row = await first_row(executor, note_outcome(key, outcome))
    if row is None:
        row = await first_row(executor, read(key))
        found = None if row is None else request_of(row)
        if row is None or found is None or found.status is not _USED or found.outcome != outcome:
            raise refusals.cannot_record(found)
    return row
