"""The FastMCP middleware, by FastMCP's own client in memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import fastmcp_helpers
import pytest
from fastmcp import Client, Context
from fastmcp.exceptions import ToolError
from fastmcp.server.middleware import MiddlewareContext
from fastmcp.tools import Tool
from fastmcp_helpers import CALLER, SECRET, Bench, judge

from agent_gateway_store import (
    ApprovalStatus,
    AuditEvent,
    CallerIdentity,
    GatewayStore,
    StoreSettings,
    ToolCall,
    errors,
)
from agent_gateway_store.integrations.fastmcp import Verdict

bench = fastmcp_helpers.bench


async def test_allowed_call_runs_and_is_recorded(bench: Bench) -> None:
    """The event says all that is known of the call; of the arguments it has the names and the hash."""
    result = await bench.call(bench.server(), "read_file", path="a.txt", password=SECRET)
    event = await bench.event()

    assert (result.data, bench.ran) == ("content of a.txt", ["a.txt"])
    assert (event.decision, event.execution_status, event.approver_id) == ("ALLOW", "SUCCESS", None)
    assert (event.caller_id, event.caller_role, event.key_id) == ("dev-agent", "developer", "k-1")
    assert (event.org_id, event.environment) == ("acme", "test")
    assert (event.mcp_server, event.tool_name) == ("files", "read_file")
    assert event.raw_args_hash == AuditEvent.hash_args({"path": "a.txt", "password": SECRET})
    assert event.sanitized_args == {"path": "[hidden]", "password": "[hidden]"}
    assert (event.matched_policy_rule, event.policy_version) == ("reads", "7")
    assert (event.risk_score, event.risk_labels) == (0.2, ["READ"])
    assert event.output_hash is not None
    assert event.deterministic_rationale == "Reads are allowed."


async def test_denied_call_does_not_run(bench: Bench) -> None:
    """The caller reads the policy's reason."""
    refusal = await bench.refusal(bench.server(), "format_disk")
    event = await bench.event()

    assert (refusal, bench.ran) == ("Disks are out of bounds.", [])
    assert (event.decision, event.execution_status, event.matched_policy_rule) == ("DENY", None, "no-disks")
    assert event.deterministic_rationale == refusal


async def test_failed_call_is_recorded(bench: Bench) -> None:
    """What FastMCP says of a failure is passed on; the event tells the kind."""
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("read_badly", {}, "TOOL_ERROR"),
        ("read_slowly", {}, "TIMEOUT"),
        ("read_file", {"paths": 7}, "TOOL_ERROR"),
    ]
    for tool, arguments, status in cases:
        await bench.refusal(bench.server(), tool, **arguments)
        event = (await bench.store.audit.list_recent())[0]
        assert (event.decision, event.execution_status, event.output_hash) == ("ALLOW", status, None)
    await bench.refusal(bench.server(), "no_such_tool")
    event = (await bench.store.audit.list_recent())[0]
    assert (event.decision, event.execution_status, event.tool_name) == ("DENY", None, "no_such_tool")


async def test_approved_call_runs_once(bench: Bench) -> None:
    """Two approvers see the sanitised call; the approval is used, with its outcome; the event names who approved."""

    async def two(caller: CallerIdentity, call: ToolCall) -> Verdict:
        return judge(caller, call).model_copy(update={"required_approvals": 2})

    server = bench.server(two, sanitize=lambda call: {"path": call.arguments["path"]})
    waiting = asyncio.create_task(bench.call(server, "delete_file", path="a.txt", password=SECRET))
    asked = await bench.pending()
    await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="bob")
    assert (await bench.store.approvals.get(approval_id=asked.approval_id)).status == "PENDING"
    assert bench.ran == []
    await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
    result = await waiting
    stored = await bench.store.approvals.get(approval_id=asked.approval_id)
    event = await bench.event()

    assert (result.data, bench.ran) == (True, ["a.txt"])
    assert asked.tool_call == ToolCall(server="files", tool="delete_file", arguments={"path": "a.txt"})
    assert (asked.caller_id, asked.org_id, asked.risk_explanation) == ("dev-agent", "acme", "A deleted file is gone.")
    assert (stored.status, stored.outcome) == ("USED", "SUCCESS")
    assert (event.decision, event.execution_status, event.approver_id) == ("APPROVAL_REQUIRED", "SUCCESS", "alice")
    assert event.approval_id == asked.approval_id
    assert event.request_id == asked.request_id
    assert event.sanitized_args == {"path": "a.txt"}


