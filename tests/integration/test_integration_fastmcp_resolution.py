"""What the FastMCP middleware judges, shows and records is what runs: versions, mounts, aliases, answers, tasks."""

from __future__ import annotations

import asyncio
from typing import Any

import fastmcp_helpers
import pytest
from fastmcp import Client, Context, FastMCP, FastMCPApp
from fastmcp.exceptions import ToolError
from fastmcp.server.providers import LocalProvider
from fastmcp.server.providers.addressing import hashed_backend_name
from fastmcp.server.transforms import Namespace, ToolTransform
from fastmcp.server.transforms.search import RegexSearchTransform
from fastmcp.tools import Tool
from fastmcp.tools.tool_transform import ArgTransform, ToolTransformConfig
from fastmcp_helpers import SECRET, Bench, denies_old, judge, serving, versioned
from mcp_types import ElicitRequest, ElicitRequestFormParams, ElicitResult, InputRequiredResult

from agent_gateway_store import AuditEvent, CallerIdentity, ToolCall
from agent_gateway_store.integrations.fastmcp import Verdict

bench = fastmcp_helpers.bench


async def test_version_that_the_caller_chooses_is_judged(bench: Bench) -> None:
    """A policy that denies version 1 denies it however it is asked for."""
    server = bench.server(denies_old)
    versioned(bench, server)
    async with serving(server) as url, Client(url) as client:
        await client.call_tool("read_log", {"path": "a"})
        with pytest.raises(ToolError, match="Unknown tool"):
            await client.call_tool("read_log", {"path": "a"}, version="7")
        for version in ("1", "v1", "1.0"):
            with pytest.raises(ToolError, match="Version 1 is out of use"):
                await client.call_tool("read_log", {"path": "a"}, version=version)
    *denied, unknown, allowed = await bench.store.audit.list_recent()

    assert bench.ran == ["2 a"]
    assert [event.decision for event in denied] == ["DENY"] * 3
    assert (unknown.decision, unknown.matched_policy_rule) == ("DENY", "gateway.unknown_tool")
    assert allowed.raw_args_hash == AuditEvent.hash_args({"path": "a", "@version": "2"})
    assert allowed.sanitized_args == {"path": "[hidden]", "@version": "2"}


async def test_approvers_see_the_version_that_runs(bench: Bench) -> None:
    """Also where the host's sanitiser drops what it does not know."""
    server = bench.server(sanitize=lambda call: {"path": call.arguments["path"]})
    versioned(bench, server, "delete_log")
    async with Client(server) as client:
        waiting = asyncio.create_task(client.call_tool("delete_log", {"path": "a"}, version="1"))
        asked = await bench.pending()
        await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
        await waiting

    assert asked.tool_call.arguments == {"path": "a", "@version": "1"}
    assert bench.ran == ["1 a"]


async def test_argument_that_looks_like_a_version_is_refused(bench: Bench) -> None:
    """So no plain call has the hash of a call with a version or with answers."""
    for name in ("@version", "@input_responses", "@request_state"):
        refusal = await bench.refusal(bench.server(), "read_file", path="a.txt", **{name: "1"})
        assert refusal.endswith("belong to the gateway: call without them.")
    events = await bench.store.audit.list_recent()
    assert ([(event.decision, event.execution_status) for event in events], bench.ran) == ([("DENY", None)] * 3, [])


async def test_mounted_tool_is_judged_by_its_own_server_and_name(bench: Bench) -> None:
    """A namespace does not hide a tool from the policy."""
    server: FastMCP[Any] = FastMCP("front", middleware=list(bench.server().middleware))
    child = bench.server()
    child.middleware.clear()
    middle: FastMCP[Any] = FastMCP("middle")
    middle.mount(child, namespace="in")
    server.mount(middle, namespace="out", tool_names={"in_format_disk": "tidy_up"})
    async with Client(server) as client:
        for name in ("tidy_up", "out_tidy_up", "out_in_format_disk"):
            with pytest.raises(ToolError):
                await client.call_tool(name, {})
        await client.call_tool("out_in_read_file", {"path": "a.txt"})
    read, *denied = await bench.store.audit.list_recent()

    assert bench.ran == ["a.txt"]
    assert {(event.mcp_server, event.tool_name) for event in denied} >= {("files", "format_disk")}
    assert (read.mcp_server, read.tool_name) == ("files", "read_file")
    assert read.raw_args_hash == AuditEvent.hash_args({"path": "a.txt"})


