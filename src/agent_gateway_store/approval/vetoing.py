"""Let plugins object before a decision is made, while no transaction is open."""

from __future__ import annotations

from typing import Literal, cast

from agent_gateway_store.approval.deciding import Ballot
from agent_gateway_store.approval.rows import Name, standing
from agent_gateway_store.hooks.dispatch import Vetoes
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.models.values import ApprovalStatus, PendingApproval
from agent_gateway_store.storage.database import Transactions

__all__ = ["require_no_veto"]


async def require_no_veto(vetoes: Vetoes | None, transactions: Transactions, name: Name, ballot: Ballot) -> None:
    """Return if no plugin objects to `ballot`. Where no plugin wants to be asked, this reads nothing.

    What is not there, or not pending, is left to the decision itself, which says so.

    Raises:
        DecisionVetoedError: A plugin objects or fails.
    """
    if vetoes is None or not vetoes.is_wanted:
        return
    async with transactions.connection("read") as connection:
        request = await standing(connection, name)
    if request is None or request.status is not ApprovalStatus.PENDING:
        return
    await vetoes.require_none(
        _pending(request),
        decision=cast("Literal['APPROVED', 'DENIED']", ballot.says.value),
        approver_id=ballot.approver_id,
        note=ballot.note,
        channel=ballot.channel,
    )


def _pending(request: ApprovalRequest) -> PendingApproval:
    return PendingApproval(
        approval_id=request.approval_id,
        org_id=request.org_id,
        request_id=request.request_id,
        caller_id=request.caller_id,
        tool_call=request.tool_call,
        risk_explanation=request.risk_explanation,
        scope=request.scope.value,
        required_approvals=request.required_approvals,
        created_at=request.created_at,
        expires_at=request.expires_at,
    )
