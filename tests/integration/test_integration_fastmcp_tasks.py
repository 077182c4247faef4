"""Calls that end after they were answered: background tasks are refused, and nothing else is called a success."""

from __future__ import annotations

import asyncio
from typing import Any

import fastmcp_helpers
import pytest
from fastmcp import Client, Context
from fastmcp.exceptions import McpError, ToolError
from fastmcp.server.extensions import ServerExtension, ToolCallContinuation
from fastmcp.utilities.tasks import TASKS_EXTENSION_ID, TaskConfig, TaskMode
from fastmcp_helpers import Bench, serving
from mcp.client.extension import advertise
from mcp_types import CallToolRequestParams
from pydantic import BaseModel, ValidationError

bench = fastmcp_helpers.bench


class Created(BaseModel):
    """What the extension answers at once."""

    result_type: str = "task"


class Background(ServerExtension):
    """Answers at once, as the extension for tasks does, and runs the tool afterwards."""

    def __init__(self, identifier: str) -> None:
        self.identifier = identifier
        self.started: list[asyncio.Task[Any]] = []

    async def intercept_tool_call(
        self, params: CallToolRequestParams, context: Context, call_next: ToolCallContinuation
    ) -> Any:
        """Start the tool and do not wait for it."""
        tool = await context.fastmcp.get_tool(params.name)
        assert tool is not None
        is_wanted = context.client_extension_settings(self.identifier) is not None
        if self.identifier == TASKS_EXTENSION_ID and not (is_wanted and tool.task_config.supports_tasks()):
            return await call_next()
        self.started.append(asyncio.ensure_future(call_next()))
        return Created()


@pytest.mark.parametrize("mode", ["optional", "required"])
async def test_background_task_is_refused(bench: Bench, mode: TaskMode) -> None:
    """The client is told what to do; the tool has not begun."""
    server, tasks = bench.server(), Background(TASKS_EXTENSION_ID)
    server.add_extension(tasks)

    @server.tool(task=TaskConfig(mode=mode))
    async def read_long() -> str:
        bench.ran.append("long")
        raise ValueError("failed later")

    async with serving(server) as url, Client(url, extensions=[advertise(TASKS_EXTENSION_ID)]) as client:
        with pytest.raises(ToolError) as refused:
            await client.call_tool("read_long", {})
    event = await bench.event()

    assert str(refused.value).startswith("This tool would run as a background task, whose end cannot be recorded")
    assert (event.decision, event.execution_status, event.tool_name) == ("DENY", None, "read_long")
    assert (bench.ran, tasks.started) == ([], [])


async def test_tool_that_may_be_a_task_runs_in_the_foreground(bench: Bench) -> None:
    """For a client that does not ask for tasks, and other tools for one that does."""
    server = bench.server()
    server.add_extension(Background(TASKS_EXTENSION_ID))

    @server.tool(task=TaskConfig(mode="optional"))
    async def read_long() -> str:
        bench.ran.append("long")
        return "done"

    await bench.call(server, "read_long")
    async with Client(server, extensions=[advertise(TASKS_EXTENSION_ID)]) as client:
        await client.call_tool("read_file", {"path": "a.txt"})
    events = await bench.store.audit.list_recent()

    assert bench.ran == ["long", "a.txt"]
    assert [event.execution_status for event in events] == ["SUCCESS", "SUCCESS"]


async def test_end_that_an_extension_hides_is_not_called_a_success(bench: Bench) -> None:
    """The event has no status, and the outcome of the approval stays unknown."""
    server, later = bench.server(), Background("com.example/later")
    server.add_extension(later)
    async with Client(server) as client:
        waiting = asyncio.create_task(client.call_tool("delete_file", {"path": "a.txt"}))
        asked = await bench.pending()
        await bench.store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
        with pytest.raises((McpError, ValidationError, RuntimeError, ToolError)):
            await waiting
    await asyncio.gather(*later.started)
    event = await bench.event()
    stored = await bench.store.approvals.get(approval_id=asked.approval_id)

    assert (event.decision, event.execution_status, event.approver_id) == ("APPROVAL_REQUIRED", None, "alice")
    assert (stored.status, stored.outcome, bench.ran) == ("USED", None, ["a.txt"])
