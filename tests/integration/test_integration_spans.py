"""The spans that FastMCP and FastAPI have of the store's integrations."""

from __future__ import annotations

from collections.abc import Iterator

import fastmcp
import fastmcp_helpers
import httpx
import pytest
from fastapi import FastAPI
from fastmcp import Client
from fastmcp.exceptions import ToolError
from fastmcp_helpers import Bench
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from agent_gateway_store import GatewayStore, telemetry
from agent_gateway_store.integrations.fastapi import Approver, approvals_router, lifespan
from agent_gateway_store.store import parts_of
from otel import Recorded, recorded

bench = fastmcp_helpers.bench
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
def otel() -> Iterator[Recorded]:
    """The SDK, in memory."""
    with recorded() as found:
        yield found


def trace_of(span: ReadableSpan) -> str:
    """Return the id of its trace."""
    return f"{span.get_span_context().trace_id:032x}"


@pytest.mark.parametrize("mode", ["native", "off"])
async def test_a_tool_call_has_a_span(bench: Bench, otel: Recorded, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the trace of the client, also where FastMCP opens none; what the store does for the call is below it."""
    monkeypatch.setattr(fastmcp.settings, "telemetry_mode", mode)
    telemetry.enable(parts_of(bench.store).figures)
    async with Client(bench.server()) as client:
        await client.call_tool("read_file", {"path": "s3cret.txt"}, meta={"traceparent": PARENT})

    call, write = otel.span("tools/call"), otel.span("audit.write")
    assert call.attributes == {
        "mcp.method.name": "tools/call",
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "read_file",
    }
    assert (await bench.event()).trace_id == trace_of(call) == trace_of(write) == TRACE
    assert write.parent is not None
    assert write.parent.span_id == call.get_span_context().span_id


async def test_a_refused_tool_call_is_an_error(bench: Bench, otel: Recorded) -> None:
    """By its class, without what was given."""
    telemetry.enable(parts_of(bench.store).figures)
    server = bench.server()
    with pytest.raises(ToolError):
        await bench.call(server, "no_such_tool", password="s3cret")

    call = otel.span("tools/call")
    assert call.status.status_code is StatusCode.ERROR
    assert "s3cret" not in call.to_json()


async def test_a_route_has_a_span(otel: Recorded) -> None:
    """Named by its template, in the trace of the client."""
    store = GatewayStore("sqlite://", redis_url="")
    app = FastAPI(lifespan=lifespan(store))
    app.include_router(approvals_router(lambda: Approver(approver_id="alice", org_id="default")))
    async with app.router.lifespan_context(app):
        telemetry.enable(parts_of(store).figures)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            path = "/approvals/00000000-0000-4000-8000-000000000000"
            response = await client.get(path, headers={"traceparent": PARENT})

    (span,) = otel.spans
    assert response.status_code == 404
    assert span.attributes is not None
    assert (span.name, span.attributes["http.route"]) == ("GET /approvals/{approval_id}", "/approvals/{approval_id}")
    assert trace_of(span) == TRACE
