"""One core for the adapters of agent frameworks, and these with scripted models, ended and resumed elsewhere."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from agents import Agent as OpenAIAgent
from agents import RunConfig, Runner, RunState, function_tool
from agents.testing import ScriptedModel, assistant_message, function_call
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool as langchain_tool
from langgraph.checkpoint.memory import InMemorySaver
from pydantic_ai import Agent, DeferredToolRequests, FunctionToolset
from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from agent_gateway_store import AuditEvent, CallerIdentity, Decision, GatewayStore, StoreSettings, ToolCall, TrustLevel
from agent_gateway_store.integrations import langchain as for_langchain
from agent_gateway_store.integrations import openai_agents as for_openai
from agent_gateway_store.integrations import pydantic_ai as for_pydantic_ai
from agent_gateway_store.integrations.guard import CallGuard, CallPendingError, CallRefusedError, Verdict
from builders import CALL, make_request

CALLER = CallerIdentity(
    caller_id="dev-agent", role="developer", trust_level=TrustLevel.MEDIUM, environment="test", org_id="acme"
)
READ = ToolCall(server="files", tool="read_file", arguments={"path": "secret.txt"})


def judge(_caller: CallerIdentity, call: ToolCall) -> Verdict:
    """Reading is allowed, deleting needs a human, the rest is denied."""
    decisions = {"read_file": Decision.ALLOW, "delete_file": Decision.APPROVAL_REQUIRED}
    decision = decisions.get(call.tool, Decision.DENY)
    return Verdict(decision=decision, rule=f"{call.tool} rule", reason=f"{call.tool} reason", risk_score=0.4)


@dataclass
class Bench:
    """A guard on an open store, and what ran."""

    store: GatewayStore
    ran: list[str] = field(default_factory=list)

    def guard(self, policy: Any = judge, **options: Any) -> CallGuard:
        return CallGuard(self.store, policy, **options)

    async def run(self, call: ToolCall, guard: CallGuard | None = None) -> str:
        async def tool() -> str:
            self.ran.append(call.tool)
            return "done"

        return await (guard or self.guard()).run(call, CALLER, tool, session_id="s-1")

    async def decide(self, verb: str) -> None:
        (request,) = await self.store.approvals.list_requests("PENDING")
        await getattr(self.store.approvals, verb)(approval_id=request.approval_id, approver_id="alice", note="seen")

    async def events(self) -> list[AuditEvent]:
        """Oldest first."""
        return list(reversed(await self.store.audit.list_recent()))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with GatewayStore(f"sqlite:///{tmp_path}/gateway.db", redis_url="") as store:
        yield Bench(store)


async def test_an_allowed_call_runs_and_leaves_one_event(bench: Bench) -> None:
    """With the verdict, the fields that were given, and no argument in clear."""
    assert await bench.run(READ) == "done"
    (event,) = await bench.events()
    assert (event.decision, event.execution_status, event.matched_policy_rule) == ("ALLOW", "SUCCESS", "read_file rule")
    assert (event.session_id, event.risk_score, event.org_id) == ("s-1", 0.4, "acme")
    assert event.sanitized_args == {"path": "[hidden]"}


async def test_what_a_human_approves_runs_once(bench: Bench) -> None:
    """Pending, and no event for asking again; then one run, with its outcome recorded."""
    for _ in range(2):
        with pytest.raises(CallPendingError, match="call again with the same arguments") as pending:
            await bench.run(CALL)
    await bench.decide("approve")
    assert await bench.run(CALL) == "done"
    with pytest.raises(CallPendingError):
        await bench.run(CALL)

    asked, ran, _ = await bench.events()
    assert (asked.execution_status, ran.execution_status, bench.ran) == (None, "SUCCESS", ["delete_file"])
    assert (ran.approver_id, ran.approval_id) == ("alice", pending.value.approval.approval_id)
    assert (await bench.store.approvals.get(approval_id=pending.value.approval.approval_id)).outcome == "SUCCESS"


async def test_refused_calls_do_not_run(bench: Bench) -> None:
    """Denied by the policy, by a human; or a callback fails or returns something else."""
    with pytest.raises(CallRefusedError, match="format reason"):
        await bench.run(ToolCall(server="files", tool="format"))
    with pytest.raises(CallPendingError):
        await bench.run(CALL)
    await bench.decide("deny")
    with pytest.raises(CallRefusedError, match=r"DENIED by alice.* Note: seen"):
        await bench.run(CALL)

    async def broken(_caller: CallerIdentity, call: ToolCall) -> Verdict:
        raise ValueError(call.arguments["path"])

    def unseen(call: ToolCall) -> dict[str, Any]:
        raise KeyError(call.arguments["path"])

    guards = [bench.guard(broken), bench.guard(lambda *_: True), bench.guard(sanitize=unseen)]
    for guard in guards:
        with pytest.raises(CallRefusedError, match="The gateway failed"):
            await bench.run(READ, guard)
    events = await bench.events()
    assert [str(each.decision) for each in events] == ["DENY", "APPROVAL_REQUIRED", *["DENY"] * 4]
    assert {each.execution_status for each in events} == {None}
    assert events[2].approver_id == "alice"
    assert bench.ran == []
    assert not any("secret.txt" in each.model_dump_json() for each in events)


async def test_a_tool_that_fails_is_recorded(bench: Bench) -> None:
    """The error is the caller's; the approval knows how its use ended."""

    async def fail() -> str:
        raise ConnectionError

    with pytest.raises(CallPendingError) as pending:
        await bench.run(CALL)
    await bench.decide("approve")
    with pytest.raises(ConnectionError):
        await bench.guard().run(CALL, CALLER, fail)
    assert (await bench.events())[-1].execution_status == "TOOL_ERROR"
    stored = await bench.store.approvals.get(approval_id=pending.value.approval.approval_id)
    assert (stored.status, stored.outcome) == ("USED", "TOOL_ERROR")


