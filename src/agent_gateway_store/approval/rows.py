"""From rows to what callers see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from agent_gateway_store.approval.statements import READ, Key
from agent_gateway_store.approval.transitions import ASIDE
from agent_gateway_store.errors import ApprovalNotFoundError
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult
from agent_gateway_store.storage.database import AnyConnection

__all__ = ["Name", "request_of", "require_text", "result_of", "standing"]


class Name:
    """How a caller names an approval: by token or by id, from an organisation (None: from all)."""

    __slots__ = ("by", "values")

    def __init__(self, token: str | None, approval_id: UUID | None, org_id: str | None) -> None:
        self.by: Key = "id" if token is None else "token"
        self.values = {"p_token": token, "p_approval_id": approval_id, "p_org_id": org_id}


def require_text(token: Any) -> None:
    """Raise ApprovalNotFoundError for what can be no token."""
    if not isinstance(token, str) or not token:
        raise ApprovalNotFoundError


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


async def standing(connection: AnyConnection, name: Name) -> ApprovalRequest | None:
    """Read the approval that `name` names as a reader sees it, or None."""
    row = await READ[name.by].first(connection, name.values)
    return None if row is None else request_of(row)
