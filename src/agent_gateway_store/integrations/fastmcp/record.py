"""One tool call from its arrival to its audit event, and what the host's callbacks decide about it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from fastmcp.server.middleware import MiddlewareContext

from agent_gateway_store.clock import utc_now
from agent_gateway_store.integrations.fastmcp.origin import Origin
from agent_gateway_store.integrations.fastmcp.resolution import INPUT_RESPONSES, REQUEST_STATE
from agent_gateway_store.integrations.guard import Verdict
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import ToolCall
from agent_gateway_store.store import GatewayStore

_UNKNOWN = "unknown"


Identify = Callable[[MiddlewareContext[Any]], CallerIdentity | Awaitable[CallerIdentity]]
Sanitize = Callable[[ToolCall], Mapping[str, Any] | Awaitable[Mapping[str, Any]]]
NameServer = Callable[[MiddlewareContext[Any]], str | Awaitable[str]]


@dataclass
class CallRecord:
    """What is known of one call so far. It starts as a refusal; only the last step before the tool changes that.

    Attributes:
        call: The call as it will run; the store receives only its hash.
        shown: Its arguments as the host's sanitiser shows them.
        decision: What the policy decided, or DENY where the call was refused after that.
        approver_id: Who released the call, where a human was asked; with DENY: who refused it.
        approval_id: The approval that released the call.
        was_run: Whether the tool was called, however it ended.
        is_silent: Whether the event of another call says all that there is to say of this one.
    """

    call: ToolCall
    origin: Origin
    request_id: str = field(default_factory=lambda: uuid4().hex)
    started: float = field(default_factory=time.perf_counter)
    timestamp: datetime = field(default_factory=utc_now)
    caller: CallerIdentity | None = None
    verdict: Verdict | None = None
    shown: dict[str, Any] = field(default_factory=dict)
    decision: Decision = Decision.DENY
    rule: str = ""
    reason: str = ""
    approver_id: str | None = None
    approval_id: UUID | None = None
    was_run: bool = False
    is_silent: bool = False
    execution_status: ExecutionStatus | None = None
    output_hash: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it neither carries what a client answered to the tool nor is made by another call's tool."""
        return self.origin.outer is None and not {INPUT_RESPONSES, REQUEST_STATE} & self.call.arguments.keys()

    def refused(self, word: str, reason: str) -> None:
        """Note that the gateway does not run the call, and why; `word` names the rule if the policy has not decided."""
        self.decision, self.was_run = Decision.DENY, False
        self.approver_id = self.approval_id = None
        self.explain(word, reason)

    def explain(self, word: str, reason: str) -> None:
        """Note why the call does not run, whoever decided that."""
        self.rule, self.reason = self.rule or f"gateway.{word}", reason

    def event(self, store: GatewayStore) -> AuditEvent:
        """Return the event of what is known now. Its latency includes the wait for a human."""
        caller, verdict = self.caller, self.verdict
        org_id = caller.org_id if caller else store.org_id or "default"
        outer = self.origin.outer
        return AuditEvent(
            request_id=self.request_id,
            org_id=org_id,
            trace_id=self.origin.trace_id,
            session_id=self.origin.session_id,
            # An id of another organisation stays there.
            parent_request_id=outer.request_id if outer is not None and outer.org_id == org_id else None,
            timestamp=self.timestamp,
            caller_id=caller.caller_id if caller else _UNKNOWN,
            caller_role=caller.role if caller else _UNKNOWN,
            key_id=caller.key_id if caller else None,
            environment=caller.environment if caller else store.settings.environment,
            mcp_server=self.call.server,
            tool_name=self.call.tool,
            raw_args_hash=store.hash_args(self.call.arguments),
            sanitized_args=self.shown,
            risk_labels=list(verdict.risk_labels) if verdict else [],
            risk_score=verdict.risk_score if verdict else 0.0,
            matched_policy_rule=self.rule,
            policy_version=verdict.policy_version if verdict else None,
            decision=self.decision,
            approver_id=self.approver_id,
            approval_id=self.approval_id,
            execution_status=self.execution_status,
            latency_ms=round((time.perf_counter() - self.started) * 1000),
            output_hash=self.output_hash,
            deterministic_rationale=self.reason,
        )
