"""Another organisation that has one of everything, for tests of what an outsider learns of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from uuid import UUID

from sqlalchemy import text

from agent_gateway_store import AuditEvent, GatewayStore, IssuedKey
from builders import CALL, make_event, make_request

MARK = "belongs-to-globex"
"""Stands in everything that the other organisation has written."""
TABLES = (
    *("audit_events", "api_keys", "approval_requests", "approval_votes", "notification_deliveries"),
    "audit_dead_letters",
)

SAME_NAMES = {"request_id": "r-1", "caller_id": "dev-agent"}


@dataclass
class Other:
    """What the other organisation holds, as an outsider might have come by it."""

    view: GatewayStore
    event: AuditEvent
    key: IssuedKey
    tokens: dict[str, str] = field(default_factory=dict)
    ids: dict[str, UUID] = field(default_factory=dict)
    cursor: str | None = None
    deliveries: list[UUID] = field(default_factory=list)
    delivery_cursor: str | None = None


async def settle(view: GatewayStore, mark: str) -> Other:
    """Let an organisation write one of everything, with its mark in it and the names that others use, too."""
    event = make_event(**SAME_NAMES, deterministic_rationale=mark, llm_explanation=mark, session_id=mark)
    await view.audit.write(event)
    other = Other(view, event, await view.keys.issue("dev-agent", role=mark))
    for status in ("PENDING", "APPROVED", "DENIED", "USED"):
        request = make_request(request_id=f"r-{status}", risk_explanation=mark, use_before=None)
        token = other.tokens[status] = await view.approvals.issue_token(request)
        if status == "DENIED":
            await view.approvals.deny(token, f"by-{mark}", mark)
        elif status != "PENDING":
            await view.approvals.approve(token, f"by-{mark}", mark)
        if status == "USED":
            await view.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
        other.ids[status] = (await view.approvals.check_token(token)).approval_id
    await view.audit.write(make_event(request_id="r-2", deterministic_rationale=mark))
    other.audit_cursor = (await view.audit.search(limit=1)).next_cursor
    other.changes_cursor = (await view.audit.changes()).next_cursor or ""
    other.cursor = (await view.approvals.list_requests(limit=1)).next_cursor
    return other


async def settle_deliveries(other: Other) -> None:
    """Let its notices arrive; then some are dead letters, and some wait for a notifier that is not here."""
    notifications = other.view.notifications
    while await notifications.list("DUE"):
        await asyncio.sleep(0.01)
    async with other.view.database.write() as connection:
        for status, notifier, event in (("DEAD", "log", "decision"), ("DUE", MARK, "pending")):
            await connection.execute(
                text(
                    "UPDATE notification_deliveries SET status = :status, notifier = :notifier, last_error = :mark "
                    "WHERE org_id = 'globex' AND event = :event AND id % 2 = 0"
                ),
                {"status": status, "notifier": notifier, "event": event, "mark": MARK},
            )
    first = await notifications.list(limit=1)
    other.deliveries, other.delivery_cursor = [row.delivery_id for row in await notifications.list()], first.next_cursor
