"""From rows to what callers see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent_gateway_store.approval.transitions import ASIDE, read
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult
from agent_gateway_store.storage.database import Executor, first_row

__all__ = ["request_of", "result_of", "standing"]


def request_of(row: Mapping[str, Any]) -> ApprovalRequest:
    """Return the approval of a row, detached and without its token."""
    return ApprovalRequest.from_row({name: value for name, value in row.items() if name not in ASIDE})


def result_of(request: ApprovalRequest, token: str | None) -> ApprovalResult:
    """Return where `request` stands, with the token that the caller gave, if any."""
    return ApprovalResult(
        approval_id=request.approval_id,
        token=token,
        status=request.status,
        scope=request.scope,
        approver_id=request.approver_id,
        note=request.approver_note,
        decided_at=request.decision_at,
        expires_at=request.expires_at,
    )


async def standing(executor: Executor, key: Any) -> ApprovalRequest | None:
    """Read the approval that `key` names as a reader sees it, or None."""
    row = await first_row(executor, read(key))
    return None if row is None else request_of(row)
