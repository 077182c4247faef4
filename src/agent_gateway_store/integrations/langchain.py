"""For agents of LangChain and graphs of LangGraph: tool calls are judged, approved and recorded. Extra: `langchain`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from agent_gateway_store.errors import MissingExtraError
from agent_gateway_store.integrations.guard import CallGuard, CallPendingError, CallRefusedError, Verdict, approval_of
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import ApprovalStatus, ToolCall
from agent_gateway_store.store import GatewayStore

try:
    from langchain.agents.middleware import AgentMiddleware
    from langchain.agents.middleware.types import ToolCallRequest
    from langchain_core.messages import ToolMessage
    from langgraph.types import Command, interrupt
except ImportError as exc:
    raise MissingExtraError("agent_gateway_store.integrations.langchain", extra="langchain") from exc

__all__ = ["CallGuard", "GatewayMiddleware", "Verdict", "resume"]


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

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]]
    ) -> ToolMessage | Command[Any]:
        """Run one tool call, or answer why it does not run."""
        asked = request.tool_call
        call = ToolCall(server=self._server, tool=asked["name"], arguments=asked["args"])
        caller = self._identify(request)
        while True:
            try:
                return await self._guard.run(call, caller, lambda: handler(request))
            except CallPendingError as exc:
                if not self._interrupts:
                    return _error(str(exc), request)
                # It raises, and the node runs again from its top. Resumed before the decision, it returns instead, and
                # the call is asked for once more.
                interrupt({**exc.facts, "tool": call.tool})
            except CallRefusedError as exc:
                return _error(str(exc), request)


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
        # What is answered releases nothing: the call is acquired anew.
        answers[each.id] = str(found.status)
    return Command(resume=answers) if answers else None