async def test_nothing_runs_without_a_record(tmp_path: Path) -> None:
    """In strict mode the database must answer first; whatever the verdict, the model reads that it does not."""
    settings = StoreSettings(audit_mode="strict")
    store = await GatewayStore(f"sqlite:///{tmp_path}/gateway.db", redis_url="", settings=settings).open()
    bench = Bench(store)
    await store.database.engine.dispose()
    (tmp_path / "gateway.db").write_bytes(b"no database" * 1000)
    denied, unreadable = (
        READ.model_copy(update=each) for each in ({"tool": "format"}, {"arguments": {"path": iter(())}})
    )
    for call in (READ, CALL, denied, unreadable):
        with pytest.raises(CallRefusedError, match="cannot reach its records"):
            await bench.run(call)
    assert "cannot reach its records" in (await pydantic_agent(bench, "format_disk").run("format it")).output
    decided = make_request(status="DENIED")
    assert "cannot reach its records" in await bench.guard().refuse(CALL, CALLER, decided)
    assert bench.ran == []
    await store.close()


def calling(name: str) -> FunctionModel:
    """A model that calls one tool, and then says what the tool answered."""

    def answer(messages: list[ModelMessage], _info: AgentInfo) -> ModelResponse:
        last = messages[-1].parts[-1]
        if last.part_kind in ("tool-return", "retry-prompt"):
            return ModelResponse(parts=[TextPart(f"It said: {last.content}")])
        return ModelResponse(parts=[ToolCallPart(name, {"path": "a.txt"}, tool_call_id="c-1")])

    return FunctionModel(answer)


def pydantic_agent(bench: Bench, name: str) -> Agent[None, Any]:
    async def delete_file(path: str) -> str:
        bench.ran.append(path)
        return f"{path} is deleted"

    async def format_disk(path: str) -> str:
        raise AssertionError

    toolset = for_pydantic_ai.GatewayToolset(
        FunctionToolset([delete_file, format_disk]), bench.guard(), lambda _ctx: CALLER, server="files"
    )
    return Agent(calling(name), toolsets=[toolset], output_type=[str, DeferredToolRequests])


class TestPydanticAi:
    """A run that ended pending is resumed from its message history, by an agent that was built anew."""

    async def test_a_run_is_resumed_after_a_denial(self, bench: Bench) -> None:
        ended = await pydantic_agent(bench, "delete_file").run("delete a.txt")
        assert isinstance(ended.output, DeferredToolRequests)
        assert await for_pydantic_ai.results_of(bench.store, ended.output) is None
        kept = ModelMessagesTypeAdapter.dump_json(ended.all_messages()), pickle.dumps(ended.output)
        await bench.decide("deny")

        history, requests = ModelMessagesTypeAdapter.validate_json(kept[0]), pickle.loads(kept[1])
        results = await for_pydantic_ai.results_of(bench.store, requests)
        resumed = await pydantic_agent(bench, "delete_file").run(message_history=history, deferred_tool_results=results)
        assert "DENIED by alice" in resumed.output
        assert bench.ran == []

    async def test_an_answer_that_nobody_gave_releases_nothing(self, bench: Bench) -> None:
        """The host says that all is approved; no human has."""
        ended = await pydantic_agent(bench, "delete_file").run("delete a.txt")
        again = await pydantic_agent(bench, "delete_file").run(
            message_history=ended.all_messages(), deferred_tool_results=ended.output.build_results(approve_all=True)
        )
        assert isinstance(again.output, DeferredToolRequests)
        assert bench.ran == []


def langchain_agent(bench: Bench, saver: InMemorySaver, **options: Any) -> Any:
    @langchain_tool
    async def delete_file(path: str) -> str:
        """Delete a file."""
        bench.ran.append(path)
        return f"{path} is deleted"

    class Scripted(GenericFakeChatModel):
        def bind_tools(self, *_args: Any, **_options: Any) -> Any:
            # It is asked what comes next, not what came before: maybe the call was made in another process.
            return RunnableLambda(lambda messages: AIMessage("end") if is_answered(messages) else asked)

    def is_answered(messages: Any) -> bool:
        return isinstance(messages[-1], ToolMessage)

    asked = AIMessage("", tool_calls=[{"name": "delete_file", "args": {"path": "a.txt"}, "id": "c-1"}])
    middleware = for_langchain.GatewayMiddleware(bench.guard(), lambda _request: CALLER, server="files", **options)
    return create_agent(
        Scripted(messages=iter(())),
        [delete_file],
        middleware=[middleware],
        checkpointer=saver,
    )