async def test_name_given_to_the_server_is_not_given_to_what_is_mounted(bench: Bench) -> None:
    """`server=` names the server that was called; a mounted one keeps its own name."""
    server = bench.server(server="gateway")
    child: FastMCP[Any] = FastMCP("logs")
    versioned(bench, child)
    server.mount(child)
    await bench.call(server, "read_file", path="a")
    await bench.call(server, "read_log", path="a")
    log, file = await bench.store.audit.list_recent()

    assert [(event.mcp_server, event.tool_name) for event in (file, log)] == [
        ("gateway", "read_file"),
        ("logs", "read_log"),
    ]
    assert log.raw_args_hash == AuditEvent.hash_args({"path": "a", "@version": "2"})


async def test_two_mounted_servers_of_one_name_are_refused(bench: Bench) -> None:
    """An approval for a tool of the one would be an approval for the other's."""
    server = bench.server()
    for namespace in ("a", "b"):
        child: FastMCP[Any] = FastMCP("logs")
        versioned(bench, child)
        server.mount(child, namespace=namespace)
    refusal = await bench.refusal(server, "a_read_log", path="a")
    event = await bench.event()

    assert refusal.startswith("Two servers behind this one have the same name")
    assert (event.decision, bench.ran) == ("DENY", [])


async def test_hashed_alias_is_judged_by_the_name_of_the_tool(bench: Bench) -> None:
    """Also where the app is mounted."""
    app: FastMCPApp = FastMCPApp("desk")

    @app.tool(name="format_disk", model=True)
    def wipe() -> str:
        bench.ran.append("disk")
        return "done"

    child: FastMCP[Any] = FastMCP("apps", providers=[app])
    server: FastMCP[Any] = FastMCP("front", middleware=list(bench.server().middleware))
    server.mount(child, namespace="x")
    async with Client(server) as client:
        for name in (hashed_backend_name("desk", "format_disk"), "x_format_disk"):
            with pytest.raises(ToolError, match="Disks are out of bounds"):
                await client.call_tool(name, {})
    events = await bench.store.audit.list_recent()

    assert bench.ran == []
    assert [(event.mcp_server, event.tool_name) for event in events] == [("apps", "format_disk")] * 2


async def test_namespace_of_a_provider_is_no_part_of_the_name(bench: Bench) -> None:
    """One provider under two names, and servers whose own tools are renamed."""
    server = bench.server()
    local = LocalProvider()
    local.add_tool(Tool.from_function(lambda: bench.ran.append("disk"), name="format_disk"))
    other: FastMCP[Any] = FastMCP("front", middleware=list(server.middleware))
    other.add_provider(local, namespace="a")
    other.add_provider(local, namespace="b")
    server.add_transform(Namespace("ns"))
    renamed = bench.server()
    renamed.add_transform(ToolTransform({"format_disk": ToolTransformConfig(name="tidy")}))
    refusals = [
        await bench.refusal(other, "a_format_disk"),
        await bench.refusal(other, "b_format_disk"),
        await bench.refusal(server, "ns_format_disk"),
        await bench.refusal(renamed, "tidy"),
    ]
    events = await bench.store.audit.list_recent()

    assert refusals == ["Disks are out of bounds."] * 4
    assert {event.tool_name for event in events} == {"format_disk"}
    assert bench.ran == []


async def test_two_tools_of_one_name_are_refused(bench: Bench) -> None:
    """Of one server, by two providers under two namespaces: an approval for the one would be one for the other."""
    server = bench.server()
    for namespace in ("a", "b"):
        local = LocalProvider()

        def look(where: str = namespace) -> None:
            bench.ran.append(where)

        local.add_tool(Tool.from_function(look, name="look"))
        server.add_provider(local, namespace=namespace)
    refusal = await bench.refusal(server, "a_look")

    assert refusal.startswith("Two tools of the server have the same name")
    assert bench.ran == []


