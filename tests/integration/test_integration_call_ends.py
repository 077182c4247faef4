"""However a framework ends or stops a call, the log says so."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import guard_helpers
import pytest
from agents import Agent as OpenAIAgent
from agents import (
    RunConfig,
    RunContextWrapper,
    Runner,
    ToolGuardrailFunctionOutput,
    ToolInputGuardrailTripwireTriggered,
    ToolTimeoutError,
    UserError,
    WebSearchTool,
    function_tool,
    tool_input_guardrail,
)
from agents.mcp import MCPServerStdio, MCPServerStreamableHttp, MCPToolCustomDataContext, MCPUtil
from agents.run_config import ToolExecutionConfig
from agents.testing import ScriptedModel, assistant_message, function_call
from guard_helpers import CALLER, approve, events, judge
from pydantic_ai import Agent, ApprovalRequired, CallDeferred, DeferredToolRequests, FunctionToolset
from pydantic_ai.messages import ModelResponse, ToolCallPart
from pydantic_ai.models.function import FunctionModel

from agent_gateway_store import (
    GatewayStore,
)
from agent_gateway_store.integrations import openai_agents as for_openai
from agent_gateway_store.integrations import pydantic_ai as for_pydantic_ai
from agent_gateway_store.integrations.guard import CallGuard
from forks import forks

store = guard_helpers.store


MCP_SERVER = """
from fastmcp import FastMCP
from fastmcp.exceptions import ToolError

mcp = FastMCP("files")


@mcp.tool
def free_delete(path: str) -> str:
    raise ToolError("disk on fire")


@mcp.tool
def free_read(path: str) -> str:
    return "text"


