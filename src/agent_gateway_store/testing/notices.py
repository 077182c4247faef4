"""Notices to test with."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal
from uuid import uuid4

from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.values import ApprovalStatus, Notice, ToolCall

__all__ = ["make_notice"]


def make_notice(event: Literal["pending", "decision"] = "pending", **fields: Any) -> Notice:
    """Return a notice as the store makes them, of a fresh approval unless `approval_id` is given.

    Args:
        event: `pending`: somebody must decide; `decision`: approver-1 has approved.
        fields: Fields of `Notice` to set.
    """
    now = utc_now()
    given: dict[str, Any] = {
        "event": event,
        "delivery_id": uuid4(),
        "approval_id": uuid4(),
        "org_id": "default",
        "request_id": uuid4().hex,
        "caller_id": "dev-agent",
        "tool_call": ToolCall(server="files", tool="delete_file", arguments={"path": "reports/old.txt"}),
        "risk_explanation": "It deletes a file.",
        "created_at": now,
        "expires_at": now + timedelta(hours=1),
        "status": ApprovalStatus.PENDING,
    }
    if event == "decision":
        given |= {"status": ApprovalStatus.APPROVED, "approver_id": "approver-1", "note": "fine", "decided_at": now}
    return Notice(**(given | fields))
