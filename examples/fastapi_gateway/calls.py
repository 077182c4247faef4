"""`POST /v1/tools/call`: policy, approval where it is needed, the tool, its result."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent_gateway_store import (
    ApprovalManager,
    ApprovalRequest,
    AuditEvent,
    CallerIdentity,
    Decision,
    ExecutionStatus,
    ToolCall,
)
from agent_gateway_store.errors import ApprovalNotFoundError, GatewayStoreError
from agent_gateway_store.integrations.fastapi import CallerDep
from fastapi_gateway.access import Parts
from fastapi_gateway.problems import RefusalError
from fastapi_gateway.redaction import redact
from fastapi_gateway.tools import BoundTool, bind
from fastapi_gateway.trail import AuditedRoute, CallRecord, Record

__all__ = ["router"]

_MAX_BODY_BYTES = 2_000_000
_logger = logging.getLogger("fastapi_gateway")

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]


class ToolCallBody(BaseModel):
    """What a caller sends."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    server: Name
    tool: Name
    arguments: dict[str, Any] = Field(default_factory=dict)
    session_id: str | None = Field(default=None, max_length=128)


async def _read_call(request: Request, caller: CallerDep, record: Record) -> ToolCallBody:
    """Read the body, after the key was checked: nothing of a stranger's body is looked at."""
    record.caller = caller
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > _MAX_BODY_BYTES:
            raise RefusalError(413, "too_large", f"The request is larger than {_MAX_BODY_BYTES} bytes.")
    try:
        body = ToolCallBody.model_validate_json(bytes(data))
    except ValidationError as exc:
        raise RequestValidationError([{**error, "loc": ("body", *error["loc"])} for error in exc.errors()]) from None
    record.call = ToolCall(server=body.server, tool=body.tool, arguments=body.arguments)
    record.session_id = body.session_id
    return body


_BODY = {"required": True, "content": {"application/json": {"schema": ToolCallBody.model_json_schema()}}}
router = APIRouter(route_class=AuditedRoute)


@router.post("/v1/tools/call", openapi_extra={"requestBody": _BODY})
async def call_tool(
    gateway: Parts,
    record: Record,
    caller: CallerDep,
    body: Annotated[ToolCallBody, Depends(_read_call)],
    x_approval_token: Annotated[str | None, Header()] = None,
) -> JSONResponse:
    """Run a tool, or say why not (403), or ask a human first (202).

    After the approval, send the same call again with the token in `X-Approval-Token`: it runs once.
    """
    call = ToolCall(server=body.server, tool=body.tool, arguments=body.arguments)
    verdict = gateway.policy.decide(caller.role, call)
    record.judged(verdict)
    if verdict.decision is Decision.DENY:
        raise RefusalError(403, "denied_by_policy", verdict.reason)
    tool = bind(gateway.sandbox, call)
    if verdict.decision is Decision.ALLOW:
        record.decision = Decision.ALLOW
        return _done(record, await _run(tool, record, timeout_s=gateway.tool_timeout_seconds))

    approvals = gateway.store.for_org(caller.org_id).approvals
    if x_approval_token is None:
        return await _ask(approvals, record, caller, call)
    await _use(approvals, record, caller, call, x_approval_token)
    try:
        result = await _run(tool, record, timeout_s=gateway.tool_timeout_seconds)
    finally:
        await _note_outcome(approvals, x_approval_token, record)
    return _done(record, result)


async def _ask(approvals: ApprovalManager, record: CallRecord, caller: CallerIdentity, call: ToolCall) -> JSONResponse:
    arguments, _ = redact(call.arguments)
    token = await approvals.issue_token(
        ApprovalRequest(
            request_id=record.request_id,
            caller_id=caller.caller_id,
            org_id=caller.org_id,
            tool_call=ToolCall(server=call.server, tool=call.tool, arguments=arguments),
            risk_explanation=record.reason,
        ),
        call=call,
    )
    # The store sets the deadline, and a repeated request joins the approval that is pending already.
    asked = await approvals.check_token(token)
    record.decision = Decision.APPROVAL_REQUIRED
    return JSONResponse(
        {
            "status": "approval_required",
            "request_id": record.request_id,
            "approval_id": str(asked.approval_id),
            "token": token,
            "expires_at": asked.expires_at.isoformat() if asked.expires_at else None,
            "reason": record.reason,
        },
        status_code=202,
    )


async def _use(
    approvals: ApprovalManager, record: CallRecord, caller: CallerIdentity, call: ToolCall, token: str
) -> None:
    """Use the approval up, or raise why it does not release this call."""
    try:
        standing = await approvals.check_token(token, fresh=True)
        record.parent_request_id = (await approvals.get(approval_id=standing.approval_id)).request_id
        used = await approvals.consume_token(token, caller_id=caller.caller_id, tool_call=call)
    except ApprovalNotFoundError as exc:
        raise RefusalError(403, "approval_not_found", str(exc)) from exc
    record.decision, record.approver_id = Decision.APPROVAL_REQUIRED, used.approver_id


async def _run(tool: BoundTool, record: CallRecord, *, timeout_s: float) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            result = await asyncio.to_thread(tool.run)
    except TimeoutError:
        # The thread cannot be stopped; what it still does is not known, and the event says TIMEOUT.
        record.execution_status = ExecutionStatus.TIMEOUT
        raise RefusalError(504, "tool_timeout", f"The tool did not end within {timeout_s:g} seconds.") from None
    except asyncio.CancelledError:
        record.execution_status = ExecutionStatus.CANCELLED
        raise
    except BaseException:
        record.execution_status = ExecutionStatus.TOOL_ERROR
        raise
    record.execution_status = ExecutionStatus.SUCCESS
    record.output_hash = AuditEvent.hash_args({"result": result})
    return result


async def _note_outcome(approvals: ApprovalManager, token: str, record: CallRecord) -> None:
    try:
        await approvals.record_outcome(token, str(record.execution_status))
    except GatewayStoreError as exc:
        # The tool has run; a used approval without an outcome reads as "unknown", which is the truth.
        _logger.warning("The outcome of request %s was not recorded: %s", record.request_id, exc)


def _done(record: CallRecord, result: Any) -> JSONResponse:
    return JSONResponse({"status": "success", "request_id": record.request_id, "result": result})
