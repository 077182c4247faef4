"""What every framework's adapter does with one tool call: judge it, acquire an approval, run it, and record it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar
from uuid import UUID, uuid4

import anyio
from pydantic import Field

from agent_gateway_store._text import escape, word
from agent_gateway_store.approval import ApprovalManager, reports
from agent_gateway_store.approval.filters import criteria
from agent_gateway_store.audit.calls import CallStart, argument_names, run_tool, shown_arguments, wrong_fields
from agent_gateway_store.encoding.canonical import types_in
from agent_gateway_store.errors import ApprovalError, ApprovalNotFoundError, GatewayStoreError
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import ApprovalStatus, FrozenModel, ToolCall
from agent_gateway_store.store import GatewayStore

T = TypeVar("T")

# Seconds for one write when a caller has gone away: the default of PLUGIN_TIMEOUT_SECONDS, and well below the time that
# servers give their requests at shutdown (uvicorn's default is no limit, Kubernetes' is 30 seconds).
_LAST_WRITE_S = 5.0
AWAY = "The gateway cannot reach its records, so the call was not run: try again later."
GONE = "The caller went away while the call waited for a human, so it was not run."
_NOT_RUN = "NOT_RUN"
# The timers of uvloop have whole milliseconds.
_TICK_S = 0.001
# The rule in the event of a call whose arguments no policy can judge.
UNREADABLE = "gateway.unreadable"
BROKEN = "The gateway failed, so the call was not run: tell its operator."
_logger = logging.getLogger("agent_gateway_store.integrations")


class Verdict(FrozenModel):
    """Whether a call may run.

    Attributes:
        decision: ALLOW, DENY, or APPROVAL_REQUIRED: a human decides.
        rule: The rule of the policy that decided.
        reason: Why, in one sentence; approvers read it, and the caller of a denied call does, too.
        risk_score: On the host's own scale.
        policy_version: Version of the policy.
        required_approvals: How many different approvers must approve, if a human is asked.
    """

    decision: Literal[Decision.ALLOW, Decision.DENY, Decision.APPROVAL_REQUIRED]
    rule: str
    reason: str
    risk_score: float = 0.0
    risk_labels: tuple[str, ...] = ()
    policy_version: str | None = None
    required_approvals: int = Field(default=1, ge=1)

    @property
    def event_fields(self) -> dict[str, Any]:
        """What the event of the call says of it."""
        return self.model_dump(include={"rule", "risk_score", "risk_labels", "policy_version"})


Policy = Callable[[CallerIdentity, ToolCall], Verdict | Awaitable[Verdict]]
Sanitize = Callable[[ToolCall], Mapping[str, Any]]


class CallRefusedError(Exception):
    """The call must not run. The text is for the model."""


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


@dataclass(frozen=True)
class _AskedCall:
    """A call on its way: the store of its organisation, and the fields of its event so far."""

    store: GatewayStore
    call: ToolCall
    caller: CallerIdentity
    event: dict[str, Any]

    def recording(self, decision: Decision, reason: str) -> AbstractAsyncContextManager[AuditEvent]:
        return self.store.audit.call(self.call, self.caller, decision=decision, rationale=reason, **self.event)

    async def record(self, decision: Decision, reason: str) -> None:
        async with self.recording(decision, reason):
            pass

    async def refusal(self, reason: str, **fields: Any) -> CallRefusedError:
        """Record the `reason`, and return the error for it; in strict mode AWAY, if no database took the event."""
        self.event.update(fields)
        try:
            await self.record(Decision.DENY, reason)
        except GatewayStoreError as exc:
            _logger.error("%s: %s", type(exc).__name__, exc)
            return CallRefusedError(AWAY)
        return CallRefusedError(reason)


def copy_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the arguments of a call, which nobody else changes while it waits: judge, hash and run that one.

    Raises:
        CallRefusedError: Python cannot copy one of them.
    """
    copied, memo = {}, dict[int, Any]()
    for name, value in arguments.items():
        try:
            copied[name] = deepcopy(value, memo)
        except Exception as exc:
            raise CallRefusedError(
                f"The argument {word(name)} cannot be copied, so what runs might not be what was judged, and the call "
                "was not run: nest it less, or ask its operator to declare it as a list, or what else Python can copy."
            ) from exc
    return copied


