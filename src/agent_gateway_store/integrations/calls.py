"""One tool call on its way: what is said where it does not run, and the one event that it leaves."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import anyio

from agent_gateway_store._text import escape, word
from agent_gateway_store.errors import ApprovalError, GatewayStoreError, InvalidApiKeyError
from agent_gateway_store.integrations.callbacks import CallbackError, CallRefusedError, failure
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult
from agent_gateway_store.models.audit import AuditEvent, Decision
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import ToolCall
from agent_gateway_store.store import GatewayStore

# Seconds for one write when a caller has gone away: the default of PLUGIN_TIMEOUT_SECONDS, and well below the time that
# servers give their requests at shutdown (uvicorn's default is no limit, Kubernetes' is 30 seconds).
_LAST_WRITE_S = 5.0
AWAY = "The gateway cannot reach its records, so the call was not run: try again later."
BROKEN = "The gateway failed, so the call was not run: tell its operator."
_CANCELLED = "The call was cancelled before it ran."
_logger = logging.getLogger("agent_gateway_store.integrations")


class CallPendingError(Exception):
    """The call waits for a human; it was not run, and may be called again. `approval` says where that stands."""

    def __init__(self, approval: ApprovalResult) -> None:
        until = f" before {approval.expires_at:%Y-%m-%d %H:%M:%S} UTC" if approval.expires_at else ""
        super().__init__(
            f"A human must approve this call, so it was not run: call again with the same arguments{until}. "
            f"The approval {approval.approval_id} is {approval.status}."
        )
        self.approval = approval

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.approval,), self.__dict__

    @property
    def facts(self) -> dict[str, Any]:
        """What programs need: `approval_id`, `status` and `expires_at`, as JSON values."""
        return self.approval.model_dump(mode="json", include={"approval_id", "status", "expires_at"})


def refusal_text(decided: ApprovalResult | ApprovalRequest) -> str:
    """Return the sentence about a call whose approval releases nothing."""
    by = f" by {word(decided.approver_id)}" if decided.approver_id else ""
    written = decided.note if isinstance(decided, ApprovalResult) else decided.approver_note
    note = f" Note: {escape(written)}" if written else ""
    return f"The approval of this call is {decided.status}{by}, so it was not run.{note}"


@dataclass
class AskedCall:
    """A call on its way: the fields of its event so far, and what must hold once it is approved.

    Attributes:
        before_use: Awaited once a human has approved it; raises if the call must not run after all.
    """

    host_store: GatewayStore
    call: ToolCall
    caller: CallerIdentity
    event: dict[str, Any]
    before_use: Callable[[], Awaitable[None]] | None = None
    was_recorded: bool = False
    _bound: GatewayStore | None = None

    @property
    def store(self) -> GatewayStore:
        """That of the caller's organisation; a host's own identity may name none."""
        if not self.caller.org_id:
            return self.host_store
        if self._bound is None or self._bound.org_id != self.caller.org_id:
            self._bound = self.host_store.for_org(self.caller.org_id)
        return self._bound

    def recording(self, decision: Decision, reason: str, **fields: Any) -> AbstractAsyncContextManager[AuditEvent]:
        """Return what records the call, as it runs or does not run in its body."""
        self.was_recorded = True
        event = self.event | fields
        return self.store.audit.call(self.call, self.caller, decision=decision, rationale=reason, **event)

    async def record(self, decision: Decision, reason: str, **fields: Any) -> None:
        """Record that the call does not run now."""
        async with self.recording(decision, reason, **fields):
            pass

    async def refusal(self, reason: str, decision: Decision = Decision.DENY, **fields: Any) -> CallRefusedError:
        """Record the `reason`, and return the error for it; in strict mode AWAY, if no database took the event."""
        try:
            await self.record(decision, reason, **fields)
        except GatewayStoreError as exc:
            _logger.error("%s: %s", type(exc).__name__, exc)
            return CallRefusedError(AWAY)
        return CallRefusedError(reason)

    async def record_outcome(self, approval_id: UUID | None, outcome: str) -> None:
        """Record how the use of an approval ended, if there is one; if that fails, it is shown as unknown."""
        if approval_id is not None:
            await finish(self.store.approvals.record_outcome(approval_id=approval_id, outcome=outcome))

    @asynccontextmanager
    async def refusing(self, *, records_cancelled: bool = True) -> AsyncIterator[None]:
        """Record whatever stops the call in the body, unless that was recorded there, and raise a CallRefusedError.

        A cancellation, or the end of the program, is raised on.
        """
        try:
            yield
        except (CallPendingError, GeneratorExit):
            raise
        except BaseException as exc:
            if self.was_recorded and isinstance(exc, GatewayStoreError):
                _logger.error("%s: %s", type(exc).__name__, exc)
                raise CallRefusedError(AWAY) from exc
            if self.was_recorded:
                raise
            rule, reason = self._explain(exc)
            self.event.setdefault("rule", rule)
            if not isinstance(exc, Exception):
                if records_cancelled:
                    await finish(self.record(Decision.DENY, reason))
                raise
            # Not the error of a callback, whose text may hold raw arguments.
            cause = exc.__cause__ if isinstance(exc, CallRefusedError) else exc
            raise await self.refusal(reason) from (cause if reason != BROKEN else None)

    def _explain(self, exc: BaseException) -> tuple[str, str]:
        """Return the rule and the sentence for what stopped the call."""
        if isinstance(exc, CallRefusedError):
            return exc.rule, str(exc)
        if not isinstance(exc, Exception):
            return "gateway.cancelled", _CANCELLED
        if isinstance(exc, InvalidApiKeyError | ApprovalError):
            return f"gateway.{'invalid_api_key' if isinstance(exc, InvalidApiKeyError) else 'not_approved'}", str(exc)
        if isinstance(exc, GatewayStoreError):
            _logger.error("%s: %s", type(exc).__name__, exc)
            return "gateway.store_unavailable", AWAY
        said = exc if isinstance(exc, CallbackError) else failure(exc)
        _logger.error("Request %s: %s", self.event["request_id"], said)
        return "gateway.failure", BROKEN


async def finish(step: Awaitable[object]) -> None:
    """Await a step that is tried even if the caller has gone away, for a few seconds at most."""
    # Shielded: a caller that goes away cancels this task, and the step with it.
    with anyio.move_on_after(_LAST_WRITE_S, shield=True):
        try:
            # It was decided meanwhile, or its deadline passed: nothing is left to do.
            with suppress(ApprovalError):
                await step
        except GatewayStoreError as exc:
            _logger.warning("An approval could not be brought up to date: %s", exc)
