"""The FastMCP middleware over HTTP, where the caller has a key, and over stdio in a process of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import fastmcp_helpers
import pytest
from fastmcp import Client, FastMCP
from fastmcp.client.transports import StdioTransport, StreamableHttpTransport
from fastmcp.exceptions import ToolError
from fastmcp.server import create_proxy
from fastmcp.tools import Tool
from fastmcp_helpers import Bench, serving

from agent_gateway_store import CallerIdentity, Decision, GatewayStore, ToolCall
from agent_gateway_store.integrations.fastmcp import Verdict
from forks import forks

bench = fastmcp_helpers.bench
SERVER = Path(__file__).with_name("fastmcp_server.py")


async def test_key_of_the_http_request_names_the_caller(bench: Bench) -> None:
    """Either header will do; the event names the organisation and the public id of the key."""
    issued = await bench.store.keys.issue("web-agent", role="developer", org_id="acme")
    key = issued.plaintext.get_secret_value()

    async with serving(bench.server(identify=None)) as url:
        for headers in ({"Authorization": f"Bearer {key}"}, {"X-API-Key": key}):
            async with Client(StreamableHttpTransport(url, headers=headers)) as client:
                await client.call_tool("read_file", {"path": "a.txt"})
    events = await bench.store.audit.list_recent()

    assert [(event.caller_id, event.org_id, event.key_id) for event in events] == [
        ("web-agent", "acme", issued.api_key.key_id)
    ] * 2
    assert bench.ran == ["a.txt"] * 2


async def test_bad_keys_run_nothing(bench: Bench) -> None:
    """No key, garbage, a revoked one, two at once: one answer, one event each, under `unknown`."""
    issued = await bench.store.keys.issue("gone", role="developer")
    await bench.store.keys.revoke("gone")
    good = (await bench.store.keys.issue("web-agent", role="developer")).plaintext.get_secret_value()
    gone = issued.plaintext.get_secret_value()
    both = {"Authorization": f"Bearer {good}", "X-API-Key": good}
    given: list[dict[str, str]] = [{}, {"X-API-Key": "x"}, {"Authorization": f"Bearer {gone}"}, both]

    refusals = []
    async with serving(bench.server(identify=None)) as url:
        for headers in given:
            async with Client(StreamableHttpTransport(url, headers=headers)) as client:
                with pytest.raises(ToolError) as refused:
                    await client.call_tool("read_file", {"path": "a.txt"})
                refusals.append(str(refused.value))
    refusals.append(await bench.refusal(bench.server(identify=None), "read_file", path="a.txt"))  # without HTTP
    events = await bench.store.audit.list_recent()

    assert set(refusals) == {"Invalid API key: ask the operator for a new one."}
    assert bench.ran == []
    assert [(event.caller_id, event.decision, event.matched_policy_rule) for event in events] == [
        ("unknown", "DENY", "gateway.invalid_api_key")
    ] * 5


@pytest.mark.parametrize(("mode", "end"), [("legacy", "timeout"), ("auto", "cancelled")])
async def test_call_that_an_http_client_gives_up_is_cancelled(bench: Bench, mode: Any, end: str) -> None:
    """By a message of the client, or as its own time limit passes; on connections with and without a handshake."""
    server, begun = bench.server(), asyncio.Event()

    async def read_forever() -> None:
        begun.set()
        await asyncio.Event().wait()

    server.add_tool(Tool.from_function(read_forever))
    async with serving(server) as url, Client(url, mode=mode) as client:
        timeout = 1 if end == "timeout" else None
        waiting = asyncio.create_task(client.call_tool("read_forever", {}, timeout=timeout))
        await begun.wait()
        if end == "cancelled":
            waiting.cancel()
        await asyncio.wait([waiting])
        event = await bench.first_event()

    assert waiting.cancelled() or waiting.exception() is not None
    assert (event.decision, event.execution_status) == ("ALLOW", "CANCELLED")


@asynccontextmanager
async def over_stdio(url: str, folder: Path) -> AsyncIterator[tuple[Bench, Client[Any]]]:
    """A store here, and the client of a server that is a process of its own on the same database."""
    async with GatewayStore(url) as store:
        issued = await store.keys.issue("desk-agent", role="developer", org_id="acme")
        environment = {
            "PATH": os.defpath,
            "PYTHONWARNINGS": "error",
            "DATABASE_URL": url,
            "AUDIT_SPOOL_PATH": str(folder / "server-spool.db"),
            "BCRYPT_ROUNDS": "4",
            "HOME": str(folder),
            "AGENT_KEY": issued.plaintext.get_secret_value(),
        }
        loaded = forks(is_large=True)
        loaded.load(["fastmcp", "agent_gateway_store.integrations.fastmcp"])
        python = str(loaded.programs / "python")
        transport = StdioTransport(python, [str(SERVER)], env=environment, cwd=str(folder), keep_alive=False)
        async with Client(transport) as client:
            yield Bench(store), client


@pytest.mark.system
async def test_server_over_stdio_waits_for_an_approver_elsewhere(
    migrated_postgres_database: Callable[[], str], tmp_path: Path
) -> None:
    """The server is a process of its own; the decision is made here, on the same database."""
    async with over_stdio(migrated_postgres_database(), tmp_path) as (bench, client):
        waiting = asyncio.create_task(client.call_tool("delete_file", {"path": "a.txt"}, raise_on_error=False))
        asked = await bench.pending()
        await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
        result = await waiting
        event = await bench.event()
        stored = await bench.store.approvals.get(approval_id=asked.approval_id)

    assert (event.caller_id, event.org_id, event.mcp_server) == ("desk-agent", "acme", "files")
    assert (asked.tool_call.arguments, event.approver_id) == ({"path": "[hidden]"}, "alice")
    assert result.data.startswith("deleted a.txt in ")
    assert result.data != f"deleted a.txt in {os.getpid()}"
    assert (event.decision, event.execution_status, stored.status) == ("APPROVAL_REQUIRED", "SUCCESS", "USED")


async def test_version_passed_on_by_a_proxy_is_judged(bench: Bench) -> None:
    """The proxy lists no versions, and hands the caller's choice to the server behind it."""
    behind: FastMCP[Any] = FastMCP("behind")
    for version in ("1", "2"):

        def look(version: str = version) -> str:
            bench.ran.append(version)
            return version

        behind.add_tool(Tool.from_function(look, name="read_log", version=version))

    def judged(caller: CallerIdentity, call: ToolCall) -> Verdict:
        is_old = call.arguments.get("@version") == "1"
        return Verdict(decision=Decision.DENY if is_old else Decision.ALLOW, rule="age", reason="Out of use.")

    async with serving(behind) as url:
        proxy = create_proxy(url, name="proxy")
        front: FastMCP[Any] = FastMCP("front", middleware=list(bench.server(judged).middleware))
        front.mount(proxy, namespace="x")
        async with serving(front) as front_url, Client(front_url) as client:
            await client.call_tool("x_read_log", {})
            with pytest.raises(ToolError, match="Out of use"):
                await client.call_tool("x_read_log", {}, version="1")
    events = await bench.store.audit.list_recent()

    assert bench.ran == ["2"]
    assert [(event.mcp_server, event.tool_name, event.decision) for event in events] == [
        ("proxy", "read_log", "DENY"),
        ("proxy", "read_log", "ALLOW"),
    ]


@pytest.mark.system
@pytest.mark.parametrize("step", ["waiting", "running"])
async def test_call_that_a_stdio_client_cancels(
    step: str, migrated_postgres_database: Callable[[], str], tmp_path: Path
) -> None:
    """While it waits for a human its approval is withdrawn; while its tool runs it ends as CANCELLED."""
    async with over_stdio(migrated_postgres_database(), tmp_path) as (bench, client):
        call = asyncio.create_task(client.call_tool("wait_forever", {}))
        asked = await bench.pending()
        if step == "running":
            await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
            while not (tmp_path / "began").exists():
                await asyncio.sleep(0.02)
        call.cancel()
        await asyncio.wait([call])
        event = await bench.first_event()
        stored = await bench.store.approvals.get(approval_id=asked.approval_id)
        # The connection goes on.
        assert [tool.name for tool in await client.list_tools()] == ["delete_file", "wait_forever"]

    if step == "running":
        assert (event.execution_status, event.approver_id, stored.status) == ("CANCELLED", "alice", "USED")
    else:
        assert (event.execution_status, event.approver_id, stored.status) == (None, None, "CANCELLED")
