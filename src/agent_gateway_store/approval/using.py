"""Use an approval: release its one call or its output, note what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from agent_gateway_store.approval import refusals
from agent_gateway_store.approval.rows import Name, request_of, standing
from agent_gateway_store.approval.statements import CONSUME, NOTE_OUTCOME, READ, RELEASE
from agent_gateway_store.encoding.canonical import hash_json
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalScope
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.database import AnyConnection
from agent_gateway_store.storage.statements import Statement

__all__ = ["Permission", "consume", "record", "release"]


class Permission(NamedTuple):
    """What an approval must be for.

    Attributes:
        caller_id: Who asked.
        scope: What it releases.
        tool_call_hash: Which call; None: whichever it was asked for.
    """

    caller_id: str
    scope: ApprovalScope
    tool_call_hash: str | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of statements that it gives."""
        return {f"p_{field}": value for field, value in self._asdict().items()}


async def consume(connection: AnyConnection, name: Name, bound: Permission) -> Mapping[str, Any]:
    """Move an approval to USED for this caller, scope and call. Returns the row.

    Raises:
        ApprovalError: As `ApprovalManager.consume_token` says.
    """
    return await _use(CONSUME, connection, name, bound)


async def release(
    connection: AnyConnection, name: Name, bound: Permission, *, hash_key: str | None
) -> Mapping[str, Any]:
    """Move an approval to USED for this caller and scope, and check its output; does not commit. Returns the row.

    Args:
        connection: In a transaction.
        name: Which approval.
        bound: Without a call: the output is what was approved.
        hash_key: As for `issue_values`.

    Raises:
        ApprovalError: As `ApprovalManager.release_output` says; what was written must be rolled back.
    """
    row = await _use(RELEASE, connection, name, bound)
    if row["output_payload"] is None:
        raise refusals.cannot_release(row["approval_id"], "holds no output")
    if hash_json(row["output_payload"], key=hash_key) != row["output_hash"]:
        raise refusals.cannot_release(row["approval_id"], "holds an output that does not match its hash")
    return row


async def _use(statement: Statement, connection: AnyConnection, name: Name, bound: Permission) -> Mapping[str, Any]:
    values = name.values | bound.parameters
    found: ApprovalRequest | None = None
    for _ in range(2):
        row = await statement.first(connection, values)
        if row is not None:
            return row
        found = await standing(connection, name)
        # On PostgreSQL it may have been approved between the two statements: then a second try decides.
        if found is None or found.status is not ApprovalStatus.APPROVED:
            break
    raise refusals.cannot_use(found, **bound._asdict())


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
