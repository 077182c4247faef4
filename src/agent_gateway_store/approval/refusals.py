"""Why a move was refused: the loser of a race learns who won."""

from __future__ import annotations

from uuid import UUID

from agent_gateway_store.errors import (
    ApprovalAlreadyDecidedError,
    ApprovalAlreadyUsedError,
    ApprovalAlreadyVotedError,
    ApprovalError,
    ApprovalExpiredError,
    ApprovalMismatchError,
    ApprovalNotApprovedError,
    ApprovalNotFoundError,
    SelfApprovalError,
)
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalScope
from agent_gateway_store.models.values import ApprovalStatus

__all__ = ["already_voted", "cannot_decide", "cannot_record", "cannot_release", "cannot_use"]


def _standing(kind: type[ApprovalError], text: str, request: ApprovalRequest) -> ApprovalError:
    return kind(
        text,
        approval_id=request.approval_id,
        status=str(request.status),
        approver_id=request.approver_id,
        decided_at=request.decision_at,
    )  # type: ignore[call-arg]  # every kind handed in here takes the standing decision


def _who(request: ApprovalRequest) -> str:
    by = f" by {request.approver_id}" if request.approver_id else ""
    at = f" at {request.decision_at:%Y-%m-%d %H:%M:%S} UTC" if request.decision_at else ""
    return f"{request.status}{by}{at}"


def cannot_decide(request: ApprovalRequest | None, *, approver_id: str, self_refused: bool) -> ApprovalError:
    """Return why this approval cannot be decided (any more)."""
    if request is None:
        return ApprovalNotFoundError()
    if request.status is ApprovalStatus.EXPIRED:
        return _expired(request)
    if request.status is not ApprovalStatus.PENDING:
        return _standing(ApprovalAlreadyDecidedError, f"The approval was already decided: {_who(request)}.", request)
    if self_refused and request.caller_id == approver_id:
        return SelfApprovalError(
            f"{approver_id} asked for this call and may not approve it: let somebody else decide.",
            approval_id=request.approval_id,
        )
    return ApprovalError("The approval changed while it was being decided: try again.", approval_id=request.approval_id)


def already_voted(approval_id: UUID, approver_id: str) -> ApprovalError:
    """Return that an approver speaks once; the approval still stands at PENDING."""
    return ApprovalAlreadyVotedError(
        f"{approver_id} has already voted on this approval: others must decide.",
        approval_id=approval_id,
        status=str(ApprovalStatus.PENDING),
    )


def cannot_use(
    request: ApprovalRequest | None, *, caller_id: str, scope: ApprovalScope, tool_call_hash: str | None
) -> ApprovalError:
    """Return why this approval does not release this call, or its output."""
    if request is None:
        return ApprovalNotFoundError()
    if request.caller_id != caller_id or tool_call_hash not in (None, request.tool_call_hash):
        what = "caller" if request.caller_id != caller_id else "tool call"
        return ApprovalMismatchError(
            f"The approval is for another {what}: ask for an approval of this one.", approval_id=request.approval_id
        )
    if request.scope is not scope:
        return ApprovalMismatchError(
            f"The approval is for the scope {request.scope}, not for {scope}: ask for an approval of this one.",
            approval_id=request.approval_id,
        )
    if request.status is ApprovalStatus.USED:
        when = f" at {request.used_at:%Y-%m-%d %H:%M:%S} UTC" if request.used_at else ""
        return _standing(
            ApprovalAlreadyUsedError, f"The approval has already been used{when}: ask for a new one.", request
        )
    if request.status is ApprovalStatus.EXPIRED:
        return _expired(request)
    return _standing(ApprovalNotApprovedError, f"The approval is not approved: it stands at {_who(request)}.", request)


def cannot_release(approval_id: UUID, why: str) -> ApprovalError:
    """Return that this approval releases no output, and was not used."""
    return ApprovalMismatchError(
        f"The approval {why}, so nothing was released: ask for an approval of the output.", approval_id=approval_id
    )


def cannot_record(request: ApprovalRequest | None) -> ApprovalError:
    """Return why no outcome can be noted."""
    if request is None:
        return ApprovalNotFoundError()
    if request.status is ApprovalStatus.USED:
        return _standing(
            ApprovalAlreadyUsedError, "The approval has already been used and its outcome was recorded.", request
        )
    return _standing(
        ApprovalNotApprovedError, f"Only a used approval has an outcome: it stands at {_who(request)}.", request
    )


def _expired(request: ApprovalRequest) -> ApprovalError:
    deadline = request.use_before if request.approver_id and request.use_before else request.expires_at
    when = f" at {deadline:%Y-%m-%d %H:%M:%S} UTC" if deadline else ""
    return _standing(ApprovalExpiredError, f"The approval has expired{when}: ask for a new one.", request)
