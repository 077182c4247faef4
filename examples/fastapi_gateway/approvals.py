"""How callers follow their approvals, and the audit log; approvers have the router of the store's integration."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query

from agent_gateway_store.integrations.fastapi import CallerStoreDep
from fastapi_gateway.access import Auditor

__all__ = ["router"]

router = APIRouter(prefix="/v1")


@router.get("/approval")
async def follow_approval(
    store: CallerStoreDep, x_approval_token: Annotated[str, Header()], wait: Annotated[float, Query(ge=0, le=30)] = 0
) -> dict[str, Any]:
    """Return the state of an approval, after up to `wait` seconds for a decision."""
    approvals = store.approvals
    token = x_approval_token
    result = await (approvals.wait_for_decision(token, timeout_s=wait) if wait else approvals.check_token(token))
    return result.model_dump(mode="json")


@router.get("/audit")
async def read_audit(
    store: CallerStoreDep, _: Auditor, limit: Annotated[int, Query(ge=1, le=500)] = 50
) -> dict[str, Any]:
    """Return the newest audit events of the reader's organisation."""
    return {"items": (await store.audit.list_recent(limit)).to_dicts()}
