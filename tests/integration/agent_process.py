"""An agent of one framework as a process: `python agent_process.py FRAMEWORK DATABASE_URL begin|resume`, in its folder.

`begin` runs until a human must decide, keeps its state in files, says so and stays; `resume` goes on from the files.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypedDict

from agent_gateway_store import CallerIdentity, Decision, GatewayStore, ToolCall, TrustLevel
from agent_gateway_store.integrations.guard import CallGuard, Verdict

CALLER = CallerIdentity(
    caller_id="dev-agent", role="developer", trust_level=TrustLevel.MEDIUM, environment="test", org_id="acme"
)
KEPT = Path("kept.json")
PATHS = ("a.txt", "b.txt")


def judge(_caller: CallerIdentity, _call: ToolCall) -> Verdict:
    return Verdict(decision=Decision.APPROVAL_REQUIRED, rule="all", reason="A human decides.")


async def delete_file(path: str) -> str:
    """Delete a file."""
    with Path("ran").open("a") as ran:
        ran.write(f"{path}\n")
    return f"{path} is deleted"


async def pydantic_ai(store: GatewayStore, is_resumed: bool) -> bool:
    from pydantic import TypeAdapter
    from pydantic_ai import Agent, DeferredToolRequests, FunctionToolset
    from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter, ModelResponse, TextPart, ToolCallPart
    from pydantic_ai.models.function import AgentInfo, FunctionModel

    from agent_gateway_store.integrations.pydantic_ai import GatewayToolset, results_of

    def say(messages: list[ModelMessage], _info: AgentInfo) -> ModelResponse:
        if messages[-1].parts[-1].part_kind == "tool-return":
            return ModelResponse(parts=[TextPart("The end.")])
        return ModelResponse(
            parts=[ToolCallPart("delete_file", {"path": path}, tool_call_id=f"c-{path}") for path in PATHS]
        )

    tools = GatewayToolset(FunctionToolset([delete_file]), CallGuard(store, judge), lambda _run: CALLER)
    agent = Agent(FunctionModel(say), toolsets=[tools], output_type=[str, DeferredToolRequests])
    requests = TypeAdapter(DeferredToolRequests)
    if is_resumed:
        kept = json.loads(KEPT.read_text())
        results = await results_of(store, requests.validate_json(kept[1]))
        if results is None:
            return False
        history = ModelMessagesTypeAdapter.validate_json(kept[0])
        return (await agent.run(message_history=history, deferred_tool_results=results)).output == "The end."
    ended: Any = await agent.run("Delete them.")
    KEPT.write_text(json.dumps([ended.all_messages_json().decode(), requests.dump_json(ended.output).decode()]))
    return False


async def openai_agents(store: GatewayStore, is_resumed: bool) -> bool:
    from agents import Agent, Runner, RunState, function_tool, set_tracing_disabled
    from agents.testing import ScriptedModel, assistant_message, function_call

    from agent_gateway_store.integrations.openai_agents import GatewayTools

    set_tracing_disabled(True)
    calls = [function_call("delete_file", {"path": path}, call_id=f"c-{path}") for path in PATHS]
    end: list[Any] = [assistant_message("The end.")]
    tools = GatewayTools(CallGuard(store, judge), lambda _context: CALLER)
    model = ScriptedModel([end] if is_resumed else [calls, end])
    agent: Agent[None] = Agent("files", model=model, tools=tools.wrap(function_tool(delete_file)))
    if is_resumed:
        state = await RunState.from_string(agent, KEPT.read_text())
        return await tools.answer(state) and (await Runner.run(agent, state)).final_output == "The end."
    KEPT.write_text((await Runner.run(agent, "Delete them.")).to_state().to_string())
    return False


async def langchain(store: GatewayStore, is_resumed: bool, mode: Any = None) -> bool:
    from langchain.agents import create_agent
    from langchain.agents.middleware import HumanInTheLoopMiddleware
    from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
    from langchain_core.messages import AIMessage, ToolMessage
    from langchain_core.runnables import RunnableLambda
    from langchain_core.tools import tool
    from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

    from agent_gateway_store.integrations.langchain import GatewayMiddleware, resume

    class Scripted(GenericFakeChatModel):
        def bind_tools(self, *_args: Any, **_options: Any) -> Any:
            return RunnableLambda(lambda seen: AIMessage("The end.") if isinstance(seen[-1], ToolMessage) else asked)

    asked = AIMessage(
        "", tool_calls=[{"name": "delete_file", "args": {"path": path}, "id": f"c-{path}"} for path in PATHS]
    )
    gateway = GatewayMiddleware(CallGuard(store, judge), lambda _request: CALLER)
    middleware: list[Any] = [gateway]
    if mode is not None:
        middleware.insert(0, HumanInTheLoopMiddleware({"delete_file": True}, interrupt_mode=mode))
    thread: Any = {"configurable": {"thread_id": "1"}}
    async with AsyncSqliteSaver.from_conn_string("checkpoints.db") as saver:
        agent: Any = create_agent(
            Scripted(messages=iter(())), [tool(delete_file)], middleware=middleware, checkpointer=saver
        )
        # Nothing but the checkpoints is kept.
        state = await agent.aget_state(thread)
        found = {"__interrupt__": state.interrupts}
        if not is_resumed:
            found = await agent.ainvoke({"messages": [("user", "Delete them.")]}, thread)
        command = await (resume(store, found) if mode is None else gateway.answer(found, CALLER))
        if command is None:
            return False
        return (await agent.ainvoke(command, thread))["messages"][-1].content == "The end."


async def human_in_the_loop(store: GatewayStore, is_resumed: bool) -> bool:
    return await langchain(store, is_resumed, "batched")


async def human_in_the_loop_per_call(store: GatewayStore, is_resumed: bool) -> bool:
    return await langchain(store, is_resumed, "per_call")


class Files(TypedDict):
    """The state of a graph without an agent."""

    done: list[str]


async def langgraph(store: GatewayStore, is_resumed: bool) -> bool:
    from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
    from langgraph.graph import StateGraph
    from langgraph.types import interrupt

    from agent_gateway_store.integrations.langchain import GatewayMiddleware

    gateway = GatewayMiddleware(CallGuard(store, judge), lambda _request: CALLER)

    async def clean(_state: Files) -> Files:
        actions = [{"name": "delete_file", "args": {"path": path}} for path in PATHS]
        said = interrupt({"action_requests": actions})["decisions"]
        return {
            "done": [
                await gateway.run("delete_file", {"path": path}, CALLER, lambda path=path: delete_file(path))
                for path, each in zip(PATHS, said, strict=True)
                if each["type"] == "approve"
            ]
        }

    graph = StateGraph(Files).add_node("clean", clean).set_entry_point("clean")
    thread: Any = {"configurable": {"thread_id": "1"}}
    async with AsyncSqliteSaver.from_conn_string("checkpoints.db") as saver:
        compiled = graph.compile(checkpointer=saver)
        found: Any = {"__interrupt__": (await compiled.aget_state(thread)).interrupts}
        if not is_resumed:
            found = await compiled.ainvoke({"done": []}, thread)
        command = await gateway.answer(found, CALLER)
        return command is not None and len((await compiled.ainvoke(command, thread))["done"]) == len(PATHS)


FRAMEWORKS: dict[str, Callable[[GatewayStore, bool], Awaitable[bool]]] = {
    each.__name__: each
    for each in (pydantic_ai, openai_agents, langchain, human_in_the_loop, human_in_the_loop_per_call, langgraph)
}


async def main(framework: str, url: str, verb: str) -> None:
    async with GatewayStore(url, redis_url="") as store:
        is_done = await FRAMEWORKS[framework](store, verb == "resume")
        print("done" if is_done else "pending", flush=True)
        if verb == "begin":
            await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