mcp.run("stdio", show_banner=False)
"""


def serving(folder: Path) -> Any:
    """The parameters with which the SDK starts that server, as a process that has its library loaded."""
    (folder / "server.py").write_text(MCP_SERVER)
    loaded = forks(is_large=True)
    loaded.load(["fastmcp", "fastmcp.server"])
    return {"command": str(loaded.programs / "python"), "args": [str(folder / "server.py")]}


def call_once(tools: list[Any], name: str) -> OpenAIAgent[None]:
    """An agent whose scripted model makes one call, and ends."""
    call = function_call(name, {"path": "a.txt"}, call_id="c-1")
    return OpenAIAgent("files", model=ScriptedModel([[call], [assistant_message("The end.")]]), tools=tools)


async def run(agent: OpenAIAgent[None], given: Any = "Go.") -> Any:
    return await Runner.run(agent, given, run_config=RunConfig(tracing_disabled=True))


class TestOpenAIAgents:
    """Real runs of the SDK."""

    @staticmethod
    def gateway(store: GatewayStore) -> for_openai.GatewayTools:
        return for_openai.GatewayTools(CallGuard(store, judge), lambda _: CALLER)

    @pytest.mark.system
    async def test_what_an_mcp_server_answers_as_an_error_is_recorded_as_one(
        self, store: GatewayStore, tmp_path: Path
    ) -> None:
        """The SDK makes content of it; the model reads that, and the host's own extractor is asked, as before."""

        def note(context: MCPToolCustomDataContext) -> dict[str, Any]:
            return {"seen": context.tool_name}

        async with MCPServerStdio(
            params=serving(tmp_path),
            client_session_timeout_seconds=60,
            custom_data_extractor=note,
        ) as server:
            bare: Any = await MCPUtil.get_all_function_tools(
                [server], False, RunContextWrapper(None), OpenAIAgent("files")
            )
            gateway = self.gateway(store)
            with pytest.raises(ValueError, match="free_delete is a tool of an MCP server"):
                gateway.wrap(*bare)
            for name, said in (("free_delete", "disk on fire"), ("free_read", "text")):
                ended = await run(call_once(gateway.wrap(*bare, mcp_servers=[server]), name))
                (item,) = [each for each in ended.new_items if each.type == "tool_call_output_item"]
                assert (item.output["text"], item.custom_data) == (said, {"seen": name})
        assert [each.execution_status for each in await events(store)] == ["TOOL_ERROR", "SUCCESS"]

    @pytest.mark.system
    async def test_the_tools_of_an_mcp_server_that_is_not_given_never_succeed(
        self, store: GatewayStore, tmp_path: Path
    ) -> None:
        """They are refused where the names tell, before anything changes; of one name, an answer counts as an error."""
        params = serving(tmp_path)
        url = "https://user:secret@mcp.example/files?token=secret"
        given, other, remote = (
            MCPServerStdio(params=params, name=name, client_session_timeout_seconds=60)
            for name in ("files", "disks", url)
        )

        async def tools_of(server: MCPServerStdio) -> Any:
            async with server:
                return await MCPUtil.get_all_function_tools(
                    [server], False, RunContextWrapper(None), OpenAIAgent("files")
                )

        gateway = self.gateway(store)
        bare, far = await tools_of(other), await tools_of(remote)
        with pytest.raises(ValueError, match="free_delete is a tool of an MCP server"):
            gateway.wrap(*bare, mcp_servers=[given, remote])
        assert given.custom_data_extractor is None
        assert len(self.gateway(store).wrap(*far, mcp_servers=[remote])) == 2

        namesake = MCPServerStdio(params=params, name="disks")
        tools = gateway.wrap(*bare, mcp_servers=[namesake])
        async with other:
            await run(call_once(tools, "free_delete"))
        assert [each.execution_status for each in await events(store)] == ["TOOL_ERROR"]

    async def test_an_mcp_server_that_calls_again_what_fails_is_refused(self, store: GatewayStore) -> None:
        """It does so below the gateway, with one approval; -1 is without end, and some servers have no such setting."""
        url = "https://user:secret@mcp.example/files"
        for retries in (0, None, 2, -1):
            server: Any = MCPServerStreamableHttp({"url": url}, name=url, max_retry_attempts=retries or 0)
            if retries is None:
                del server.max_retry_attempts
            refused = pytest.raises(ValueError, match="make it with max_retry_attempts=0") if retries else nullcontext()
            with refused as no:
                self.gateway(store).wrap(mcp_servers=[server])
            assert (server.custom_data_extractor is None) == bool(retries)
            assert "secret" not in str(no)

    async def test_a_tool_that_is_refused_leaves_no_name(self, store: GatewayStore) -> None:
        """Of tools that are wrapped together, none is known if one is refused."""

        @function_tool
        async def delete(path: str) -> str:
            return path

        gateway, first = self.gateway(store), delete
        with pytest.raises(TypeError):
            gateway.wrap(first, WebSearchTool())

        @function_tool(name_override="delete")
        async def another(path: str, force: bool) -> str:
            return f"{path} {force}"

        assert len(gateway.wrap(another)) == 1

    @pytest.mark.parametrize(
        ("name", "ending"), [("free_delete", "error"), ("delete", "reject_content"), ("delete", "raise_exception")]
    )
    async def test_a_call_that_a_guardrail_stops_after_its_release_leaves_an_event(
        self, store: GatewayStore, name: str, ending: str
    ) -> None:
        """Allowed by the policy or by a human, it did not run: the log says so, and its approval."""
        outputs = {
            "reject_content": lambda: ToolGuardrailFunctionOutput.reject_content("stopped"),
            "raise_exception": ToolGuardrailFunctionOutput.raise_exception,
        }

        @tool_input_guardrail
        def passes(_data: Any) -> ToolGuardrailFunctionOutput:
            return ToolGuardrailFunctionOutput.allow()

        @tool_input_guardrail
        def stops(_data: Any) -> ToolGuardrailFunctionOutput:
            return outputs[ending]()

        @function_tool(name_override=name, tool_input_guardrails=[passes, stops])
        async def delete(path: str) -> str:
            raise AssertionError(path)

        gateway = self.gateway(store)
        agent, given, asked = call_once(gateway.wrap(delete), name), "Go.", None
        if name == "delete":
            given = (await run(agent, given)).to_state()
            (asked,) = await approve(store)
            assert await gateway.answer(given)
        if ending == "reject_content":
            (item,) = [each for each in (await run(agent, given)).new_items if each.type == "tool_call_output_item"]
            assert item.output == "stopped"
        else:
            with pytest.raises(ToolInputGuardrailTripwireTriggered if ending == "raise_exception" else UserError):
                await run(agent, given)

        last = (await events(store))[-1]
        assert (last.decision, last.execution_status, last.approval_id) == ("DENY", None, None)
        assert "not run: an input guardrail of the tool stopped it" in last.deterministic_rationale
        if asked is not None:
            assert f"by alice (approval {asked.approval_id})" in last.deterministic_rationale
            used = await store.approvals.get(approval_id=asked.approval_id)
            assert (used.status, used.outcome) == ("USED", "NOT_RUN")

    async def test_a_guardrail_before_the_approval_leaves_it_to_the_human(self, store: GatewayStore) -> None:
        """As the page says: the SDK ends the call while it still waits, and the same call of another run may, too."""

        @tool_input_guardrail
        def stops(_data: Any) -> ToolGuardrailFunctionOutput:
            return ToolGuardrailFunctionOutput.reject_content("stopped")

        @function_tool(tool_input_guardrails=[stops])
        async def delete(path: str) -> str:
            raise AssertionError(path)

        first = RunConfig(
            tracing_disabled=True, tool_execution=ToolExecutionConfig(pre_approval_tool_input_guardrails=True)
        )
        await Runner.run(call_once(self.gateway(store).wrap(delete), "delete"), "Go.", run_config=first)

        assert [each.decision for each in await events(store)] == ["APPROVAL_REQUIRED"]
        assert len(await store.approvals.list_requests("PENDING")) == 1

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({}, "Tool 'free_slow' timed out after 0.05 seconds."),
            ({"timeout_error_function": lambda _context, error: f"after {error.timeout_seconds}"}, "after 0.05"),
            ({"timeout_behavior": "raise_exception"}, None),
        ],
    )
    async def test_the_timeout_of_a_tool_is_recorded_as_one(
        self, store: GatewayStore, options: dict[str, Any], said: str | None
    ) -> None:
        """And the SDK does about it what it did."""

        @function_tool(name_override="free_slow", timeout=0.05, **options)
        async def slow(path: str) -> str:
            await asyncio.sleep(30)
            return path

        agent = call_once(self.gateway(store).wrap(slow), "free_slow")
        if said is None:
            with pytest.raises(ToolTimeoutError):
                await run(agent)
        else:
            (item,) = [each for each in (await run(agent)).new_items if each.type == "tool_call_output_item"]
            assert item.output == said
        assert [each.execution_status for each in await events(store)] == ["TIMEOUT"]

    async def test_a_run_that_is_cancelled_before_the_timeout_is_recorded_as_cancelled(
        self, store: GatewayStore
    ) -> None:
        begun = asyncio.Event()

        @function_tool(name_override="free_slow", timeout=60)
        async def slow(path: str) -> str:
            begun.set()
            await asyncio.sleep(30)
            return path

        running = asyncio.create_task(run(call_once(self.gateway(store).wrap(slow), "free_slow")))
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        while not (found := await events(store)):
            await asyncio.sleep(0.01)
        assert [each.execution_status for each in found] == ["CANCELLED"]


@pytest.mark.parametrize("ending", [CallDeferred, ApprovalRequired])
async def test_a_tool_that_defers_its_call_in_pydantic_ai_has_not_ended(
    store: GatewayStore, ending: type[Exception]
) -> None:
    """Nobody here knows how it ends: neither the event nor the approval says."""

    async def start() -> str:
        raise ending

    model = FunctionModel(lambda *_: ModelResponse(parts=[ToolCallPart("start", {}, tool_call_id="c-1")]))
    tools = for_pydantic_ai.GatewayToolset(FunctionToolset([start]), CallGuard(store, judge), lambda _: CALLER)
    agent = Agent(model, toolsets=[tools], output_type=[str, DeferredToolRequests])
    await agent.run("go")
    (asked,) = await approve(store)
    await agent.run("go")

    assert [each.execution_status for each in await events(store)] == [None, None]
    used = await store.approvals.get(approval_id=asked.approval_id)
    assert (used.status, used.outcome) == ("USED", None)