class ReleasedCall:
    """A call that may run once; `CallGuard.release` makes it."""

    def __init__(self, asked: _AskedCall, verdict: Verdict) -> None:
        self._asked, self._verdict, self._was_run = asked, verdict, False

    @property
    def is_approved(self) -> bool:
        """Whether a human approved it."""
        return "approval_id" in self._asked.event

    async def run(
        self,
        tool: Callable[[], Awaitable[T]],
        *,
        is_error: Callable[[T], bool] | None = None,
        open_ends: tuple[type[BaseException], ...] = (),
        deadline: float = math.inf,
    ) -> T:
        """Run `tool`, and return or raise what comes of it.

        Args:
            tool: Runs the call.
            is_error: Whether a framework returned that in place of an error.
            open_ends: What a framework raises to pause a call or to hand it on: how it ends is not known here.
            deadline: By the clock of the event loop; a call that its framework cancels from then on is a TIMEOUT.

        Raises:
            CallRefusedError: It ran before.
            AuditUnavailableError: In strict mode: it ran, and its event was lost, so its result must not be used.
        """
        if self._was_run:
            raise CallRefusedError("This call ran before, so it was not run again: call it anew.")
        self._was_run = True
        start, outcome, is_known = CallStart(), None, True
        try:
            async with self._asked.recording(self._verdict.decision, self._verdict.reason) as outcome:
                try:
                    result = await run_tool(tool)
                except BaseException as exc:
                    is_late = asyncio.get_running_loop().time() >= deadline - _TICK_S
                    if isinstance(exc, open_ends):
                        outcome.execution_status, is_known = None, False
                    elif is_late and start.status_of(exc) is ExecutionStatus.CANCELLED:
                        outcome.execution_status = ExecutionStatus.TIMEOUT
                    raise
                if is_error is not None and is_error(result):
                    outcome.execution_status = ExecutionStatus.TOOL_ERROR
                return result
        finally:
            ended = outcome.execution_status if outcome is not None else None
            if is_known:
                await self._record_outcome(self._asked.event.get("approval_id"), str(ended or _NOT_RUN))

    async def drop(self, reason: str, **fields: Any) -> None:
        """Record that the call does not run after all, and the `reason`; once, and nothing if it ran."""
        if self._was_run:
            return
        self._was_run = True
        event = self._asked.event | fields
        approval_id, approver_id = event.pop("approval_id", None), event.pop("approver_id", None)
        by = f" by {word(approver_id)} (approval {approval_id})" if approval_id is not None else ""
        text = f"The call was released{by}, and not run: {reason}"
        try:
            await finish(replace(self._asked, event=event).record(Decision.DENY, text))
        finally:
            await self._record_outcome(approval_id, _NOT_RUN)

    async def _record_outcome(self, approval_id: UUID | None, outcome: str) -> None:
        if approval_id is not None:
            await finish(self._asked.store.approvals.record_outcome(approval_id=approval_id, outcome=outcome))


