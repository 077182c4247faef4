"""What the host says of a call, by callbacks of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from fastmcp.server.middleware import MiddlewareContext
from pydantic import Field

from agent_gateway_store.models.audit import Decision
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import FrozenModel, ToolCall

__all__ = ["HIDDEN", "Identify", "Policy", "Sanitize", "Verdict", "argument_names"]

HIDDEN = "[hidden]"


class Verdict(FrozenModel):
    """Whether a call may run.

    Attributes:
        decision: ALLOW, DENY, or APPROVAL_REQUIRED: a human decides.
        rule: Which rule of the policy spoke.
        reason: Why, in one sentence; approvers read it, and of a denied call the caller does, too.
        risk_score: On the host's own scale.
        policy_version: Which policy it was.
        required_approvals: How many distinct approvers must approve, if they are asked.
    """

    decision: Literal[Decision.ALLOW, Decision.DENY, Decision.APPROVAL_REQUIRED]
    rule: str
    reason: str
    risk_score: float = 0.0
    risk_labels: tuple[str, ...] = ()
    policy_version: str | None = None
    required_approvals: int = Field(default=1, ge=1)


Policy = Callable[[CallerIdentity, ToolCall], Verdict | Awaitable[Verdict]]
Identify = Callable[[MiddlewareContext[Any]], Awaitable[CallerIdentity]]
Sanitize = Callable[[ToolCall], Mapping[str, Any]]


def argument_names(call: ToolCall) -> dict[str, Any]:
    """Return the names of the arguments of `call`, each value hidden."""
    return dict.fromkeys(call.arguments, HIDDEN)