async def test_transform_is_the_same_call_as_the_tool_below(bench: Bench) -> None:
    """Renamed arguments have their own names, and fixed ones are there."""
    server = bench.server(sanitize=lambda call: dict(call.arguments))
    below = await server.get_tool("delete_file")
    assert below is not None
    change = {"path": ArgTransform(name="target"), "password": ArgTransform(hide=True, default="fixed")}
    server.add_tool(Tool.from_tool(below, name="tidy", transform_args=change))
    waiting = asyncio.create_task(bench.call(server, "tidy", target="a.txt"))
    asked = await bench.pending()
    await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
    await waiting
    refusal = await bench.refusal(server, "tidy", path="a.txt")

    assert asked.tool_call == ToolCall(
        server="files", tool="delete_file", arguments={"path": "a.txt", "password": "fixed"}
    )
    assert bench.ran == ["a.txt"]
    assert refusal.startswith("The tool does not take one of the arguments")


async def test_tool_that_calls_tools_by_name_is_no_way_around(bench: Bench) -> None:
    """What the search transform calls is judged by itself."""
    server = bench.server()
    server.add_transform(RegexSearchTransform())
    async with Client(server) as client:
        with pytest.raises(ToolError, match="Disks are out of bounds"):
            await client.call_tool("call_tool", {"name": "format_disk", "arguments": {}})
        await client.call_tool("call_tool", {"name": "read_file", "arguments": {"path": "a.txt"}})
    events = await bench.store.audit.list_recent()

    assert bench.ran == ["a.txt"]
    assert sorted((event.tool_name, str(event.decision)) for event in events) == [
        ("call_tool", "ALLOW"),
        ("call_tool", "ALLOW"),
        ("format_disk", "DENY"),
        ("read_file", "ALLOW"),
    ]


@pytest.mark.parametrize("is_guarded", [False, True])
async def test_tool_of_a_mounted_server_that_calls_tools_by_name_is_no_way_around(
    bench: Bench, is_guarded: bool
) -> None:
    """It is refused, unless the mounted server has a middleware of its own, which judges what is called."""
    child = bench.server()
    server: FastMCP[Any] = FastMCP("front", middleware=list(child.middleware))
    if not is_guarded:
        child.middleware.clear()
    child.add_transform(RegexSearchTransform())
    server.mount(child, namespace="x")
    refusal = await bench.refusal(server, "x_call_tool", name="format_disk", arguments={})
    await bench.call(server, "x_read_file", path="a.txt")

    assert ("Disks are out of bounds" if is_guarded else "add the gateway's middleware to that server") in refusal
    assert bench.ran == ["a.txt"]


def asking(bench: Bench, server: FastMCP[Any]) -> None:
    """Add a tool that asks its client which file it is to delete."""

    @server.tool
    async def delete_asked(ctx: Context) -> str | InputRequiredResult:
        if not ctx.input_responses:
            schema = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
            request = ElicitRequest(params=ElicitRequestFormParams(message="Which?", requested_schema=schema))
            return InputRequiredResult(input_requests={"which": request}, request_state="round 1")
        answer = ctx.input_responses["which"]
        assert isinstance(answer, ElicitResult)
        assert answer.content is not None
        bench.ran.append(str(answer.content["path"]))
        return "deleted"


async def test_answers_of_the_client_are_judged_and_hashed(bench: Bench) -> None:
    """Each round is a call of its own, and the answer is part of the second; approvers see that there is one."""
    seen: list[dict[str, Any]] = []

    def judged(caller: CallerIdentity, call: ToolCall) -> Verdict:
        seen.append(call.arguments)
        return judge(caller, call)

    server = bench.server(judged, sanitize=lambda _: {})
    asking(bench, server)

    async def answer(*_: Any) -> dict[str, str]:
        return {"path": SECRET}

    async with Client(server, elicitation_handler=answer) as client:
        waiting = asyncio.create_task(client.call_tool("delete_asked", {}))
        asked = []
        for _ in range(2):
            asked.append(await bench.pending())
            await bench.store.approvals.approve(approval_id=asked[-1].approval_id, approver_id="alice")
        await waiting
    second, first = await bench.store.audit.list_recent()
    answered = {
        "@request_state": "round 1",
        "@input_responses": {"which": {"_meta": None, "action": "accept", "content": {"path": SECRET}}},
    }

    assert bench.ran == [SECRET]
    assert [request.tool_call.arguments for request in asked] == [
        {},
        {"@input_responses": "[hidden]", "@request_state": "[hidden]"},
    ]
    assert seen[0] == {}
    assert seen[1] == answered
    assert first.raw_args_hash == AuditEvent.hash_args({})
    assert second.raw_args_hash == AuditEvent.hash_args(answered)
