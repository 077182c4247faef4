"""The events that say what was done to the log past its rules, and by whom. They are never pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, and_, case, delete, func, insert, or_, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agent_gateway_store.audit.backends import insert_event
from agent_gateway_store.audit.record import encode_event, key_of
from agent_gateway_store.audit.selects import table
from agent_gateway_store.encoding.sanitize import storable_key
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus
from agent_gateway_store.models.delivery import DeliveryStatus, NotificationDelivery
from agent_gateway_store.models.evidence import AuditCheckpoint, identity_table
from agent_gateway_store.models.keys import ApiKey
from agent_gateway_store.models.retention import AuditPrune
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.errors import translate_errors
from agent_gateway_store.storage.identity import IDENTITY
from agent_gateway_store.storage.sequences import advance

PRUNE, ERASE, HOLD, RELEASE = "audit.prune", "audit.erase", "audit.hold", "audit.release"
"""The `tool_name` of these events. In `sanitized_args` a prune names `positions` (pairs: the first and the last of a
run), an erasure `position` and `row_sha256`: `hash_of_stored` of the event as it was blanked, without `content_hash`
and salt."""
PRUNE_APPROVALS, RESTORED = "approvals.prune", "db.restored"
DOOR_TOOLS = (PRUNE, ERASE, HOLD, RELEASE, PRUNE_APPROVALS, RESTORED)


DOOR_FIELDS: dict[str, Any] = {
    "mcp_server": "gateway-store",
    "caller_role": "operator",
    "matched_policy_rule": "",
    "decision": Decision.ALLOW,
    "execution_status": ExecutionStatus.SUCCESS,
}
"""What all of these events have. A call of an agent may name this server and these tools, with any arguments, but no
gateway lets it run, by no rule."""


def is_door(*tools: str) -> ColumnElement[bool]:
    """Return the condition of these events, or of those with one of `tools`."""
    fixed = (table.c[name] == value for name, value in DOOR_FIELDS.items())
    # Not by IN, whose values SQLAlchemy adds only when it executes.
    return and_(*fixed, or_(*(table.c.tool_name == tool for tool in tools or DOOR_TOOLS)))


def names_door(values: Mapping[str, Any], *tools: str) -> bool:
    """True if these columns of an event, as it was read, are those of a door: the database may call others equal."""
    fixed = all(values[name] == value for name, value in DOOR_FIELDS.items())
    return fixed and values["tool_name"] in (tools or DOOR_TOOLS)


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
        environment=environment,
        tool_name=tool,
        raw_args_hash=AuditEvent.hash_args(facts),
        sanitized_args=dict(facts),
        risk_score=0,
        latency_ms=0,
        deterministic_rationale=why,
        **DOOR_FIELDS,
    )
    row = encode_event(event)
    await insert_event(connection, row)
    stored, org = key_of(row)
    found = select(table.c.id).where(table.c.request_id == stored, table.c.org_id == org)
    return int((await connection.execute(found)).scalar_one())


_RESTORED_NOTE = "Restored from a backup."
_checkpoints = AuditCheckpoint.__table__
_LAST_CHECKPOINT = (
    select(_checkpoints.c.origin, _checkpoints.c.size, _checkpoints.c.root_hash)
    .order_by(_checkpoints.c.size.desc())
    .limit(1)
)


async def _end_approvals(connection: AsyncConnection, by: str) -> int:
    """Cancel each approval that could be decided or used, with its unsent notices; return how many these were."""
    requests, notices = ApprovalRequest.__table__, NotificationDelivery.__table__
    approved = requests.c.status == ApprovalStatus.APPROVED
    end = func.coalesce(case((approved, requests.c.use_before)), requests.c.expires_at)
    ended = (
        update(requests)
        .where(or_(approved, requests.c.status == ApprovalStatus.PENDING), end > db_now())
        .values(status=ApprovalStatus.CANCELLED, version=requests.c.version + 1, decision_at=db_now())
        .values(approver_id=storable_key(by), approver_note=_RESTORED_NOTE)
    )
    count = (await connection.execute(ended)).rowcount
    # No id is read: one that was altered would stop it all.
    cancelled = select(requests.c.approval_id).where(
        requests.c.status == ApprovalStatus.CANCELLED, requests.c.approver_note == _RESTORED_NOTE
    )
    unsent = delete(notices).where(notices.c.status == DeliveryStatus.DUE, notices.c.approval_id.in_(cancelled))
    await connection.execute(unsent)
    return count


async def renew_identity(
    engine: AsyncEngine, *, by: str, environment: str, keep_approvals: bool = False
) -> dict[str, str | int | None]:
    """Give the database a new identity, and write an audit event that says so, in one transaction.

    On PostgreSQL, new ids then begin after those that are there, which they do not in a copy without its sequences; and
    it reads the statistics that it plans by, which a dump does not hold (`ANALYZE`).

    Every event that is there becomes history for followers: it is read from the beginning and is never new, whatever
    its transaction id is. Cursors from before are refused. No event is changed.

    Approvals that can still be decided or used are cancelled: after the backup they may have been used, or denied.

    Args:
        engine: A role that may write the tables, as their owner does.
        by: The `caller_id` of the event, and who cancelled the approvals.
        environment: The event's.
        keep_approvals: Cancel none: nothing was decided or used after the backup.

    Returns:
        `old_identity` (None if the row was missing), `new_identity`, `history_id`, the highest id of an event,
        `old_origin`, `old_size` and `old_root_hash` of the last checkpoint of the sealed log (None without one),
        `approvals_cancelled`, and `active_keys`: how many API keys are not revoked.

    Raises:
        StoreUnavailableError: The database does not answer, or the role may not do this.
    """
    new = uuid4().hex
    with translate_errors("be given a new identity"):
        async with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                # Waits for open inserts: one with a lower id that commits later would be history that nobody has read.
                await connection.execute(text(f"LOCK TABLE {table.name} IN SHARE ROW EXCLUSIVE MODE"))
                await advance(connection)
            old = (await connection.execute(IDENTITY)).scalar()
            history_id = (await connection.execute(select(func.coalesce(func.max(table.c.id), 0)))).scalar_one()
            change = insert(identity_table).values(id=1) if old is None else update(identity_table)
            await connection.execute(change.values(identity=new, history_id=history_id))
            last = (await connection.execute(_LAST_CHECKPOINT)).first() or (None, None, None)
            facts = {"old_identity": old, "new_identity": new, "history_id": history_id}
            facts |= dict(zip(("old_origin", "old_size", "old_root_hash"), last, strict=True))
            facts["approvals_cancelled"] = 0 if keep_approvals else await _end_approvals(connection, by)
            active = select(func.count()).where(ApiKey.__table__.c.is_active)
            facts["active_keys"] = (await connection.execute(active)).scalar_one()
            # They are those of the server that it was; its events are history now.
            await connection.execute(update(AuditPrune.__table__).values(last_transaction_id=None))
            why = "An operator said that this database came up from a backup."
            request_id = f"{RESTORED}-{new}"
            await write_door(
                connection, RESTORED, facts, by=by, environment=environment, why=why, request_id=request_id
            )
        if engine.dialect.name == "postgresql":
            # A dump holds no statistics, and without them a plan reads the whole log.
            async with engine.begin() as connection:
                await connection.exec_driver_sql("ANALYZE")
    return facts