class CallGuard:
    """Runs tool calls that the policy allows or a human approves, and writes one audit event for each.

    It fails closed: nothing runs if the policy raises, or if the store does not answer where a human must decide. With
    AUDIT_MODE=strict the database must answer before any call. The policy and the tool receive raw arguments; the store
    receives their hash, and what `sanitize` returns.

    Args:
        store: Opened and closed by the host.
        policy: Called with the caller and the call; returns the `Verdict`. Sync or async.
        sanitize: Returns the arguments that approvers and the audit log may see. Default: their names only.
        approval_wait_s: Seconds that a call waits for a human before it is pending.
    """

    def __init__(
        self, store: GatewayStore, policy: Policy, *, sanitize: Sanitize = argument_names, approval_wait_s: float = 0.0
    ) -> None:
        self._store, self._policy, self._sanitize, self._approval_wait_s = store, policy, sanitize, approval_wait_s

    async def run(
        self,
        call: ToolCall,
        caller: CallerIdentity,
        tool: Callable[[], Awaitable[T]],
        *,
        bind: str = "",
        **fields: Any,
    ) -> T:
        """Run `tool` once if `call` may run, and return or raise what comes of it; all else as `release`.

        The approval is one of `call` as it was handed over: let `tool` run that, and nothing that may change meanwhile.
        """
        return await (await self.release(call, caller, bind=bind, **fields)).run(tool)

    async def ask(
        self, call: ToolCall, caller: CallerIdentity, *, request_id: str, bind: str = ""
    ) -> ApprovalRequest | None:
        """Ask a human ahead of the call, and use nothing up; asked again, return where that question stands.

        Args:
            call: As it will run.
            caller: Who will make it.
            request_id: Names the question, in this process and in others.
            bind: As for `store.approvals.acquire`.

        Returns:
            The approval; None if no human decides about this call.

        Raises:
            CallRefusedError: The policy failed, or the store does not answer.
        """
        asked = await self._asked(call, caller, request_id=request_id)
        try:
            if (found := await last_asked(asked.store, caller, request_id)) is not None:
                return found
            verdict = await self._judge(asked)
            if verdict.decision != Decision.APPROVAL_REQUIRED:
                return None
            asked.event.update(verdict.event_fields)
            try:
                acquired = await self._acquire(asked, verdict, bind, wait_s=0)
            except CallPendingError as exc:
                acquired = exc.approval
            return await asked.store.approvals.get(approval_id=acquired.approval_id)
        except GatewayStoreError as exc:
            _logger.error("%s: %s", type(exc).__name__, exc)
            raise CallRefusedError(str(exc) if isinstance(exc, ApprovalError) else AWAY) from exc

    async def refuse(self, call: ToolCall, caller: CallerIdentity, decided: ApprovalRequest) -> str:
        """Record that `decided` does not release the call, and return the sentence that says so."""
        try:
            asked = await self._asked(call, caller, rule="gateway.not_approved", approver_id=decided.approver_id)
            return str(await asked.refusal(refusal_text(decided)))
        except CallRefusedError as exc:
            return str(exc)

    async def deny(self, call: ToolCall, caller: CallerIdentity, reason: str, **fields: Any) -> CallRefusedError:
        """Record that an adapter cannot take the call, of which only names are shown, and return the refusal."""
        event = {"rule": UNREADABLE, **fields}
        return await _AskedCall(self._store.for_org(caller.org_id), call, caller, event).refusal(reason)

    async def release(
        self,
        call: ToolCall,
        caller: CallerIdentity,
        *,
        bind: str = "",
        question: str | None = None,
        earlier: Callable[[GatewayStore], Awaitable[ApprovalRequest | None]] | None = None,
        **fields: Any,
    ) -> ReleasedCall:
        """Return the call if it may run, for a framework that asks before it calls: run it at once, or it is spent.

        Args:
            call: As it runs, with raw arguments.
            caller: Who makes it.
            bind: As for `store.approvals.acquire`.
            question: Request id under which a human is asked; None: that of the event.
            earlier: Returns the approval for which the call waited; one that was denied refuses it, however long ago.
            fields: Further fields of the event, such as `session_id`. Wrong ones refuse the call, first.

        Raises:
            CallPendingError: A human is asked. Only the call that asked leaves an event.
            CallRefusedError: The policy or a human denied it, or the gateway cannot decide.
            StoreNotOpenError: The store is not open here, so the policy was not asked.
        """
        self._store.database.check_owner()
        if wrong := wrong_fields(call, caller, fields):
            _logger.error("No event can have these fields: %s. A call was refused.", ", ".join(wrong))
            raise await self.deny(call, caller, BROKEN, rule="gateway.failure")
        asked = await self._asked(call, caller, **{"request_id": uuid4().hex, **fields})
        verdict = await self._judge(asked)
        asked.event.update(verdict.event_fields)
        try:
            if verdict.decision == Decision.DENY:
                raise await asked.refusal(verdict.reason)
            if verdict.decision == Decision.APPROVAL_REQUIRED:
                decided = await earlier(asked.store) if earlier else None
                if decided and decided.status is ApprovalStatus.DENIED:
                    raise await asked.refusal(refusal_text(decided), approver_id=decided.approver_id)
                acquired = await self._acquire(asked, verdict, bind, question, wait_s=self._approval_wait_s)
                asked.event.update(approval_id=acquired.approval_id, approver_id=acquired.approver_id)
            elif asked.store.settings.audit_mode == "strict":
                await asked.store.ping()
        except GatewayStoreError as exc:
            _logger.error("%s: %s", type(exc).__name__, exc)
            raise await asked.refusal(str(exc) if isinstance(exc, ApprovalError) else AWAY) from exc
        return ReleasedCall(asked, verdict)

    async def _asked(self, call: ToolCall, caller: CallerIdentity, **fields: Any) -> _AskedCall:
        """Return a copy of the call, which nobody changes while it waits; `fields` are those of its event."""
        store = self._store.for_org(caller.org_id)
        try:
            copied = call.model_copy(update={"arguments": copy_arguments(call.arguments)})
            shown = dict(shown_arguments(copied, self._sanitize))
        except CallRefusedError as exc:
            raise await self.deny(call, caller, str(exc), **fields) from None
        except Exception as exc:
            # Not the text of the error, which may hold raw arguments.
            _logger.error("Arguments could not be sanitized (%s): a call was refused.", type(exc).__name__)
            raise await _AskedCall(store, call, caller, fields).refusal(BROKEN, rule="gateway.failure") from None
        return _AskedCall(store, copied, caller, {**fields, "sanitize": lambda _: shown})

    async def _judge(self, asked: _AskedCall) -> Verdict:
        try:
            verdict = self._policy(asked.caller, asked.call.model_copy(deep=True))
            if inspect.isawaitable(verdict):
                verdict = await verdict
            problem = f"returned a {type(verdict).__name__}, not a Verdict"
        except Exception as exc:
            # Not the text of the error, which may hold raw arguments.
            verdict, problem = None, f"raised {type(exc).__name__}"
        if not isinstance(verdict, Verdict):
            _logger.error("The policy %s: a call was refused.", problem)
            raise await asked.refusal(BROKEN, rule="gateway.failure")
        return verdict

    async def _acquire(
        self, asked: _AskedCall, verdict: Verdict, bind: str, question: str | None = None, *, wait_s: float
    ) -> ApprovalResult:
        request = ApprovalRequest(
            request_id=question or asked.event["request_id"],
            caller_id=asked.caller.caller_id,
            org_id=asked.caller.org_id,
            tool_call=asked.call.model_copy(update={"arguments": asked.event["sanitize"](asked.call)}),
            risk_explanation=verdict.reason,
            required_approvals=verdict.required_approvals,
        )
        asking = replace(asked, event={**asked.event, "request_id": request.request_id})
        try:
            acquired = await acquire(asked.store.approvals, request, call=asked.call, bind=bind, wait_s=wait_s)
        except CallPendingError as exc:
            if exc.approval.is_new:
                await asking.record(Decision.APPROVAL_REQUIRED, str(exc))
            raise
        except asyncio.CancelledError:
            await finish(asking.record(Decision.APPROVAL_REQUIRED, GONE))
            raise
        if acquired.status is not ApprovalStatus.USED:
            raise await asked.refusal(refusal_text(acquired), approver_id=acquired.approver_id)
        return acquired


