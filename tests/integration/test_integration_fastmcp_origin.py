"""Where a call through the FastMCP middleware came from: its session, its trace, and the call that made it."""

from __future__ import annotations

import asyncio
from typing import Any

import fastmcp
import fastmcp_helpers
import pytest
from fastmcp import Client, Context, FastMCP
from fastmcp.client.transports import StreamableHttpTransport
from fastmcp.server.middleware import MiddlewareContext
from fastmcp_helpers import CALLER, Bench, serving
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from agent_gateway_store import CallerIdentity

bench = fastmcp_helpers.bench
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
ARGUMENTS = {"path": "a.txt"}


@pytest.mark.parametrize("kind", ["memory", "http"])
async def test_calls_of_one_session_have_its_id(bench: Bench, kind: str) -> None:
    """On a connection with a handshake, which lasts for many calls; another connection is another session."""
    server = bench.server()
    async with serving(server) as url:
        for _ in range(2):
            async with Client(server if kind == "memory" else url, mode="legacy") as client:
                await client.call_tool("read_file", ARGUMENTS)
                await client.call_tool("read_file", ARGUMENTS)
    found = [event.session_id for event in await bench.store.audit.list_recent()]

    assert found[0] == found[1] != found[2] == found[3]
    assert None not in found


@pytest.mark.parametrize(("telemetry", "carrier"), [("native", "meta"), ("off", "meta"), ("off", "header")])
async def test_trace_of_the_request_is_recorded(
    bench: Bench, telemetry: Any, carrier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W3C `traceparent` in `_meta`, or in a header of the HTTP request, with no OpenTelemetry SDK."""
    monkeypatch.setattr(fastmcp.settings, "telemetry_mode", telemetry)
    async with serving(bench.server()) as url:
        headers = {"traceparent": PARENT} if carrier == "header" else {}
        async with Client(StreamableHttpTransport(url, headers=headers)) as client:
            await client.call_tool("read_file", ARGUMENTS, meta={"traceparent": PARENT} if carrier == "meta" else None)

    assert (await bench.event()).trace_id == TRACE


async def test_malformed_trace_is_no_trace(bench: Bench) -> None:
    """The call runs all the same."""
    parents = ["", "x", f"00-{'0' * 32}-00f067aa0ba902b7-01", f"ff-{TRACE}-00f067aa0ba902b7-01", 7, None, ["x"]]
    async with Client(bench.server()) as client:
        for parent in parents:
            await client.call_tool("read_file", ARGUMENTS, meta={"traceparent": parent})
    events = await bench.store.audit.list_recent()

    assert [(event.trace_id, event.execution_status) for event in events] == [(None, "SUCCESS")] * len(parents)


async def test_trace_of_the_current_span_is_recorded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host has an OpenTelemetry SDK; calls made by a tool are in the same trace."""
    provider = TracerProvider()
    tracer = provider.get_tracer("test")
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    server = bench.server()

    @server.tool
    async def read_twice(ctx: Context) -> str:
        await ctx.fastmcp.call_tool("read_file", ARGUMENTS)
        return "done"

    with tracer.start_as_current_span("host") as span:
        expected = trace.format_trace_id(span.get_span_context().trace_id)
        await bench.call(server, "read_twice")
    provider.shutdown()

    assert [event.trace_id for event in await bench.store.audit.list_recent()] == [expected] * 2


@pytest.mark.parametrize("way", ["server", "client"])
async def test_call_made_by_a_tool_names_its_parent(bench: Bench, way: str) -> None:
    """By the server itself, or by a client of its own; the next call of the caller has no parent."""
    server = bench.server()

    @server.tool
    async def read_all(ctx: Context) -> str:
        if way == "server":
            await ctx.fastmcp.call_tool("read_file", ARGUMENTS)
        else:
            await bench.call(ctx.fastmcp, "read_file", **ARGUMENTS)
        return "done"

    async with Client(server) as client:
        await client.call_tool("read_all", {})
        await client.call_tool("read_file", ARGUMENTS)
    last, inner, outer = await bench.store.audit.list_recent()

    assert [event.tool_name for event in (outer, inner, last)] == ["read_all", "read_file", "read_file"]
    assert inner.parent_request_id == outer.request_id
    assert (outer.parent_request_id, last.parent_request_id) == (None, None)


async def test_mounted_server_with_a_middleware_of_its_own_names_the_call_in_front(bench: Bench) -> None:
    """Each middleware leaves its event, and the second is known as a part of the first."""
    child = bench.server()
    server: FastMCP[Any] = FastMCP("front", middleware=list(child.middleware))
    server.mount(child, namespace="x")
    await bench.call(server, "x_read_file", **ARGUMENTS)
    inner, outer = await bench.store.audit.list_recent()

    assert (inner.parent_request_id, outer.parent_request_id) == (outer.request_id, None)
    assert bench.ran == ["a.txt"]


async def test_parent_of_another_organisation_is_not_named(bench: Bench) -> None:
    """An id of one organisation does not turn up in the events of another."""
    organisations = iter(["acme", "other"])

    def identify(_context: MiddlewareContext[Any]) -> CallerIdentity:
        return CALLER.model_copy(update={"org_id": next(organisations)})

    server = bench.server(identify=identify)

    @server.tool
    async def read_all(ctx: Context) -> str:
        await ctx.fastmcp.call_tool("read_file", ARGUMENTS)
        return "done"

    await bench.call(server, "read_all")
    found = {event.org_id: event.parent_request_id for event in await bench.store.audit.list_recent()}

    assert found == {"acme": None, "other": None}


async def test_task_that_a_tool_left_behind_has_no_parent(bench: Bench) -> None:
    """Its calls come after the end of the call that started it."""
    server, ended = bench.server(), asyncio.Event()
    left: list[asyncio.Task[Any]] = []

    @server.tool
    async def read_later(ctx: Context) -> str:
        own = ctx.fastmcp

        async def later() -> None:
            await ended.wait()
            await own.call_tool("read_file", ARGUMENTS)

        left.append(asyncio.create_task(later()))
        return "done"

    await bench.call(server, "read_later")
    ended.set()
    await asyncio.gather(*left)

    assert [event.parent_request_id for event in await bench.store.audit.list_recent()] == [None, None]