async def test_denied_approval_releases_nothing(bench: Bench) -> None:
    """The caller learns who denied it and why."""
    waiting = asyncio.create_task(bench.refusal(bench.server(), "delete_file", path="a.txt"))
    asked = await bench.pending()
    await bench.store.approvals.deny(approval_id=asked.approval_id, approver_id="alice", note="Not today.")
    event_reason = await waiting
    event = await bench.event()

    assert event_reason == "The approval of this call is DENIED by alice, so it was not run. Note: Not today."
    assert bench.ran == []
    assert (event.decision, event.execution_status, event.approver_id) == ("DENY", None, "alice")
    assert event.approval_id is None
    assert event.deterministic_rationale == event_reason


async def test_call_that_nobody_decides_is_withdrawn(bench: Bench) -> None:
    """After the timeout a late approver learns that the approval was cancelled, and nothing runs."""
    refusal = await bench.refusal(bench.server(approval_timeout_s=0.2), "delete_file", path="a.txt")
    (asked,) = await bench.store.approvals.list_requests()
    event = await bench.event()

    assert refusal == "Nobody decided about this call within 0.2 seconds, so it was not run: call again later."
    assert (asked.status, bench.ran) == ("CANCELLED", [])
    assert (event.decision, event.execution_status) == ("APPROVAL_REQUIRED", None)
    with pytest.raises(errors.ApprovalAlreadyDecidedError):
        await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")


async def test_caller_that_goes_away_leaves_no_open_approval(bench: Bench) -> None:
    """Its approval is cancelled and its event written."""
    async with Client(bench.server()) as client:
        waiting = asyncio.create_task(client.call_tool("delete_file", {"path": "a.txt"}))
        asked = await bench.pending()
        waiting.cancel()
        await asyncio.wait([waiting])
    event = await bench.first_event()
    stored = await bench.store.approvals.get(approval_id=asked.approval_id)

    assert (stored.status, bench.ran) == (ApprovalStatus.CANCELLED, [])
    assert (event.decision, event.execution_status) == ("DENY", None)
    assert event.deterministic_rationale == "The call was cancelled before it ran."


async def test_expired_approval_was_decided_by_nobody(bench: Bench) -> None:
    """It is no denial, as nobody denied it, and no release."""
    settings = StoreSettings(approval_token_ttl_seconds=0.3)
    async with GatewayStore(settings=settings) as store:
        bench = Bench(store)
        refusal = await bench.refusal(bench.server(approval_timeout_s=20), "delete_file", path="a.txt")
        event = await bench.event()

    assert (refusal, bench.ran) == ("The approval of this call is EXPIRED, so it was not run.", [])
    assert (event.decision, event.approver_id, event.execution_status) == ("APPROVAL_REQUIRED", None, None)


@pytest.mark.parametrize(
    ("tool", "way", "end"),
    [
        ("read_forever", "calm", "client"),
        ("read_forever", "failing", "request"),
        ("delete_forever", "calm", "client"),
    ],
)
async def test_call_that_is_cancelled_while_its_tool_runs_is_no_error(
    bench: Bench, tool: str, way: str, end: str
) -> None:
    """Also where the tool raises an error of its own while it is cancelled, and where the connection ends."""
    server, begun = bench.server(), asyncio.Event()

    async def forever() -> str:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            if way == "failing":
                raise ValueError("cannot tidy up")
        return "never"

    server.add_tool(Tool.from_function(forever, name=tool))
    async with Client(server) as client:
        waiting = asyncio.create_task(client.call_tool(tool, {}))
        if tool == "delete_forever":
            asked = await bench.pending()
            await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
        await begun.wait()
        if end == "request":
            waiting.cancel()
            await asyncio.wait([waiting])
    waiting.cancel()
    await asyncio.wait([waiting])
    event = await bench.first_event()

    assert event.execution_status == "CANCELLED"
    if tool == "read_forever":
        assert (event.decision, event.approver_id) == ("ALLOW", None)
    else:
        stored = await bench.store.approvals.get(approval_id=asked.approval_id)
        assert (event.decision, event.approver_id) == ("APPROVAL_REQUIRED", "alice")
        assert (stored.status, stored.outcome) == ("USED", "CANCELLED")


