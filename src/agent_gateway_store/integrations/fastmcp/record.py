"""One tool call from where it comes from to its audit event, and what the host's callbacks decide about it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from fastmcp.server.context import Context as RequestContext
from fastmcp.server.dependencies import get_http_headers
from fastmcp.server.middleware import MiddlewareContext
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from agent_gateway_store.clock import utc_now
from agent_gateway_store.integrations.fastmcp.resolution import INPUT_RESPONSES, REQUEST_STATE
from agent_gateway_store.integrations.guard import Verdict
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import ToolCall
from agent_gateway_store.store import GatewayStore
from agent_gateway_store.telemetry import current_trace_id, needs_parent, span

_UNKNOWN = "unknown"

Identify = Callable[[MiddlewareContext[Any]], CallerIdentity | Awaitable[CallerIdentity]]
Sanitize = Callable[[ToolCall], Mapping[str, Any] | Awaitable[Mapping[str, Any]]]
NameServer = Callable[[MiddlewareContext[Any]], str | Awaitable[str]]
_TRACEPARENT = "traceparent"
_w3c = TraceContextTextMapPropagator()


@dataclass
class CallRecord:
    """What is known of one call so far. It starts as a refusal; only the last step before the tool changes that.

    Attributes:
        call: The call as it will run; the store receives only its hash.
        shown: Its arguments as the host's sanitiser shows them.
        decision: What the policy decided, or DENY where the call was refused after that.
        approver_id: Who released the call, where a human was asked; with DENY: who refused it.
        approval_id: The approval that released the call.
        was_run: Whether the tool was called, however it ended.
        is_left: Whether the caller went away while a human decides, who still may.
        is_silent: Whether the event of another call says all that there is to say of this one.
    """

    call: ToolCall
    origin: Origin
    request_id: str = field(default_factory=lambda: uuid4().hex)
    started: float = field(default_factory=time.perf_counter)
    timestamp: datetime = field(default_factory=utc_now)
    caller: CallerIdentity | None = None
    verdict: Verdict | None = None
    shown: dict[str, Any] = field(default_factory=dict)
    decision: Decision = Decision.DENY
    rule: str = ""
    reason: str = ""
    approver_id: str | None = None
    approval_id: UUID | None = None
    was_run: bool = False
    is_left: bool = False
    is_silent: bool = False
    execution_status: ExecutionStatus | None = None
    output_hash: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it neither carries what a client answered to the tool nor is made by another call's tool."""
        return self.origin.outer is None and not {INPUT_RESPONSES, REQUEST_STATE} & self.call.arguments.keys()

    def refused(self, word: str, reason: str) -> None:
        """Note that the gateway does not run the call, and why; `word` names the rule if the policy has not decided."""
        self.decision, self.was_run = Decision.DENY, False
        self.approver_id = self.approval_id = None
        self.explain(word, reason)

    def explain(self, word: str, reason: str) -> None:
        """Note why the call does not run, whoever decided that."""
        self.rule, self.reason = self.rule or f"gateway.{word}", reason

    def event(self, store: GatewayStore) -> AuditEvent:
        """Return the event of what is known now. Its latency includes the wait for a human."""
        caller, verdict = self.caller, self.verdict
        org_id = caller.org_id if caller else store.org_id or "default"
        outer = self.origin.outer
        return AuditEvent(
            request_id=self.request_id,
            org_id=org_id,
            trace_id=self.origin.trace_id,
            session_id=self.origin.session_id,
            # An id of another organisation stays there.
            parent_request_id=outer.request_id if outer is not None and outer.org_id == org_id else None,
            timestamp=self.timestamp,
            caller_id=caller.caller_id if caller else _UNKNOWN,
            caller_role=caller.role if caller else _UNKNOWN,
            key_id=caller.key_id if caller else None,
            environment=caller.environment if caller else store.settings.environment,
            mcp_server=self.call.server,
            tool_name=self.call.tool,
            raw_args_hash=store.hash_args(self.call.arguments),
            sanitized_args=self.shown,
            risk_labels=list(verdict.risk_labels) if verdict else [],
            risk_score=verdict.risk_score if verdict else 0.0,
            matched_policy_rule=self.rule,
            policy_version=verdict.policy_version if verdict else None,
            decision=self.decision,
            approver_id=self.approver_id,
            approval_id=self.approval_id,
            execution_status=self.execution_status,
            latency_ms=round((time.perf_counter() - self.started) * 1000),
            output_hash=self.output_hash,
            deterministic_rationale=self.reason,
        )


@dataclass
class RunningCall:
    """A call whose tool runs now.

    Attributes:
        is_running: False afterwards. A task that the tool left behind has a copy of the context, and its calls are not
            part of this one any more.
    """

    request_id: str
    org_id: str
    is_running: bool = True


@dataclass(frozen=True)
class Origin:
    """Where a call comes from; None where that is not known."""

    session_id: str | None = None
    trace_id: str | None = None
    outer: RunningCall | None = None


_outer: ContextVar[RunningCall | None] = ContextVar("agent_gateway_store_fastmcp_outer", default=None)


@contextmanager
def running(request_id: str, org_id: str) -> Iterator[None]:
    """Let the calls that are made meanwhile, from here, name this one as their parent."""
    call = RunningCall(request_id, org_id)
    before = _outer.set(call)
    try:
        yield
    finally:
        call.is_running = False
        _outer.reset(before)


def origin_of(context: MiddlewareContext[Any]) -> Origin:
    """Return where the call in `context` comes from."""
    outer = _outer.get()
    request = context.fastmcp_context
    return Origin(
        session_id=_session_id(request) if request is not None else None,
        trace_id=_trace_id(request),
        outer=outer if outer is not None and outer.is_running else None,
    )


def tool_span(tool: str, context: MiddlewareContext[Any]) -> AbstractContextManager[Any]:
    """Run a call in a span of ours: below that of FastMCP, else below what the client sent."""
    parent = None
    # FastMCP continues the trace of `_meta` in a span of its own, unless its telemetry is off.
    if needs_parent():
        parent = trace.set_span_in_context(trace.NonRecordingSpan(_sent(context.fastmcp_context)))
    return span(
        "tools/call",
        parent=parent,
        mcp__method__name="tools/call",
        gen_ai__operation__name="execute_tool",
        gen_ai__tool__name=tool,
    )


def _session_id(request: RequestContext) -> str | None:
    try:
        return request.session_id
    except RuntimeError:
        # Called in the process, without a client.
        return None


def _trace_id(request: RequestContext | None) -> str | None:
    """Return the trace of the current span, else that of the request's `_meta`, else that of its HTTP headers."""
    if (current := current_trace_id()) is not None:
        return current
    sent = _sent(request)
    return trace.format_trace_id(sent.trace_id) if sent.is_valid else None


def _sent(request: RequestContext | None) -> trace.SpanContext:
    """Return the span that the request's `_meta` names, else that of its HTTP headers; it may not be valid."""
    call = request.request_context if request is not None else None
    sent = _remote(call.meta if call is not None else None)
    return sent if sent.is_valid else _remote(get_http_headers())


def _remote(carrier: Mapping[str, Any] | None) -> trace.SpanContext:
    parent = (carrier or {}).get(_TRACEPARENT)
    headers = {_TRACEPARENT: parent} if isinstance(parent, str) else {}
    # Into an empty context, so that what is current here does not answer for what was sent.
    return trace.get_current_span(_w3c.extract(headers, Context())).get_span_context()
