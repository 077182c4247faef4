"""Where a tool call comes from: its session, its trace, and the call whose tool made it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastmcp.server.context import Context as RequestContext
from fastmcp.server.dependencies import get_http_headers
from fastmcp.server.middleware import MiddlewareContext
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from agent_gateway_store.telemetry import current_trace_id, needs_parent, span

_TRACEPARENT = "traceparent"
_w3c = TraceContextTextMapPropagator()


@dataclass
class RunningCall:
    """A call whose tool runs now; a task that it left behind has a copy of the context, but is no part of it later."""

    request_id: str
    org_id: str
    is_running: bool = True


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


def outer_call() -> RunningCall | None:
    """Return the call whose tool makes this one; None if it comes from elsewhere."""
    outer = _outer.get()
    return outer if outer is not None and outer.is_running else None


def origin_fields(context: MiddlewareContext[Any]) -> dict[str, str | None]:
    """Return the fields of the event that say where the call in `context` comes from; None where that is not known."""
    request = context.fastmcp_context
    return {"session_id": _session_id(request) if request is not None else None, "trace_id": _trace_id(request)}


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