async def test_released_calls_can_be_counted(bench: Bench) -> None:
    """`approvals` are the calls for which a human was asked; with an approver they were released."""
    server = bench.server(approval_timeout_s=20)
    for word in ("approve", "deny"):
        async with Client(server) as client:
            call = asyncio.create_task(client.call_tool("delete_file", {"path": word}, raise_on_error=False))
            asked = await bench.pending()
            decide = getattr(bench.store.approvals, word)
            await decide(approval_id=asked.approval_id, approver_id="alice")
            await call
    await bench.refusal(bench.server(approval_timeout_s=0.1), "delete_file", path="nobody")
    await bench.call(server, "read_file", path="a.txt")
    (total,) = await bench.store.audit.stats()
    by = await bench.store.audit.stats(by=["decision", "approver_id"])

    assert (total["calls"], total["approvals"], total["denials"]) == (4, 2, 1)
    assert {(row["decision"], row["approver_id"]): row["calls"] for row in by} == {
        ("APPROVAL_REQUIRED", "alice"): 1,
        ("APPROVAL_REQUIRED", None): 1,
        ("DENY", "alice"): 1,
        ("ALLOW", None): 1,
    }


async def test_server_is_named_for_each_call(bench: Bench) -> None:
    """By a callback, as it is judged, shown to approvers and recorded; also where the caller is not known."""
    judged: list[str] = []

    def name(context: MiddlewareContext[Any]) -> Any:
        return asyncio.sleep(0, f"tenant-{context.message.arguments['path']}")

    def policy(caller: CallerIdentity, call: ToolCall) -> Verdict:
        judged.append(call.server)
        return judge(caller, call)

    server = bench.server(policy, server=name)
    waiting = asyncio.create_task(bench.call(server, "delete_file", path="a"))
    asked = await bench.pending()
    await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
    await waiting
    await bench.refusal(bench.server(server=name, identify=None), "read_file", path="b")
    events = await bench.store.audit.list_recent()

    assert (asked.tool_call.server, judged) == ("tenant-a", ["tenant-a"])
    assert [event.mcp_server for event in events] == ["tenant-b", "tenant-a"]


async def test_error_of_a_call_that_a_tool_makes_is_an_error_of_the_tool(bench: Bench) -> None:
    """The tool has run, though what it called is unknown; the inner call has an event of its own."""
    server = bench.server()

    @server.tool
    async def read_more(ctx: Context) -> str:
        bench.ran.append("more")
        await ctx.fastmcp.call_tool("no_such_tool", {})
        return "never"

    await bench.refusal(server, "read_more")
    inner, outer = await bench.store.audit.list_recent()

    assert (outer.decision, outer.execution_status, bench.ran) == ("ALLOW", "TOOL_ERROR", ["more"])
    assert (inner.decision, inner.execution_status) == ("DENY", None)


async def test_a_call_that_ran_is_recorded_whatever_its_caller_is_said_to_be(bench: Bench) -> None:
    """An identity of the host's own has no key, and may name no organisation."""
    alice = CALLER.model_copy(update={"caller_id": "alice", "org_id": "", "key_id": None, "api_key_id": None})
    await bench.call(bench.server(identify=lambda _context: alice), "read_file", path="a.txt")
    event = await bench.event()

    assert (event.caller_id, event.key_id, event.org_id) == ("alice", None, "")
    assert (event.execution_status, bench.ran) == ("SUCCESS", ["a.txt"])


async def test_no_raw_argument_is_stored(bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the database file nor the log holds one, however the call ends."""
    server = bench.server(approval_timeout_s=0.1)
    await bench.call(server, "read_file", path=SECRET, password=SECRET)
    await bench.refusal(server, "delete_file", path=SECRET)
    await bench.refusal(server, "no_such_tool", path=SECRET)

    held = b"".join(path.read_bytes() for path in tmp_path.glob("gateway.db*"))
    assert b"delete_file" in held
    assert SECRET.encode() not in held
    assert SECRET not in "".join(record.getMessage() for record in caplog.records if "agent_gateway" in record.name)


async def test_arguments_that_are_nested_too_deeply_are_the_callers_fault(bench: Bench) -> None:
    """Nothing is logged for the operator, and the event says it."""
    deep: Any = "a.txt"
    for _ in range(600):
        deep = {"a": deep}

    with pytest.raises(ToolError, match="nested too deeply"):
        await bench.server().call_tool("read_file", {"path": deep})

    event = await bench.event()
    assert (event.decision, event.matched_policy_rule, bench.ran) == ("DENY", "gateway.refused", [])
