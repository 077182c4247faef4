"""The events by which whoever changes the log past its rules says what was done. They are never pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_gateway_store.audit.backends import insert_event, table
from agent_gateway_store.audit.record import encode_event, key_of
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus

DOOR_SERVER = "gateway-store"
"""`mcp_server` of these events."""
PRUNE, ERASE, HOLD, RELEASE = "audit.prune", "audit.erase", "audit.hold", "audit.release"
"""Their `tool_name`. In `sanitized_args` a prune names `positions` (pairs: the first and the last of a run), an erasure
`position` and `row_sha256`: `hash_of_stored` of the event as it was blanked, without `content_hash` and salt."""
PRUNE_APPROVALS, RESTORED = "approvals.prune", "db.restored"
DOOR_TOOLS = (PRUNE, ERASE, HOLD, RELEASE, PRUNE_APPROVALS, RESTORED)


def is_door() -> ColumnElement[bool]:
    """Return the condition of these events."""
    # Not by IN, whose values SQLAlchemy adds only when it executes.
    return and_(table.c.mcp_server == DOOR_SERVER, or_(*(table.c.tool_name == tool for tool in DOOR_TOOLS)))


async def write_door(
    connection: AsyncConnection,
    tool: str,
    facts: Mapping[str, Any],
    *,
    by: str,
    environment: str,
    why: str,
    org_id: str = "default",
    request_id: str | None = None,
) -> int:
    """Insert the event of a door, without committing it; return its id.

    Args:
        facts: What is done: positions, counts and hashes, nothing of an event's content.
        by: Its `caller_id`.
        request_id: Default: one that nobody else has.
    """
    event = AuditEvent(
        request_id=request_id or f"{tool}-{uuid4().hex}",
        org_id=org_id,
        caller_id=by,
        caller_role="operator",
        environment=environment,
        mcp_server=DOOR_SERVER,
        tool_name=tool,
        raw_args_hash=AuditEvent.hash_args(facts),
        sanitized_args=dict(facts),
        risk_score=0,
        matched_policy_rule="",
        decision=Decision.ALLOW,
        execution_status=ExecutionStatus.SUCCESS,
        latency_ms=0,
        deterministic_rationale=why,
    )
    row = encode_event(event)
    await insert_event(connection, row)
    stored, org = key_of(row)
    found = select(table.c.id).where(table.c.request_id == stored, table.c.org_id == org)
    return int((await connection.execute(found)).scalar_one())