async def acquire(
    approvals: ApprovalManager, request: ApprovalRequest, *, call: ToolCall, bind: str = "", wait_s: float
) -> ApprovalResult:
    """Acquire an approval: USED, or one that releases nothing; as `approvals.acquire`, and bound to the types, too.

    Raises:
        CallPendingError: Nobody has decided yet.
    """
    acquired = await approvals.acquire(request, call=call, bind=bind + types_in(call.arguments), wait_s=wait_s)
    if acquired.status is ApprovalStatus.PENDING:
        raise CallPendingError(acquired)
    return acquired


async def approval_of(store: GatewayStore, facts: Any) -> ApprovalRequest | None:
    """Return the approval that the `facts` of a pending call name; None if they name none of this store."""
    approval_id = facts.get("approval_id") if isinstance(facts, Mapping) else None
    with suppress(ApprovalNotFoundError):
        return None if approval_id is None else await store.approvals.get(approval_id=approval_id)
    return None


async def last_asked(store: GatewayStore, caller: CallerIdentity, request_id: str) -> ApprovalRequest | None:
    """Return the last approval that `caller` asked for under `request_id`: not of a replica, which may be behind."""
    filters = criteria({"request_id": request_id, "caller_id": caller.caller_id}, org_id=store.org_id)
    found = await reports.search(store.database, filters, limit=1, cursor=None)
    return found[0] if found else None


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
