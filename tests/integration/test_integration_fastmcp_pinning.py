"""The FastMCP middleware, where the tool or the call changes after it was judged: what was judged runs, or nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import fastmcp_helpers
import pytest
from fastmcp import Client, Context, FastMCP
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.server.middleware.error_handling import RetryMiddleware
from fastmcp.tools import Tool, ToolResult
from fastmcp.tools.tool_transform import ArgTransform
from fastmcp.utilities.versions import VersionSpec
from fastmcp_helpers import Bench, judge
from mcp_types import CallToolRequestParams

from agent_gateway_store import CallerIdentity, ToolCall
from agent_gateway_store.integrations.fastmcp import Verdict

bench = fastmcp_helpers.bench


@pytest.mark.parametrize("mounted", [False, True])
async def test_tool_replaced_while_the_call_waits_does_not_run(bench: Bench, mounted: bool) -> None:
    """Neither the old code nor the new."""
    server = child = bench.server()
    if mounted:
        server = FastMCP("front", middleware=list(child.middleware))
        child.middleware.clear()
        server.mount(child, namespace="x")
    waiting = asyncio.create_task(bench.refusal(server, "x_delete_file" if mounted else "delete_file", path="a"))
    asked = await bench.pending()
    child.local_provider.remove_tool("delete_file")

    def other(path: str, password: str = "") -> bool:
        bench.ran.append("other")
        return True

    child.add_tool(Tool.from_function(other, name="delete_file"))
    await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
    refusal = await waiting

    assert refusal == "The tool changed while the call waited, so it was not run: call again."
    assert bench.ran == []


async def test_fixed_argument_that_changes_while_the_call_waits_does_not_run(bench: Bench) -> None:
    """FastMCP hands the object of an alias to the tool, which another call may have edit it."""

    def policy(caller: CallerIdentity, call: ToolCall) -> Verdict:
        return judge(caller, call.model_copy(update={"tool": call.arguments["kind"]}))

    server = bench.server(policy, on_pending="return", approval_wait_s=30)

    def transfer(kind: str, most: dict[str, Any]) -> None:
        bench.ran.append(f"{kind} {most}")
        most["of"]["euro"] = 10**6

    fixed = {"most": ArgTransform(hide=True, default={"of": {"euro": 5}})}
    server.add_tool(Tool.from_tool(Tool.from_function(transfer), name="small", transform_args=fixed))
    waiting = asyncio.create_task(bench.refusal(server, "small", kind="delete_it"))
    asked = await bench.pending()
    await bench.call(server, "small", kind="read")
    await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")

    assert await waiting == "The tool changed while the call waited, so it was not run: call again."
    assert bench.ran == ["read {'of': {'euro': 5}}"]


@pytest.mark.parametrize("mounts", [0, 2])
async def test_tool_replaced_in_the_last_moment_does_not_run(bench: Bench, mounts: int) -> None:
    """After the last look, and before FastMCP's own: the object that was judged runs, also behind mounts."""
    server, top, name = _mounted(bench, mounts)

    class Replacing(Middleware):
        async def on_call_tool(
            self, context: MiddlewareContext[CallToolRequestParams], call_next: CallNext[Any, ToolResult]
        ) -> ToolResult:
            server.local_provider.remove_tool("read_file")
            server.add_tool(Tool.from_function(lambda path: bench.ran.append("other"), name="read_file"))
            return await call_next(context)

    server.add_middleware(Replacing())
    await bench.call(top, name, path="a.txt")

    assert bench.ran == ["a.txt"]


async def test_tool_replaced_behind_a_mount_is_found_by_the_next_call(bench: Bench) -> None:
    """What is pinned is pinned for one call; what the server lists is its own."""
    child, top, name = _mounted(bench, 1)
    await bench.call(top, name, path="a.txt")
    child.local_provider.remove_tool("read_file")
    child.add_tool(Tool.from_function(lambda path: bench.ran.append("other"), name="read_file"))
    before = len(child.middleware)
    await bench.call(top, name, path="a.txt")
    async with Client(child) as client:
        listed = [tool.name for tool in await client.list_tools()]

    assert bench.ran == ["a.txt", "other"]
    assert (len(child.middleware), listed.count("read_file")) == (before, 1)


async def test_call_that_a_mounted_tool_makes_finds_what_it_asks_for(bench: Bench) -> None:
    """The pinned version of the tool does not stand in for another version of it."""
    child, top, name = _mounted(bench, 1)

    async def second(ctx: Context) -> str:
        await ctx.fastmcp.call_tool("read_log", {}, version=VersionSpec(eq="1"))
        bench.ran.append("2")
        return "done"

    child.add_tool(Tool.from_function(lambda: bench.ran.append("1"), name="read_log", version="1"))
    child.add_tool(Tool.from_function(second, name="read_log", version="2"))
    await bench.call(top, name.replace("file", "log"))

    assert bench.ran == ["1", "2"]


