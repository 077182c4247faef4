"""The approvals over HTTP, for approvers. No response holds a token or a hash."""

# Without postponed annotations: FastAPI must see the dependency that `approvals_router` receives.
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field

from agent_gateway_store.integrations.fastapi.dependencies import StoreDep
from agent_gateway_store.integrations.fastapi.exception_handlers import StoreRoute, http_errors
from agent_gateway_store.models.approval import ApprovalScope
from agent_gateway_store.models.values import ApprovalStatus, ApproverId, FrozenModel, ToolCall

# A note has at most 2,000 characters, which are 12,000 bytes if all of them are escapes; four times that is plenty.
_MAX_BODY_BYTES = 65_536
_FROM_ATTRIBUTES = ConfigDict(from_attributes=True)


class Approver(FrozenModel):
    """An approver, as the application identifies them.

    Attributes:
        approver_id: As written to the record.
        org_id: The organisation whose approvals they see and decide.
    """

    approver_id: ApproverId
    org_id: str = Field(min_length=1)


class ApprovalView(BaseModel):
    """One approval as approvers see it; the fields are those of `ApprovalRequest`."""

    model_config = _FROM_ATTRIBUTES

    approval_id: UUID
    request_id: str
    caller_id: str
    tool_call: ToolCall
    risk_explanation: str
    created_at: datetime
    expires_at: datetime | None
    status: ApprovalStatus
    scope: ApprovalScope
    required_approvals: int
    approver_id: str | None
    decision_at: datetime | None
    approver_note: str
    used_at: datetime | None
    outcome: str | None


class ApprovalPage(BaseModel):
    """Approvals, newest first.

    Attributes:
        next_cursor: Gives the next page; None at the end.
    """

    items: list[ApprovalView]
    next_cursor: str | None


class DecisionBody(BaseModel):
    """The decision of an approver; `reject` and `decline` mean deny."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    decision: Literal["approve", "deny", "reject", "decline"]
    note: str = Field(default="", max_length=2_000)


class DecisionView(BaseModel):
    """An approval after a decision; the fields are those of `ApprovalResult`."""

    model_config = _FROM_ATTRIBUTES

    approval_id: UUID
    status: ApprovalStatus
    approver_id: str | None
    note: str
    decided_at: datetime | None
    expires_at: datetime | None


def approvals_router(
    approver: Callable[..., Approver | Awaitable[Approver]], *, prefix: str = "/approvals"
) -> APIRouter:
    """Return a router by which approvers list, see and decide the approvals of their organisation.

    `GET /approvals?status=PENDING&limit=&cursor=`, `GET /approvals/{approval_id}`, and
    `POST /approvals/{approval_id}/decision` with `{"decision": "approve" | "deny", "note": ""}`. A decision needs a
    JSON body, which no form of another site can send. Errors of the store become responses by `http_exception_of`:
    404 for an unknown approval and for one of another organisation, 409 with the decision that was made before, 410
    after the deadline.

    Args:
        approver: A dependency of the application that returns the approver, or raises an `HTTPException`.
        prefix: Path of the list.
    """
    who_decides = Annotated[Approver, Depends(approver)]
    router = APIRouter(prefix=prefix, tags=["approvals"], route_class=StoreRoute, max_body_size=_MAX_BODY_BYTES)

    @router.get("", response_model=ApprovalPage)
    async def list_approvals(
        store: StoreDep,
        who: who_decides,
        status: ApprovalStatus | None = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 50,
        cursor: str | None = None,
    ) -> dict[str, Any]:
        """List approvals of the approver's organisation, newest first."""
        with http_errors():
            page = await store.for_org(who.org_id).approvals.list_requests(status, limit, cursor)
        return {"items": page, "next_cursor": page.next_cursor}

    @router.get("/{approval_id}", response_model=ApprovalView)
    async def show_approval(store: StoreDep, who: who_decides, approval_id: str) -> Any:
        """Show one approval."""
        with http_errors():
            return await store.for_org(who.org_id).approvals.get(approval_id=approval_id)

    @router.post("/{approval_id}/decision", response_model=DecisionView)
    async def decide_approval(store: StoreDep, who: who_decides, approval_id: str, body: DecisionBody) -> Any:
        """Approve or deny, once."""
        approvals = store.for_org(who.org_id).approvals
        decide = approvals.approve if body.decision == "approve" else approvals.deny
        with http_errors():
            return await decide(approval_id=approval_id, approver_id=who.approver_id, note=body.note)

    return router
