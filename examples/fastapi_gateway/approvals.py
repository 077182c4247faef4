"""The approvals, as callers follow them and approvers decide them; and the audit log."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from agent_gateway_store import ApprovalStatus
from fastapi_gateway.access import Approver, Auditor, Caller, Parts

__all__ = ["router"]

# Without HASH_KEY a hash lets a short secret be guessed, so approvers see none.
_SHOWN = {
    *("approval_id", "request_id", "caller_id", "tool_call", "risk_explanation", "created_at", "expires_at", "status"),
    *("approver_id", "decision_at", "approver_note", "used_at", "outcome"),
}
router = APIRouter(prefix="/v1", max_body_size=65_536)


class DecisionBody(BaseModel):
    """What an approver says; `reject` and `decline` mean deny."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    decision: Literal["approve", "deny", "reject", "decline"]
    note: str = Field(default="", max_length=2_000)


@router.get("/approvals")
async def list_approvals(
    gateway: Parts,
    approver: Approver,
    status: ApprovalStatus | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: str | None = None,
) -> dict[str, Any]:
    """List approvals of the approver's organisation, newest first."""
    page = await gateway.store.for_org(approver.org_id).approvals.list_requests(status, limit, cursor)
    return {
        "items": [request.model_dump(mode="json", include=_SHOWN) for request in page],
        "next_cursor": page.next_cursor,
    }


@router.get("/approvals/{token}")
async def follow_approval(
    gateway: Parts, caller: Caller, token: str, wait: Annotated[float, Query(ge=0, le=30)] = 0
) -> dict[str, Any]:
    """Tell where an approval stands, after up to `wait` seconds for a decision."""
    approvals = gateway.store.for_org(caller.org_id).approvals
    result = await (approvals.wait_for_decision(token, timeout_s=wait) if wait else approvals.check_token(token))
    return result.model_dump(mode="json", exclude={"token"})


@router.post("/approvals/{approval_id}/decision")
async def decide_approval(gateway: Parts, approver: Approver, approval_id: str, body: DecisionBody) -> dict[str, Any]:
    """Approve or deny, as the caller that the key belongs to."""
    approvals = gateway.store.for_org(approver.org_id).approvals
    decide = approvals.approve if body.decision == "approve" else approvals.deny
    result = await decide(approval_id=approval_id, approver_id=approver.caller_id, note=body.note)
    return result.model_dump(mode="json", exclude={"token"})


@router.get("/audit")
async def read_audit(
    gateway: Parts, auditor: Auditor, limit: Annotated[int, Query(ge=1, le=500)] = 50
) -> dict[str, Any]:
    """Return the newest audit events of the reader's organisation."""
    page = await gateway.store.for_org(auditor.org_id).audit.list_recent(limit)
    return {"items": page.to_dicts()}
