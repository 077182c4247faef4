"""One audit event for each request to call a tool, however it ends."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import uuid4

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute

from agent_gateway_store import AuditEvent, CallerIdentity, Decision, ExecutionStatus, ToolCall
from fastapi_gateway.access import Gateway, gateway_of
from fastapi_gateway.policy import Verdict
from fastapi_gateway.problems import refusal_of
from fastapi_gateway.redaction import redact
from fastapi_gateway.tools import SandboxError, risk_of

__all__ = ["AuditedRoute", "CallRecord", "Record"]

_UNKNOWN = "unknown"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass
class CallRecord:
    """What is known of one request so far. It starts as a refusal; only the last step before the tool changes that.

    Attributes:
        call: The call as it was received; it leaves the gateway only as a hash and as `redact` shows it.
        decision: What the policy decided; APPROVAL_REQUIRED with an `approver_id` is a call that a human released.
        parent_request_id: The request that asked for the approval which this one uses.
    """

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    timestamp: datetime = field(default_factory=lambda: datetime.now(UTC))
    caller: CallerIdentity | None = None
    call: ToolCall | None = None
    session_id: str | None = None
    parent_request_id: str | None = None
    decision: Decision = Decision.DENY
    rule: str = ""
    reason: str = ""
    labels: list[str] = field(default_factory=list)
    approver_id: str | None = None
    execution_status: ExecutionStatus | None = None
    output_hash: str | None = None

    def judged(self, verdict: Verdict) -> None:
        """Note which rule spoke and why."""
        self.rule, self.reason = verdict.rule, verdict.reason

    def failed(self, exc: Exception) -> None:
        """Note why the request was refused, unless the tool has run: then the decision stays."""
        if isinstance(exc, SandboxError):
            self.labels.append("PATH_TRAVERSAL")
        if self.execution_status is None:
            refusal = refusal_of(exc)
            self.decision, self.reason = Decision.DENY, refusal.detail
            self.rule = self.rule or f"gateway.{refusal.error}"

    def event(self, gateway: Gateway) -> AuditEvent:
        """Return the event of what is known now."""
        call = self.call or ToolCall(server=_UNKNOWN, tool=_UNKNOWN)
        risk, labels = risk_of(call) if self.call else (0.0, ())
        arguments, flags = redact(call.arguments)
        caller = self.caller
        return AuditEvent(
            request_id=self.request_id,
            org_id=caller.org_id if caller else "default",
            session_id=self.session_id,
            parent_request_id=self.parent_request_id,
            timestamp=self.timestamp,
            caller_id=caller.caller_id if caller else _UNKNOWN,
            caller_role=caller.role if caller else _UNKNOWN,
            key_id=caller.key_id if caller else None,
            environment=caller.environment if caller else gateway.store.settings.environment,
            mcp_server=call.server,
            tool_name=call.tool,
            raw_args_hash=AuditEvent.hash_args(call.arguments),
            sanitized_args=arguments,
            risk_labels=[*labels, *self.labels],
            risk_score=risk,
            matched_policy_rule=self.rule,
            policy_version=gateway.policy.label,
            decision=self.decision,
            approver_id=self.approver_id,
            execution_status=self.execution_status,
            latency_ms=round((time.perf_counter() - self.started) * 1000),
            output_hash=self.output_hash,
            redaction_flags=flags,
            deterministic_rationale=self.reason,
        )


class AuditedRoute(APIRoute):
    """A route whose answer is released only after its event was written, once, whatever came of it.

    With AUDIT_MODE=strict an event that cannot be written raises, and the caller gets 503 in place of the result.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler that FastAPI builds: authentication, parsing and the endpoint itself."""
        handle = super().get_route_handler()

        async def audited(request: Request) -> Response:
            gateway = gateway_of(request)
            record = request.state.call = CallRecord(_request_id(request))
            try:
                response = await handle(request)
            except Exception as exc:
                record.failed(exc)
                raise
            finally:
                await gateway.store.audit.write(record.event(gateway))
            response.headers["X-Request-Id"] = record.request_id
            return response

        return audited


def _request_id(request: Request) -> str:
    """The client's X-Request-Id, if it is a short plain word; else a fresh one."""
    given = request.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex


def _record(request: Request) -> CallRecord:
    record: CallRecord = request.state.call
    return record


Record = Annotated[CallRecord, Depends(_record)]
