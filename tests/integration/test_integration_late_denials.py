"""A run that goes on long after its call was denied: the model is told, and nobody is asked anew."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from agents import Agent as OpenAIAgent
from agents import RunConfig, Runner, RunState, function_tool
from agents.testing import ScriptedModel, assistant_message, function_call
from guard_helpers import CALLER, judge
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool as langchain_tool
from langgraph.checkpoint.memory import InMemorySaver

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.integrations import langchain as for_langchain
from agent_gateway_store.integrations import openai_agents as for_openai
from agent_gateway_store.integrations.guard import CallGuard

pytestmark = pytest.mark.integration

SAID = "The approval of this call is DENIED by alice, so it was not run. Note: never"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[GatewayStore]:
    """One whose denials stand for no time at all."""
    settings = StoreSettings(approval_denial_seconds=0)
    async with GatewayStore(f"sqlite:///{tmp_path}/gateway.db", redis_url="", settings=settings) as opened:
        yield opened


async def deny(store: GatewayStore) -> None:
    (asked,) = await store.approvals.list_requests("PENDING")
    await store.approvals.deny(approval_id=asked.approval_id, approver_id="alice", note="never")


async def require_two_events(store: GatewayStore) -> None:
    """That of the question and that of the refusal, and one approval."""
    events = [(each.decision, each.approver_id) for each in await store.audit.list_recent()]
    assert (events, len(await store.approvals.list_requests())) == ([("DENY", "alice"), ("APPROVAL_REQUIRED", None)], 1)


class Scripted(GenericFakeChatModel):
    """Makes one call, and ends when it reads an answer."""

    def bind_tools(self, *_args: Any, **_options: Any) -> Any:
        call = AIMessage("", tool_calls=[{"name": "delete", "args": {"path": "a"}, "id": "c-1"}])
        return RunnableLambda(lambda seen: AIMessage("end") if seen[-1].type == "tool" else call)


async def test_langchain(store: GatewayStore) -> None:
    @langchain_tool
    async def delete(path: str) -> str:
        """Delete."""
        raise AssertionError(path)

    saver, question = InMemorySaver(), {"messages": [("user", "go")]}

    def agent() -> Any:
        gateway = for_langchain.GatewayMiddleware(CallGuard(store, judge), lambda _: CALLER)
        return create_agent(Scripted(messages=iter(())), [delete], middleware=[gateway], checkpointer=saver)

    def thread(name: str) -> Any:
        return {"configurable": {"thread_id": name}}

    state = await agent().ainvoke(question, thread("1"))
    await deny(store)
    state = await agent().ainvoke(await for_langchain.resume(store, state), thread("1"))
    assert [each.content for each in state["messages"][-2:]] == [SAID, "end"]
    await require_two_events(store)

    # Another run may ask.
    assert "__interrupt__" in await agent().ainvoke(question, thread("2"))


async def test_openai_agents(store: GatewayStore) -> None:
    @function_tool
    async def delete(path: str) -> str:
        raise AssertionError(path)

    silent = RunConfig(tracing_disabled=True)

    def agent(*steps: Any) -> tuple[for_openai.GatewayTools, OpenAIAgent[None]]:
        tools = for_openai.GatewayTools(CallGuard(store, judge), lambda _: CALLER)
        model = ScriptedModel([*steps, [assistant_message("end")]])
        return tools, OpenAIAgent("files", model=model, tools=tools.wrap(delete))

    call = [function_call("delete", {"path": "a"}, call_id="c-1")]
    kept = (await Runner.run(agent(call)[1], "Go.", run_config=silent)).to_state().to_string()
    await deny(store)
    tools, resumed = agent()
    state = await RunState.from_string(resumed, kept)
    assert await tools.answer(state)
    ended = await Runner.run(resumed, state, run_config=silent)
    assert [each.output for each in ended.new_items if each.type == "tool_call_output_item"] == [SAID]
    await require_two_events(store)

    # Another run may ask, also where its model counts its calls from one.
    tools, again = agent(call)
    state = (await Runner.run(again, "Go.", run_config=silent)).to_state()
    assert not await tools.answer(state)
    assert len(await store.approvals.list_requests("PENDING")) == 1