class TestLangChain:
    """A graph that was interrupted goes on in an agent that was built anew, on the same checkpoints."""

    config: ClassVar[Any] = {"configurable": {"thread_id": "t-1"}}
    question: ClassVar[Any] = {"messages": [("user", "delete a.txt")]}

    @staticmethod
    def answer(state: Any) -> ToolMessage:
        (found,) = [each for each in state["messages"] if isinstance(each, ToolMessage)]
        return found

    async def test_resumed_too_early_it_is_interrupted_again(self, bench: Bench) -> None:
        """A command that nobody's decision stands behind releases nothing."""
        saver = InMemorySaver()
        state = await langchain_agent(bench, saver).ainvoke(self.question, self.config)
        (first,) = state["__interrupt__"]
        command = for_langchain.Command(resume={first.id: "APPROVED"})
        state = await langchain_agent(bench, saver).ainvoke(command, self.config)
        (second,) = state["__interrupt__"]
        assert second.value["approval_id"] == first.value["approval_id"]
        assert bench.ran == []

    async def test_without_interrupts_the_model_reads_that_it_is_pending(self, bench: Bench) -> None:
        state = await langchain_agent(bench, InMemorySaver(), on_pending="return").ainvoke(self.question, self.config)
        assert "call again with the same arguments" in self.answer(state).content
        assert self.answer(state).status == "error"

    def test_another_word_is_refused(self, bench: Bench) -> None:
        with pytest.raises(ValueError, match='"interrupt" or "return"'):
            for_langchain.GatewayMiddleware(bench.guard(), lambda _: CALLER, on_pending="later")  # type: ignore[arg-type]


class OpenAIRun:
    """Runs of an agent that calls one tool and ends; each is built anew, and goes on from the text of a state."""

    def __init__(self, bench: Bench, *names: str) -> None:
        self.bench, self.names = bench, names

    def agent(self, *, is_resumed: bool = False) -> OpenAIAgent[None]:
        bench = self.bench

        @function_tool
        async def delete_file(path: str) -> str:
            bench.ran.append(path)
            return f"{path} is deleted"

        @function_tool
        async def read_file(path: str) -> str:
            raise ConnectionError("secret.txt")

        self.tools = tools = for_openai.GatewayTools(bench.guard(), lambda _context: CALLER, server="files")
        calls = [function_call(name, {"path": f"{n}.txt"}, call_id=f"c-{n}") for n, name in enumerate(self.names)]
        steps: list[Any] = [[assistant_message("The end.")]]
        model = ScriptedModel(steps if is_resumed else [calls, *steps])
        return OpenAIAgent("files", model=model, tools=tools.wrap(delete_file, read_file))

    async def begin(self) -> Any:
        return await Runner.run(self.agent(), "Go.", run_config=RunConfig(tracing_disabled=True))

    async def go_on(self, ended: Any, *, answered: bool | None = None) -> Any:
        """Answer from the store, expecting `answered`; None: the host approves by itself."""
        agent = self.agent(is_resumed=True)
        state = await RunState.from_string(agent, ended.to_state().to_string())
        for each in state.get_interruptions() if answered is None else ():
            state.approve(each)
        if answered is not None:
            assert await self.tools.answer(state) is answered
        return await Runner.run(agent, state, run_config=RunConfig(tracing_disabled=True))

    @staticmethod
    def outputs(ended: Any) -> list[str]:
        return [each.output for each in ended.new_items if each.type == "tool_call_output_item"]


class TestOpenAIAgents:
    """A run that was interrupted goes on from its serialised state, in an agent that was built anew."""

    async def test_what_the_host_approves_in_the_state_releases_nothing(self, bench: Bench) -> None:
        run = OpenAIRun(bench, "delete_file")
        ended = await run.go_on(await run.begin())
        assert "call again with the same arguments" in run.outputs(ended)[0]
        assert bench.ran == []

    async def test_calls_of_one_turn_are_decided_one_by_one(self, bench: Bench) -> None:
        """The approved one runs once, however often the run is resumed for the other."""
        run = OpenAIRun(bench, "delete_file", "delete_file")
        ended = await run.begin()
        first, second = await bench.store.approvals.list_requests("PENDING")
        for request in (second, first):
            await bench.store.approvals.approve(approval_id=request.approval_id, approver_id="alice")
            ended = await run.go_on(ended, answered=request is first)
        assert ended.final_output == "The end."
        assert sorted(bench.ran) == ["0.txt", "1.txt"]

    async def test_a_tool_that_fails_is_recorded_as_that(self, bench: Bench) -> None:
        """The model reads what the SDK tells it of an error."""
        ended = await (run := OpenAIRun(bench, "read_file")).begin()
        assert "error occurred while running the tool" in run.outputs(ended)[0]
        assert [event.execution_status for event in await bench.events()] == ["TOOL_ERROR"]
