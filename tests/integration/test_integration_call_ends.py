"""However a framework ends or stops a call, the log says so."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from agents import Agent as OpenAIAgent
from agents import RunConfig, RunContextWrapper, Runner
from agents.mcp import MCPServerStdio, MCPToolCustomDataContext, MCPUtil
from agents.testing import ScriptedModel, assistant_message, function_call

from agent_gateway_store import AuditEvent, CallerIdentity, Decision, GatewayStore, ToolCall, TrustLevel
from agent_gateway_store.integrations import openai_agents as for_openai
from agent_gateway_store.integrations.guard import CallGuard, Verdict

pytestmark = pytest.mark.integration

CALLER = CallerIdentity(caller_id="a", role="r", trust_level=TrustLevel.LOW, environment="test")


def judge(_caller: CallerIdentity, call: ToolCall) -> Verdict:
    """Only what is named `free` needs no human."""
    decision = Decision.ALLOW if call.tool.startswith("free") else Decision.APPROVAL_REQUIRED
    return Verdict(decision=decision, rule="r", reason="why")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[GatewayStore]:
    async with GatewayStore(f"sqlite:///{tmp_path}/gateway.db", redis_url="") as store:
        yield store


async def events(store: GatewayStore) -> list[AuditEvent]:
    """Oldest first."""
    return list(reversed(await store.audit.list_recent()))


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

    async def test_what_an_mcp_server_answers_as_an_error_is_recorded_as_one(
        self, store: GatewayStore, tmp_path: Path
    ) -> None:
        """The SDK makes content of it; the model reads that, and the host's own extractor is asked, as before."""
        script = tmp_path / "server.py"
        script.write_text(MCP_SERVER)

        def note(context: MCPToolCustomDataContext) -> dict[str, Any]:
            return {"seen": context.tool_name}

        async with MCPServerStdio(
            params={"command": sys.executable, "args": [str(script)]},
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
