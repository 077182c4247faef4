"""Ask for an approval: a new row, or the one that the same pending call already has."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy.exc import IntegrityError

from agent_gateway_store.approval.recording import Outbox, insert_and_tell
from agent_gateway_store.approval.statements import REBIND
from agent_gateway_store.encoding.sanitize import MAX_KEY_BYTES, Scrubber
from agent_gateway_store.errors import ApprovalError, ApprovalMismatchError
from agent_gateway_store.models.approval import ApprovalRequest, hash_tool_call
from agent_gateway_store.models.values import ToolCall
from agent_gateway_store.storage.database import AnyConnection

__all__ = ["Asked", "already_issued", "insert_or_rebind", "issue_values"]

Asked: TypeAlias = tuple[Mapping[str, Any], bool, dict[str, UUID]]
"""The row as it stands; True if it is new; the deliveries kept for this process."""


def issue_values(
    request: ApprovalRequest, *, call: ToolCall | None, org_id: str | None, ttl: timedelta, hash_key: str | None
) -> dict[str, Any]:
    """Return the parameters by which `request` is asked, scrubbed; it begins PENDING whatever it says.

    Raises:
        ApprovalMismatchError: The request names another organisation than the store is bound to.
    """
    scrubber = Scrubber()
    shown = request.tool_call
    return {
        "p_approval_id": request.approval_id,
        "p_token": request.token or secrets.token_urlsafe(32),
        "p_request_id": scrubber.text("request_id", request.request_id, limit=MAX_KEY_BYTES),
        "p_caller_id": scrubber.text("caller_id", request.caller_id, limit=MAX_KEY_BYTES),
        "p_org_id": _organisation(request, org_id),
        "p_tool_call": ToolCall(
            server=scrubber.text("server", shown.server),
            tool=scrubber.text("tool", shown.tool),
            arguments=scrubber.json("arguments", shown.arguments),
        ),
        "p_tool_call_hash": _hash(request, call, hash_key),
        "p_risk_explanation": scrubber.text("risk_explanation", request.risk_explanation),
        "p_expires_at": request.expires_at,
        "p_ttl_s": ttl.total_seconds(),
        "p_use_before": request.use_before,
        "p_scope": request.scope,
        "p_output_payload": scrubber.json("output_payload", request.output_payload),
        "p_output_hash": request.output_hash and scrubber.text("output_hash", request.output_hash),
        "p_required_approvals": request.required_approvals,
    }


def _organisation(request: ApprovalRequest, bound: str | None) -> str:
    own = Scrubber().text("org_id", request.org_id, limit=MAX_KEY_BYTES)
    if bound is None or own == bound:
        return own
    if "org_id" in request.model_fields_set:
        raise ApprovalMismatchError(
            "The approval belongs to another organisation than this store: use `store.for_org` of its own.",
            approval_id=request.approval_id,
        )
    return bound


def _hash(request: ApprovalRequest, call: ToolCall | None, hash_key: str | None) -> str:
    if call is None and request.tool_call_hash is not None:
        return request.tool_call_hash
    return hash_tool_call(call or request.tool_call, key=hash_key)


async def insert_or_rebind(connection: AnyConnection, values: dict[str, Any], outbox: Outbox) -> Asked | None:
    """Insert the row and those of its notice, or give the pending approval of the same call the new token.

    Returns:
        What was asked; None if another approval is in the way, as a rule one of the same call that is overdue and that
        no sweep has met yet.

    Raises:
        ApprovalError: The token belongs to the approval of another call.
    """
    row, mine = await insert_and_tell(connection, values, outbox)
    if row is not None:
        return row, True, mine
    try:
        row = await REBIND.first(connection, values)
    except IntegrityError:
        raise already_issued(values) from None
    return None if row is None else (row, False, {})


def already_issued(values: Mapping[str, Any]) -> ApprovalError:
    """Return what to raise for a request that cannot be asked (again)."""
    approval_id: UUID = values["p_approval_id"]
    return ApprovalError(
        "This request (or its token) was issued before, and its approval is decided or is another call's: "
        "build a new ApprovalRequest.",
        approval_id=approval_id,
    )
