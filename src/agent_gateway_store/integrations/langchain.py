"""For agents of LangChain and graphs of LangGraph: tool calls are judged, approved and recorded. Extra: `langchain`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from itertools import count
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from cachetools import LRUCache, TTLCache

from agent_gateway_store.audit.calls import run_tool
from agent_gateway_store.encoding.canonical import hash_json
from agent_gateway_store.errors import needs_extra
from agent_gateway_store.integrations.guard import (
    CallGuard,
    CallPendingError,
    CallRefusedError,
    Verdict,
    approval_of,
    copy_arguments,
)
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import ApprovalStatus, ToolCall
from agent_gateway_store.store import GatewayStore

with needs_extra("agent_gateway_store.integrations.langchain", extra="langchain"):
    from langchain.agents.middleware import AgentMiddleware
    from langchain.agents.middleware.types import ToolCallRequest
    from langchain_core.messages import AIMessage, ToolMessage
    from langgraph.errors import GraphBubbleUp, GraphInterrupt
    from langgraph.types import Command, interrupt

__all__ = ["CallGuard", "GatewayMiddleware", "Verdict", "resume"]

T = TypeVar("T")

_Key: TypeAlias = "tuple[str | None, str, str]"

# The graph is invoked right after the answer; a model may be asked before the tool runs.
_ANSWERED_S = 60.0
# Chosen: far more calls than one process answers side by side. One that falls out is asked for anew.
_ANSWERED_CALLS = 10_000
_INTERRUPTED = (
    "The tool interrupted the graph to ask something of its own, which it cannot once a human has approved it: "
    "tell its operator."
)
_ALONE = "Call it alone, without other calls in the same message, so that the graph can wait for the human."


class _Action(NamedTuple):
    call: ToolCall
    bind: str
    request_id: str
    approval: ApprovalRequest | None
    refusal: str = ""


def _actions(value: Any) -> list[Mapping[str, Any]]:
    """Return the actions that an interrupt asks about, of both forms of `HumanInTheLoopMiddleware`."""
    if not isinstance(value, Mapping):
        return []
    asked = [value] if value.get("type") == "tool_approval" else value.get("action_requests")
    found = asked if isinstance(asked, list | tuple) else ()
    is_ours = all(isinstance(each, Mapping) and {"name", "args"} <= each.keys() for each in found)
    return list(found) if is_ours else []


def _key(call: ToolCall, caller: CallerIdentity) -> _Key:
    # Not their JSON: two calls whose JSON is the same may differ.
    return caller.org_id, caller.caller_id, hash_json([call.server, call.tool, call.arguments])


class GatewayMiddleware(AgentMiddleware[Any, Any]):
    """Runs tool calls that the policy allows or a human approves; each leaves one audit event.

    A refused call is a tool message with the status "error", which the model reads. Invoke the agent by `ainvoke` or
    `astream`.

    Args:
        guard: Judges, approves and records.
        identify: Returns the caller, given the request of the tool call.
        server: Name of the agent's tools in the record.
        on_pending: "interrupt": a call that waits for a human interrupts the graph, which needs a checkpointer, and
            `resume` gives the command that goes on, in any process. "return": the model reads that the call is pending.
    """

    def __init__(
        self,
        guard: CallGuard,
        identify: Callable[[ToolCallRequest], CallerIdentity],
        *,
        server: str = "agent",
        on_pending: Literal["interrupt", "return"] = "interrupt",
    ) -> None:
        super().__init__()
        if on_pending not in ("interrupt", "return"):
            raise ValueError(f'on_pending must be "interrupt" or "return", not {on_pending!r}.')
        self._guard, self._identify, self._server = guard, identify, server
        self._interrupts = on_pending == "interrupt"
        # What binds the approval of each action that was answered, and whose call has not come yet.
        self._answered: TTLCache[_Key, list[str]] = TTLCache(_ANSWERED_CALLS, ttl=_ANSWERED_S)
        # Of those whose call came, and then waited for a human once more, who may take hours.
        self._pending: LRUCache[_Key, list[str]] = LRUCache(_ANSWERED_CALLS)

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]]
    ) -> ToolMessage | Command[Any]:
        """Run one tool call, or answer why it does not run."""
        tool, arguments, caller = request.tool_call["name"], request.tool_call["args"], self._identify(request)
        try:
            # Other tools reach the state, and with it the arguments, while this call waits for a human.
            copied = copy_arguments(arguments)
        except CallRefusedError as exc:
            call = ToolCall(server=self._server, tool=tool, arguments=arguments)
            return _error(str(await self._guard.deny(call, caller, str(exc))), request)
        own = request.override(tool_call={**request.tool_call, "args": copied})
        is_shared = self._interrupts and _is_shared(request)
        try:
            return await self._run(
                tool,
                copied,
                caller,
                lambda: handler(own),
                is_error=_is_error,
                interrupts=self._interrupts and not is_shared,
            )
        except (CallPendingError, CallRefusedError) as exc:
            is_alone = not is_shared or isinstance(exc, CallRefusedError)
            return _error(str(exc) if is_alone else f"{exc} {_ALONE}", request)

    async def run(
        self, tool: str, arguments: dict[str, Any], caller: CallerIdentity, body: Callable[[], Awaitable[T]]
    ) -> T:
        """Run `body` as one call, in a node of a graph that does nothing else: the node runs again from its top.

        Raises:
            CallPendingError: It waits for a human, and `on_pending` is "return".
            CallRefusedError: It must not run; or a human approved it, and it interrupts the graph by itself.
        """
        return await self._run(tool, arguments, caller, body, interrupts=self._interrupts)

    async def _run(
        self,
        tool: str,
        arguments: dict[str, Any],
        caller: CallerIdentity,
        body: Callable[[], Awaitable[T]],
        *,
        is_error: Callable[[T], bool] | None = None,
        interrupts: bool,
    ) -> T:
        call = ToolCall(server=self._server, tool=tool, arguments=arguments)
        key = _key(call, caller)
        bind = self._take_bind(key)
        try:
            released = await self._guard.release(call, caller, bind=bind, earlier=_answered if interrupts else None)
            return await released.run(
                (lambda: _without_interrupts(body)) if released.is_approved else body,
                is_error=is_error,
                open_ends=(GraphBubbleUp,),
            )
        except CallPendingError as exc:
            if bind:
                self._pending[key] = [*self._pending.get(key, ()), bind]
            if interrupts:
                # It raises, since its answers were taken, and the node runs again from its top.
                interrupt({**exc.facts, "tool": call.tool})
            raise

    def _take_bind(self, key: _Key) -> str:
        for known in (self._pending, self._answered):
            if binds := known.pop(key, None):
                if len(binds) > 1:
                    known[key] = binds[1:]
                return binds[0]
        return ""

    async def answer(self, state: Mapping[str, Any], caller: CallerIdentity) -> Command[Any] | None:
        """Answer the interrupts of `HumanInTheLoopMiddleware`, or of that form, by what humans decide in the store.

        Each action is asked for once, in whatever process. An approval is used up when its call runs. Invoke the graph
        by the command at once, in this process: what is approved runs by this middleware, which records it. A node of
        your own runs it by `run`.

        Args:
            state: What `ainvoke` returned, with its interrupts. Those of another form are left.
            caller: Who makes the calls.

        Returns:
            The command by which the graph goes on; None while an action waits for a human.
        """
        asked = [each for each in state.get("__interrupt__", ()) if _actions(each.value)]
        decided: dict[str, list[_Action]] = {
            each.id: [await self._ask(each.id, n, action, caller) for n, action in enumerate(_actions(each.value))]
            for each in asked
        }
        actions = [action for several in decided.values() for action in several]
        if not actions or any(a.approval and a.approval.status is ApprovalStatus.PENDING for a in actions):
            return None
        answers: dict[str, Any] = {}
        for each in asked:
            try:
                said = [await self._decide(action, caller) for action in decided[each.id]]
            except CallPendingError:
                # The policy asks by now. The next answer finds the approval.
                return None
            answers[each.id] = {"decisions": said} if "action_requests" in each.value else said[0]
        return Command(resume=answers)

    async def _ask(self, interrupt_id: str, n: int, action: Mapping[str, Any], caller: CallerIdentity) -> _Action:
        call = ToolCall(server=self._server, tool=action["name"], arguments=action["args"])
        # LangGraph gives two interrupts of one task, one after the other, the same id.
        bind = hash_json([interrupt_id, n, _key(call, caller)])
        for attempt in count():
            request_id = f"{bind[:32]}-{attempt}"
            try:
                approval = await self._guard.ask(call, caller, request_id=request_id, bind=bind)
            except CallRefusedError as exc:
                return _Action(call, bind, request_id, None, str(exc))
            # Used up by a run whose end the graph never got: never twice, so a human is asked again.
            if approval is None or approval.status is not ApprovalStatus.USED:
                break
        return _Action(call, bind, request_id, approval)

    async def _decide(self, action: _Action, caller: CallerIdentity) -> dict[str, Any]:
        """Answer one action; all of its interrupt are decided. CallPendingError if it waits for a human after all."""
        text, approval = action.refusal, action.approval
        try:
            if approval is not None and approval.status is not ApprovalStatus.APPROVED:
                text = await self._guard.refuse(action.call, caller, approval)
            elif not text:
                if approval is None:
                    # For its refusal, if the policy denies it. Nothing is spent: it is released anew when it runs.
                    await self._guard.release(action.call, caller, bind=action.bind, request_id=action.request_id)
                else:
                    # Where nobody was asked, nothing is bound: any process finds what the policy may ask by the run.
                    key = _key(action.call, caller)
                    others = [each for each in self._answered.get(key, ()) if each != action.bind]
                    # Set anew, so that the time of all of them begins now.
                    self._answered[key] = [*others, action.bind]
        except CallRefusedError as exc:
            text = str(exc)
        return {"type": "reject", "message": text} if text else {"type": "approve"}


async def _answered(store: GatewayStore) -> ApprovalRequest | None:
    """Return the approval that the last answer names.

    All answers to our own interrupts are taken: LangGraph hands answers out by their number, none to the tool.
    """
    answer = None
    with suppress(GraphInterrupt, KeyError, RuntimeError):
        while True:
            answer = interrupt(None)
    return await approval_of(store, answer)


async def _without_interrupts(body: Callable[[], Awaitable[T]]) -> T:
    """Run what a human approved. It may not interrupt: its node would begin anew, with an approval that is used up."""
    try:
        return await run_tool(body)
    except GraphInterrupt:
        raise CallRefusedError(_INTERRUPTED) from None


def _is_error(result: Any) -> bool:
    if isinstance(result, list | tuple):
        return any(_is_error(each) for each in result)
    if isinstance(result, Command):
        update = result.update
        return _is_error(update.get("messages") if isinstance(update, Mapping) else update)
    return isinstance(result, ToolMessage) and result.status == "error"


def _is_shared(request: ToolCallRequest) -> bool:
    """Whether one node runs this call and others: to interrupt it would run all of them again from the top."""
    config, state = getattr(request.runtime, "config", None) or {}, request.state
    # `create_agent` sends each call to a node of its own.
    if "__pregel_push" in config.get("metadata", {}).get("langgraph_path", ()):
        return False
    fields = state if isinstance(state, Mapping) else getattr(state, "__dict__", {})
    lists = [each for each in (state, *fields.values()) if isinstance(each, list)]
    for messages in lists:
        # As `ToolNode` finds them.
        calls = next((each.tool_calls for each in reversed(messages) if isinstance(each, AIMessage)), [])
        if len(calls) > 1 and request.tool_call["id"] in [each["id"] for each in calls]:
            return True
    return False


def _error(text: str, request: ToolCallRequest) -> ToolMessage:
    return ToolMessage(
        content=text, name=request.tool_call["name"], tool_call_id=request.tool_call["id"], status="error"
    )


async def resume(store: GatewayStore, state: Mapping[str, Any]) -> Command[Any] | None:
    """Return the command by which an interrupted agent goes on; None while one of its calls waits for a human.

    Args:
        store: Where the approvals are.
        state: What `ainvoke` returned, with its interrupts.
    """
    answers: dict[str, Any] = {}
    for each in state.get("__interrupt__", ()):
        found = await approval_of(store, each.value)
        if found is None:
            continue
        if found.status is ApprovalStatus.PENDING:
            return None
        # What is answered releases nothing: the call is acquired anew, unless this approval was denied.
        answers[each.id] = {"approval_id": str(found.approval_id), "status": str(found.status)}
    return Command(resume=answers) if answers else None
