"""For agents of Pydantic AI: the tools of a toolset are judged, approved and recorded. Extra: `pydantic-ai`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent_gateway_store.errors import needs_extra
from agent_gateway_store.integrations.guard import (
    CallGuard,
    CallPendingError,
    CallRefusedError,
    Verdict,
    approval_of,
    refusal_text,
)
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import ApprovalStatus, ToolCall
from agent_gateway_store.store import GatewayStore

with needs_extra("agent_gateway_store.integrations.pydantic_ai", extra="pydantic-ai"):
    from pydantic_ai import (
        ApprovalRequired,
        CallDeferred,
        DeferredToolRequests,
        DeferredToolResults,
        RunContext,
        ToolDenied,
    )
    from pydantic_ai.exceptions import ToolFailed
    from pydantic_ai.toolsets import ToolsetTool, WrapperToolset

__all__ = ["CallGuard", "GatewayToolset", "Verdict", "results_of"]


@dataclass
class GatewayToolset(WrapperToolset[Any]):
    """A toolset whose calls run if the policy allows them or a human approves them; each leaves one audit event.

    A call that waits for a human ends the run with `DeferredToolRequests`, so that must be among the agent's output
    types. The run is resumed, in any process, from its message history and what `results_of` returns; the call is
    judged and acquired anew then, so an answer that nobody gave releases nothing. A refused call is a failed tool
    result, which the model reads.

    Args:
        wrapped: The tools.
        guard: Judges, approves and records.
        identify: Returns the caller, given the context of the run.
        server: Name of the toolset in the record. An approval releases the tool of this server and name, so give two
            toolsets with different tools of one name each a server of its own.
    """

    guard: CallGuard
    identify: Callable[[RunContext[Any]], CallerIdentity]
    server: str = "agent"

    async def call_tool(
        self, name: str, tool_args: dict[str, Any], ctx: RunContext[Any], tool: ToolsetTool[Any]
    ) -> Any:
        """Run one tool call.

        Raises:
            ApprovalRequired: A human is asked; the metadata of the deferred call names the approval.
            ToolFailed: It was refused.
        """
        call = ToolCall(server=self.server, tool=name, arguments=tool_args)
        try:
            released = await self.guard.release(call, self.identify(ctx), session_id=ctx.conversation_id)
            # The history may hold the same objects as `tool_args`, and other tools reach it while this call waits.
            return await released.run(
                lambda: self.wrapped.call_tool(name, released.arguments, ctx, tool),
                open_ends=(ApprovalRequired, CallDeferred),
            )
        except CallPendingError as exc:
            raise ApprovalRequired(metadata=exc.facts) from None
        except CallRefusedError as exc:
            raise ToolFailed(str(exc)) from None


async def results_of(store: GatewayStore, requests: DeferredToolRequests) -> DeferredToolResults | None:
    """Return what humans have decided about the deferred calls of a run; None while one of them is pending.

    Calls that no `GatewayToolset` deferred are left to others.
    """
    results: dict[str, Any] = {}
    for call in requests.approvals:
        found = await approval_of(store, requests.metadata.get(call.tool_call_id))
        if found is None:
            continue
        if found.status is ApprovalStatus.PENDING:
            return None
        # True means: call it again. Whether it runs is decided then.
        is_denied = found.status is ApprovalStatus.DENIED
        results[call.tool_call_id] = ToolDenied(refusal_text(found)) if is_denied else True
    return requests.build_results(approvals=results)
