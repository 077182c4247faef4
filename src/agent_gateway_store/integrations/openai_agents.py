"""For agents of the OpenAI Agents SDK: function tools are judged, approved and recorded. Extra: `openai-agents`."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from cachetools import TTLCache

from agent_gateway_store.encoding.canonical import hash_json, members_once
from agent_gateway_store.encoding.plain import code_of
from agent_gateway_store.errors import needs_extra
from agent_gateway_store.integrations.guard import (
    UNREADABLE,
    CallGuard,
    CallPendingError,
    CallRefusedError,
    ReleasedCall,
    Verdict,
    last_asked,
)
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import ToolCall

with needs_extra("agent_gateway_store.integrations.openai_agents", extra="openai-agents"):
    from agents import (
        FunctionTool,
        RunContextWrapper,
        RunState,
        ToolGuardrailFunctionOutput,
        ToolInputGuardrail,
        ToolInputGuardrailData,
        ToolOriginType,
    )
    from agents.tool import (
        get_function_tool_origin,
        maybe_invoke_function_tool_failure_error_function,
        set_function_tool_failure_error_function,
    )
    from agents.tool_context import ToolContext

if TYPE_CHECKING:
    from agents.mcp import MCPServer, MCPToolCustomDataContext

__all__ = ["CallGuard", "GatewayTools", "Verdict"]

# The SDK asks whether a call needs an approval, and then calls: at once, but for guardrails, which may ask a model.
_RELEASED_S = 60.0
# Chosen: far more calls than one process makes side by side. One that falls out is asked for anew.
_RELEASED_CALLS = 10_000
_UNREADABLE = (
    "The arguments are not a JSON object with each name once, so the call was not run: "
    "call again with arguments of the schema."
)
# What MCP servers answered within one call, which may make others: the context, and whether it is an error.
_mcp_answers: ContextVar[list[tuple[object, bool]] | None] = ContextVar("_mcp_answers", default=None)


class GatewayTools:
    """Function tools that run if the policy allows it or a human approves; each call leaves one audit event.

    A call that waits for a human interrupts the run. Keep `result.to_state()` as text; later, in any process, `answer`
    the state by what humans have decided, and run it. What the host approves in the state itself releases nothing.

    Args:
        guard: Judges, approves and records.
        identify: Returns the caller, given the `context` of the run.
        server: Name of the agent's tools in the record. An approval releases the tool of this server and name, so give
            agents with different tools of one name each a server of its own.
    """

    def __init__(self, guard: CallGuard, identify: Callable[[Any], CallerIdentity], *, server: str = "agent") -> None:
        self._guard, self._identify, self._server = guard, identify, server
        self._judged: TTLCache[str, ReleasedCall | CallRefusedError] = TTLCache(_RELEASED_CALLS, ttl=_RELEASED_S)
        self._tools: dict[str, FunctionTool] = {}

    def wrap(self, *tools: FunctionTool, mcp_servers: Iterable[MCPServer] = ()) -> list[Any]:
        """Return the tools as an agent takes them; their own `needs_approval` gives way to the policy.

        Args:
            tools: Function tools, those of MCP servers among them (`MCPUtil.get_all_function_tools`).
            mcp_servers: The servers of those, without retries. Each one's `custom_data_extractor` is wrapped, since
                only it sees whether an answer is an error.

        Raises:
            TypeError: One is no function tool, so it runs where nobody can judge it.
            ValueError: Two different tools have one name, so an approval would release either; or one is a tool of an
                MCP server that is not given, or that calls again what fails. Servers of one name cannot be told apart:
                of one that is not given, every answer is recorded as an error.
        """
        servers = list(mcp_servers)
        names = {_name_of(server) for server in servers}
        for server in servers:
            if getattr(server, "max_retry_attempts", 0) != 0:
                raise ValueError(
                    f"The MCP server {_name_of(server)} calls again what fails, so one approval could run a call "
                    "several times: make it with max_retry_attempts=0."
                )
        added: dict[str, FunctionTool] = {}
        for tool in tools:
            if not isinstance(tool, FunctionTool):
                raise TypeError(
                    f"A {type(tool).__name__} runs where the gateway cannot judge it: wrap function tools only."
                )
            origin = get_function_tool_origin(tool)
            if origin is not None and origin.type is ToolOriginType.MCP and origin.mcp_server_name not in names:
                raise ValueError(
                    f"{tool.qualified_name} is a tool of an MCP server, whose errors would pass for successes: "
                    "give wrap that server, too, as mcp_servers=[server]."
                )
            known = self._tools.get(tool.qualified_name) or added.setdefault(tool.qualified_name, tool)
            if _code(known) != _code(tool):
                raise ValueError(
                    f"Two different tools are named {tool.qualified_name}, and an approval would release either: "
                    "give each its own name, or its own GatewayTools with a server of its own."
                )
        self._tools |= added
        for server in servers:
            before = getattr(server, "custom_data_extractor", None)
            if not isinstance(before, _Extractor):
                server.custom_data_extractor = _Extractor(before)
        return [self._wrapped(tool) for tool in tools]

    async def answer(self, state: RunState[Any, Any], context: Any = None) -> bool:
        """Answer the interruptions of a run from the store; run the state at once after that.

        Approved calls run, denied ones tell the model who denied them and why. Interruptions of other tools are left.

        Args:
            state: Of an agent that has the tools of this object.
            context: That of the run, for `identify`.

        Returns:
            False while a call still waits for a human.
        """
        is_answered = True
        for item in state.get_interruptions():
            name, call_id = item.qualified_name, item.call_id
            if name not in self._tools or call_id is None:
                continue
            try:
                judged = await self._judge(name, context, item.arguments, call_id, is_resumed=True)
            except CallPendingError:
                is_answered = False
                continue
            if isinstance(judged, CallRefusedError):
                state.reject(item, rejection_message=str(judged))
            else:
                state.approve(item)
        return is_answered

    async def _judge(
        self,
        name: str,
        context: Any,
        given: str | dict[str, Any] | None,
        call_id: str,
        *,
        is_taken: bool = False,
        is_resumed: bool = False,
    ) -> ReleasedCall | CallRefusedError:
        """Return the call if it may run, or why not. Asked again, the SDK must not spend a second approval."""
        arguments, is_readable = (given, True) if isinstance(given, dict) else _read(given)
        caller, call = self._identify(context), ToolCall(server=self._server, tool=name, arguments=arguments)
        key = _key(caller, call, call_id)
        judged = self._judged.pop(key, None)
        if not is_readable:
            # It may be released: before it calls, the SDK shows what it has read, of two members of one name the last.
            await _drop(judged, _UNREADABLE, rule=UNREADABLE)
            judged = CallRefusedError(_UNREADABLE) if judged else await self._guard.deny(call, caller, _UNREADABLE)
        elif judged is None:
            # The state holds no more of what the run waits for; the guard has events and approvals named apart.
            question = hash_json(key)
            earlier = partial(last_asked, caller=caller, request_id=question) if is_resumed else None
            try:
                judged = await self._guard.release(call, caller, question=question, earlier=earlier)
            except CallRefusedError as exc:
                judged = exc
        if not is_taken:
            self._judged[key] = judged
        return judged

    def _watched(self, name: str, guardrail: ToolInputGuardrail[Any]) -> ToolInputGuardrail[Any]:
        """Return `guardrail`; what it stops was released before, so it is recorded here."""

        @wraps(guardrail.guardrail_function)
        async def run(data: ToolInputGuardrailData) -> ToolGuardrailFunctionOutput:
            is_passed = False
            try:
                output = await guardrail.run(data)
                is_passed = output.behavior["type"] == "allow"
            finally:
                if not is_passed:
                    arguments, _ = _read(data.context.tool_arguments)
                    call = ToolCall(server=self._server, tool=name, arguments=arguments)
                    key = _key(self._identify(data.context.context), call, data.context.tool_call_id)
                    await _drop(self._judged.pop(key, None), "an input guardrail of the tool stopped it.")
            return output

        return ToolInputGuardrail(guardrail_function=run, name=guardrail.name)

    def _wrapped(self, tool: FunctionTool) -> FunctionTool:
        # As text for the model, which the SDK makes of it, an error would pass for a success.
        raising = set_function_tool_failure_error_function(copy.copy(tool), None)
        origin = get_function_tool_origin(tool)
        is_mcp = origin is not None and origin.type is ToolOriginType.MCP

        async def needs_approval(context: RunContextWrapper[Any], arguments: dict[str, Any], call_id: str) -> bool:
            try:
                await self._judge(tool.qualified_name, context.context, arguments, call_id)
            except CallPendingError:
                return True
            return False

        def invoke(context: ToolContext[Any], given: str) -> Awaitable[Any]:
            # Now, and not when the coroutine begins: in between, the SDK starts the clock by which it will cancel it.
            timeout_s = math.inf if tool.timeout_seconds is None else tool.timeout_seconds
            return run(context, given, deadline=asyncio.get_running_loop().time() + timeout_s)

        async def run(context: ToolContext[Any], given: str, *, deadline: float) -> Any:
            try:
                judged = await self._judge(
                    tool.qualified_name, context.context, given, context.tool_call_id, is_taken=True
                )
            except CallPendingError as exc:
                return str(exc)
            if isinstance(judged, CallRefusedError):
                return str(judged)
            answers: list[tuple[object, bool]] = []
            _mcp_answers.set(answers)

            def is_error(_result: Any) -> bool:
                own = [failed for answered, failed in answers if answered is context]
                # Of an MCP tool, an answer that no extractor saw may be an error.
                return any(own) or (is_mcp and not own)

            try:
                return await judged.run(
                    lambda: raising.on_invoke_tool(context, given),
                    is_error=is_error,
                    deadline=deadline,
                )
            except Exception as exc:
                text = await maybe_invoke_function_tool_failure_error_function(
                    function_tool=tool, context=context, error=exc
                )
                if text is None:
                    raise
                return text

        guardrails = [self._watched(tool.qualified_name, each) for each in tool.tool_input_guardrails or ()]
        return dataclasses.replace(
            tool, on_invoke_tool=invoke, needs_approval=needs_approval, tool_input_guardrails=guardrails or None
        )


class _Extractor:
    """The `custom_data_extractor` of an MCP server: notes what is an error, which the SDK hands on as any content."""

    def __init__(self, before: Callable[[MCPToolCustomDataContext], Any] | None) -> None:
        self._before = before

    def __call__(
        self, result: MCPToolCustomDataContext
    ) -> Awaitable[Mapping[str, Any] | None] | Mapping[str, Any] | None:
        answers = _mcp_answers.get()
        if answers is not None:
            answers.append((result.run_context, bool(result.is_error)))
        return self._before(result) if self._before is not None else None


def _name_of(server: MCPServer) -> str | None:
    """Return the name of a server as its tools have it: without what is secret in a URL."""
    from agents.mcp import MCPUtil
    from mcp.types import Tool

    tool = MCPUtil.to_function_tool(Tool(name="any", inputSchema={}), server, convert_schemas_to_strict=False)
    origin = get_function_tool_origin(tool)
    return None if origin is None else origin.mcp_server_name


def _key(caller: CallerIdentity, call: ToolCall, call_id: str) -> str:
    return json.dumps([caller.org_id, caller.caller_id, call.tool, call_id, call.arguments], sort_keys=True)


async def _drop(judged: ReleasedCall | CallRefusedError | None, reason: str, **fields: Any) -> None:
    # A refusal is recorded already.
    if isinstance(judged, ReleasedCall):
        await judged.drop(reason, **fields)


def _code(tool: FunctionTool) -> object:
    # Hosts may build a tool, closure and schema included, for each run; only the code stays the same.
    return code_of(getattr(tool, "__wrapped__", None) or tool.on_invoke_tool) or tool.params_json_schema


def _read(text: str | None) -> tuple[dict[str, Any], bool]:
    """Return the arguments as the SDK shows them before it calls, none if it cannot, and whether they may be judged."""
    for hook in (members_once, dict):
        try:
            # The tool reads the same text, and may take the other one of two members of one name.
            found = json.loads(text or "{}", object_pairs_hook=hook)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found, hook is members_once
    return {}, False