def _mounted(bench: Bench, mounts: int) -> tuple[FastMCP[Any], FastMCP[Any], str]:
    """Return the server that has the tools, the one that is called, and the name of `read_file` there."""
    server = top = bench.server()
    name = "read_file"
    for number in range(mounts):
        front: FastMCP[Any] = FastMCP(f"front{number}", middleware=list(top.middleware))
        top.middleware.clear()
        front.mount(top, namespace=f"x{number}")
        top, name = front, f"x{number}_{name}"
    return server, top, name


@pytest.mark.parametrize("mounts", [0, 1])
async def test_call_renamed_by_a_middleware_behind_is_not_run(bench: Bench, mounts: int) -> None:
    """What was judged is not what would run, also where a mounted server renames it."""
    server, top, name = _mounted(bench, mounts)

    class Renaming(Middleware):
        async def on_call_tool(
            self, context: MiddlewareContext[CallToolRequestParams], call_next: CallNext[Any, ToolResult]
        ) -> ToolResult:
            message = CallToolRequestParams(name="delete_file", arguments={"path": "a.txt"})
            return await call_next(context.copy(message=message))

    server.add_middleware(Renaming())
    refusal = await bench.refusal(top, name, path="a.txt")
    event = await bench.event()

    assert refusal.startswith("Another middleware changed the call")
    assert (event.decision, event.execution_status, bench.ran) == ("DENY", None, [])


async def test_arguments_changed_while_the_call_waits_do_not_run(bench: Bench) -> None:
    """By a middleware in front, which still holds the message."""
    server = bench.server()
    held: list[CallToolRequestParams] = []

    class Holding(Middleware):
        async def on_call_tool(
            self, context: MiddlewareContext[CallToolRequestParams], call_next: CallNext[Any, ToolResult]
        ) -> ToolResult:
            held.append(context.message)
            return await call_next(context)

    server.middleware.insert(0, Holding())
    waiting = asyncio.create_task(bench.call(server, "delete_file", path="a.txt"))
    asked = await bench.pending()
    assert held[0].arguments is not None
    held[0].arguments["path"] = "other.txt"
    await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
    await waiting

    assert bench.ran == ["a.txt"]


@pytest.mark.parametrize(("tool", "ran"), [("x_delete_log", 1), ("x_read_log", 3)])
async def test_middleware_of_a_mounted_server_repeats_no_approved_call(bench: Bench, tool: str, ran: int) -> None:
    """It stands behind the gateway; what the policy allows, it may repeat as it did before."""
    server, child = bench.server(), FastMCP[Any]("logs")

    async def fail(path: str) -> str:
        bench.ran.append(path)
        raise ConnectionError(path)

    for name in ("delete_log", "read_log"):
        child.add_tool(Tool.from_function(fail, name=name))
    child.add_middleware(RetryMiddleware(max_retries=2, base_delay=0.01))
    server.mount(child, namespace="x")
    calling = asyncio.create_task(bench.refusal(server, tool, path="a"))
    if ran == 1:
        asked = await bench.pending()
        await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
    refusal = await calling

    assert (bench.ran, (await bench.event()).execution_status) == (["a"] * ran, "TOOL_ERROR")
    assert ("not run again" in refusal) == (ran == 1)


async def test_middleware_of_a_mounted_server_calls_another_tool_after_an_approved_call(bench: Bench) -> None:
    """The call has succeeded, and another tool is not the call that was approved."""
    server, child = bench.server(), FastMCP[Any]("logs")

    class Journal(Middleware):
        async def on_call_tool(
            self, context: MiddlewareContext[CallToolRequestParams], call_next: CallNext[Any, ToolResult]
        ) -> ToolResult:
            result = await call_next(context)
            if context.message.name == "delete_log":
                await child.call_tool("write_journal", {"line": "deleted"})
            return result

    async def delete_log(path: str) -> str:
        bench.ran.append(path)
        return "gone"

    async def write_journal(line: str) -> None:
        bench.ran.append(line)

    for tool in (delete_log, write_journal):
        child.add_tool(Tool.from_function(tool))
    child.add_middleware(Journal())
    server.mount(child, namespace="x")
    calling = asyncio.create_task(bench.call(server, "x_delete_log", path="a"))
    asked = await bench.pending()
    await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
    result = await calling

    assert (result.data, bench.ran) == ("gone", ["a", "deleted"])
    assert (await bench.event()).execution_status == "SUCCESS"
