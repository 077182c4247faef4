"""Use an approval: release its one call, note what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent_gateway_store.approval import refusals
from agent_gateway_store.approval.rows import Name, request_of, standing
from agent_gateway_store.approval.statements import CONSUME, NOTE_OUTCOME, READ
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.database import AnyConnection

__all__ = ["consume", "record"]


async def consume(connection: AnyConnection, name: Name, *, caller_id: str, tool_call_hash: str) -> Mapping[str, Any]:
    """Move an approval to USED for this caller and this call. Returns the row.

    Raises:
        ApprovalError: As `ApprovalManager.consume_token` says.
    """
    bound = {"p_caller_id": caller_id, "p_tool_call_hash": tool_call_hash}
    found: ApprovalRequest | None = None
    for _ in range(2):
        row = await CONSUME.first(connection, name.values | bound)
        if row is not None:
            return row
        found = await standing(connection, name)
        # On PostgreSQL it may have been approved between the two statements: then a second try decides.
        if found is None or found.status is not ApprovalStatus.APPROVED:
            break
    raise refusals.cannot_consume(found, caller_id=caller_id, tool_call_hash=tool_call_hash)


async def record(connection: AnyConnection, name: Name, outcome: str) -> Mapping[str, Any]:
    """Note the outcome of a used approval, once. The very same outcome again changes nothing.

    Returns:
        The row as it then stands.

    Raises:
        ApprovalError: As `ApprovalManager.record_outcome` says.
    """
    row = await NOTE_OUTCOME.first(connection, name.values | {"p_outcome": outcome})
    if row is None:
        row = await READ[name.by].first(connection, name.values)
        found = None if row is None else request_of(row)
        if row is None or found is None or found.status is not ApprovalStatus.USED or found.outcome != outcome:
            raise refusals.cannot_record(found)
    return row
