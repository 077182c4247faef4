"""Asks a human to decide about one call, and leads the person behind a client to its page (MCP 2026-07-28)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from uuid import UUID

from fastmcp.exceptions import ToolError
from fastmcp.server.context import Context
from fastmcp.tools import ToolResult
from fastmcp.tools.base import InputRequiredToolResult
from mcp_types import ElicitRequest, ElicitRequestURLParams, InputRequiredResult
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from agent_gateway_store.approval import ApprovalManager
from agent_gateway_store.integrations import guard
from agent_gateway_store.integrations.fastmcp.record import CallRecord
from agent_gateway_store.integrations.guard import CallPendingError, finish, refusal_text
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult
from agent_gateway_store.models.audit import Decision
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import ApprovalStatus, ToolCall

_PAGE = "agent_gateway_store_approval"


def pending_answer(pending: CallPendingError) -> ToolResult:
    """Return what the client receives: an error in words, and the same for programs."""
    facts = {**pending.facts, "next": "call again with the same arguments"}
    return ToolResult(content=str(pending), structured_content=facts, is_error=True)


async def acquire(
    approvals: ApprovalManager,
    record: CallRecord,
    caller: CallerIdentity,
    *,
    required: int,
    bind: str,
    wait_s: float,
    before_use: Callable[[], Awaitable[None]],
) -> None:
    """Acquire an approval of the call; it may run if this returns.

    Args:
        bind: What the tool takes, which may change before the same call comes again.
        before_use: Awaited once it is acquired; raises if another tool would run now than was asked for, or for another
            caller. The approval is spent then.

    Raises:
        CallPendingError: Nobody has decided yet.
        ToolError: It was denied, or the tool or the caller changed.
        ApprovalError: It cannot be asked for.
        StoreUnavailableError: The store cannot answer.
    """
    record.decision = Decision.APPROVAL_REQUIRED
    request = _request(record, caller, required)
    try:
        acquired = await guard.acquire(approvals, request, call=record.call, bind=bind, wait_s=wait_s)
    except CallPendingError as exc:
        record.is_silent = not exc.approval.is_new
        raise
    except asyncio.CancelledError:
        # The approval stays, and who comes back to it leaves no further event.
        record.is_left, record.reason = True, guard.GONE
        raise
    if acquired.status is not ApprovalStatus.USED:
        raise _refusal(record, acquired, wait_s)
    try:
        await before_use()
    except BaseException:
        # A client may go away meanwhile.
        await note_outcome(approvals, record, token=None, approval_id=acquired.approval_id)
        raise
    record.approver_id, record.approval_id = acquired.approver_id, acquired.approval_id


def _request(record: CallRecord, caller: CallerIdentity, required: int) -> ApprovalRequest:
    return ApprovalRequest(
        request_id=record.request_id,
        caller_id=caller.caller_id,
        org_id=caller.org_id,
        tool_call=ToolCall(server=record.call.server, tool=record.call.tool, arguments=record.shown),
        risk_explanation=record.reason,
        required_approvals=required,
    )


async def ask(
    approvals: ApprovalManager,
    record: CallRecord,
    caller: CallerIdentity,
    *,
    required: int,
    timeout_s: float,
    before_use: Callable[[], Awaitable[None]],
) -> str:
    """Ask for an approval of the call, wait for it, use it, and return its token. From then on the call may run.

    If nobody waits for the approval any more, because of the timeout, because the caller went away or because the tool
    changed, it is cancelled.

    Args:
        before_use: Awaited once it is approved; raises if another tool would run now than was asked for, or for another
            caller.

    Raises:
        ToolError: It was denied, cancelled or has expired, or nobody decided in time.
        ApprovalError: It was approved, but does not release this call.
        StoreUnavailableError: The store cannot answer.
    """
    call = record.call
    record.decision = Decision.APPROVAL_REQUIRED
    token = await approvals.issue_token(_request(record, caller, required), call=call)
    is_open = True
    try:
        decided = await approvals.wait_for_decision(token, timeout_s=timeout_s)
        is_open = decided.status in (ApprovalStatus.PENDING, ApprovalStatus.APPROVED)
        if decided.status is not ApprovalStatus.APPROVED:
            raise _refusal(record, decided, timeout_s)
        await before_use()
        used = await approvals.consume_token(token, caller_id=caller.caller_id, tool_call=call)
        is_open = False
    finally:
        if is_open:
            await finish(approvals.cancel(token, caller.caller_id, "Nobody waits for it any more.", channel="fastmcp"))
    record.approver_id, record.approval_id = used.approver_id, used.approval_id
    return token


def _refusal(record: CallRecord, decided: ApprovalResult, timeout_s: float) -> ToolError:
    if decided.status is ApprovalStatus.PENDING:
        return ToolError(
            f"Nobody decided about this call within {timeout_s:g} seconds, so it was not run: call again later."
        )
    if decided.status is not ApprovalStatus.EXPIRED:
        record.decision, record.approver_id = Decision.DENY, decided.approver_id
    return ToolError(refusal_text(decided))


async def note_outcome(
    approvals: ApprovalManager, record: CallRecord, *, token: str | None, approval_id: UUID | None
) -> None:
    """Record how the approved call ended; if that fails, its outcome is shown as unknown.

    The approval is named by its token, if it has one.
    """
    outcome = str(record.execution_status or "NOT_RUN")
    approval_id = approval_id if token is None else None
    await finish(approvals.record_outcome(token, outcome, approval_id=approval_id))


def take_answer(context: Context) -> bool:
    """Return whether the client comes back from `page_request`, and hide from the tool that it does.

    The answer releases nothing: somebody may have opened the page, and the approval is acquired anew.
    """
    answers = context.input_responses
    if answers is None or _PAGE not in answers or context.request_context is None:
        return False
    # No public name of FastMCP leads to the raw request, from which the tool and a proxy read the answers.
    params = context.request_context._srctx.params
    if isinstance(params, MutableMapping):
        params.pop("inputResponses", None)
    return True


def page_request(context: Context, pending: CallPendingError, console_url: str | None) -> ToolResult | None:
    """Return the result that asks the client to open the approval's page; None if it cannot."""
    request = context.request_context
    if console_url is None or request is None or request.protocol_version not in MODERN_PROTOCOL_VERSIONS:
        return None
    capabilities = context.session.client_capabilities
    if capabilities is None or capabilities.elicitation is None or capabilities.elicitation.url is None:
        return None
    url = f"{console_url}/approvals/{pending.approval.approval_id}"
    asked = ElicitRequest(params=ElicitRequestURLParams(message=str(pending), url=url))
    return InputRequiredToolResult(InputRequiredResult(input_requests={_PAGE: asked}))
