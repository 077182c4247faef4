"""What every framework's adapter does with one tool call: judge it, acquire an approval, run it, and record it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

from agent_gateway_store._text import word
from agent_gateway_store.approval import reports
from agent_gateway_store.approval.filters import criteria
from agent_gateway_store.audit.calls import CallStart, argument_names, run_tool, wrong_fields
from agent_gateway_store.encoding.canonical import types_in
from agent_gateway_store.errors import ApprovalNotFoundError
from agent_gateway_store.integrations.callbacks import CallRefusedError, Policy, Sanitize, Verdict, call_back
from agent_gateway_store.integrations.calls import BROKEN, AskedCall, CallPendingError, finish, refusal_text
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import ApprovalStatus, ToolCall
from agent_gateway_store.store import GatewayStore

__all__ = [
    "CallGuard",
    "CallPendingError",
    "CallRefusedError",
    "Policy",
    "ReleasedCall",
    "Sanitize",
    "Verdict",
    "refusal_text",
]

T = TypeVar("T")

_GONE = "The caller went away while the call waited for a human, so it was not run."
_NOT_RUN = "NOT_RUN"
# The timers of uvloop have whole milliseconds.
_TICK_S = 0.001
# The rule in the event of a call whose arguments no policy can judge.
UNREADABLE = "gateway.unreadable"
_logger = logging.getLogger("agent_gateway_store.integrations")


def copy_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the arguments of a call, which nobody else changes while it waits: judge, hash and run that one.

    Raises:
        CallRefusedError: Python cannot copy one of them.
    """
    copied, memo = {}, dict[int, Any]()
    for name, value in arguments.items():
        try:
            copied[name] = deepcopy(value, memo)
        except Exception:
            # Without the error, whose text may hold the argument.
            raise CallRefusedError(
                f"The argument {word(name)} cannot be copied, so what runs might not be what was judged, and the call "
                "was not run: nest it less, or ask its operator to declare it as a list, or what else Python can copy.",
                rule=UNREADABLE,
            ) from None
    return copied


def _copy(call: ToolCall) -> ToolCall:
    # A third of the time of `model_copy(deep=True)`.
    return call.model_copy(update={"arguments": copy_arguments(call.arguments)})


class ReleasedCall:
    """A call that may run once; `CallGuard.release` makes it."""

    def __init__(self, asked: AskedCall, verdict: Verdict) -> None:
        self._asked, self._verdict, self._was_run = asked, verdict, False
        self._outcome: AuditEvent | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The copy of the arguments that was judged, for the tool."""
        return self._asked.call.arguments

    @property
    def is_approved(self) -> bool:
        """Whether a human approved it."""
        return "approval_id" in self._asked.event

    @property
    def outcome(self) -> AuditEvent | None:
        """The event of the run, once that has begun; what is set in it is written."""
        return self._outcome

    def take_back(self, reason: str) -> None:
        """Let the event say, from within the run, that the tool was not reached after all, and why."""
        event = self._outcome
        assert event is not None  # noqa: S101
        event.decision, event.deterministic_rationale = Decision.DENY, reason
        event.approver_id = event.approval_id = None
        event.extra = {name: value for name, value in event.extra.items() if name != "approval_sha256"}

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
        start, is_known = CallStart(), True
        try:
            async with self._asked.recording(self._verdict.decision, self._verdict.reason) as outcome:
                self._outcome = outcome
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
        except asyncio.CancelledError:
            if self._outcome is None:
                is_known = False
                await self._record_unrun("it was cancelled before that.")
            raise
        finally:
            ended = self._outcome.execution_status if self._outcome is not None else None
            if is_known:
                await self._asked.record_outcome(self._asked.event.get("approval_id"), str(ended or _NOT_RUN))

    async def drop(self, reason: str, **fields: Any) -> None:
        """Record that the call does not run after all, and the `reason`; once, and nothing if it ran."""
        if self._was_run:
            return
        self._was_run = True
        await self._record_unrun(reason, **fields)

    async def _record_unrun(self, reason: str, **fields: Any) -> None:
        event = self._asked.event | fields | {"intent": False}
        approval_id, approver_id = event.pop("approval_id", None), event.pop("approver_id", None)
        by = f" by {word(approver_id)} (approval {approval_id})" if approval_id is not None else ""
        text = f"The call was released{by}, and not run: {reason}"
        try:
            await finish(replace(self._asked, event=event).record(Decision.DENY, text))
        finally:
            await self._asked.record_outcome(approval_id, _NOT_RUN)


class CallGuard:
    """Runs tool calls that the policy allows or a human approves, and writes one audit event for each.

    It fails closed: nothing runs if the policy raises, or if the store does not answer where a human must decide. With
    AUDIT_MODE=strict the database must answer before any call. The policy and the tool receive raw arguments; the store
    receives their hash, and what `sanitize` returns.

    Args:
        store: Opened and closed by the host.
        policy: Called with the caller and the call; returns the `Verdict`. Sync or async.
        sanitize: Returns the arguments that approvers and the audit log may see; sync or async. Default: their names.
        approval_wait_s: Seconds that a call waits for a human before it is pending.
    """

    # What the callbacks may raise to refuse a call, beside errors of the store and `CallRefusedError`.
    _refusals: tuple[type[Exception], ...] = ()

    def __init__(
        self, store: GatewayStore, policy: Policy, *, sanitize: Sanitize = argument_names, approval_wait_s: float = 0.0
    ) -> None:
        self._store, self._policy, self._sanitize, self._approval_wait_s = store, policy, sanitize, approval_wait_s
        self._call_back = partial(call_back, refusals=self._refusals)

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
        asked = self.begin(call, caller, request_id=request_id)
        # Who no longer asks has called nothing.
        async with asked.refusing(records_cancelled=False):
            await self._prepare(asked)
            if (found := await last_asked(asked.store, caller, request_id)) is not None:
                return found
            verdict = await self._judge(asked)
            if verdict.decision != Decision.APPROVAL_REQUIRED:
                return None
            try:
                acquired = await self._acquire(asked, self._request(asked, verdict), bind, wait_s=0)
            except CallPendingError as exc:
                acquired = exc.approval
            return await asked.store.approvals.get(approval_id=acquired.approval_id)

    async def refuse(self, call: ToolCall, caller: CallerIdentity, decided: ApprovalRequest) -> str:
        """Record that `decided` does not release the call, and return the sentence that says so."""
        asked = self.begin(call, caller, rule="gateway.not_approved")
        try:
            async with asked.refusing():
                await self._prepare(asked)
                raise await asked.refusal(refusal_text(decided), approver_id=decided.approver_id)
        except CallRefusedError as exc:
            return str(exc)

    async def deny(self, call: ToolCall, caller: CallerIdentity, reason: str, **fields: Any) -> CallRefusedError:
        """Record that an adapter cannot take the call, of which only names are shown, and return the refusal."""
        return await self.begin(call, caller, **{"rule": UNREADABLE, **fields}).refusal(reason)

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
        asked = self.begin(call, caller, **fields)
        async with asked.refusing():
            return await self.judge(asked, bind=lambda: bind, question=question, earlier=earlier)

    def begin(self, call: ToolCall, caller: CallerIdentity, **fields: Any) -> AskedCall:
        """Return a call on its way to `judge`; `fields` are those of its event."""
        return AskedCall(self._store, call, caller, {"request_id": uuid4().hex, **fields})

    async def judge(
        self,
        asked: AskedCall,
        *,
        bind: Callable[[], str] = str,
        question: str | None = None,
        earlier: Callable[[GatewayStore], Awaitable[ApprovalRequest | None]] | None = None,
    ) -> ReleasedCall:
        """Return the call if it may run; all else as `release`, where `asked.refusing()` surrounds it.

        `bind` is called where a human is asked.
        """
        await self._prepare(asked)
        verdict = await self._judge(asked)
        if verdict.decision == Decision.DENY:
            raise await asked.refusal(verdict.reason)
        if verdict.decision == Decision.APPROVAL_REQUIRED:
            decided = await earlier(asked.store) if earlier else None
            if decided and decided.status is ApprovalStatus.DENIED:
                raise await asked.refusal(refusal_text(decided), approver_id=decided.approver_id)
            request = self._request(asked, verdict, question)
            acquired = await self._acquire(asked, request, bind(), wait_s=self._approval_wait_s)
            asked.event.update(approval_id=acquired.approval_id, approver_id=acquired.approver_id)
        elif asked.store.settings.audit_mode == "strict":
            await asked.store.ping()
        return ReleasedCall(asked, verdict)

    async def _prepare(self, asked: AskedCall) -> None:
        """Copy the call, which nobody changes while it waits, and make its shown arguments."""
        asked.call = copied = _copy(asked.call)
        shown = await self._call_back("sanitize", self._sanitize, _copy(copied), returns=Mapping)
        asked.event["sanitized_args"] = dict(shown)

    async def _judge(self, asked: AskedCall) -> Verdict:
        call = _copy(asked.call)
        verdict: Verdict = await self._call_back("policy", self._policy, asked.caller, call, returns=Verdict)
        asked.event.update(verdict.event_fields)
        return verdict

    def _request(self, asked: AskedCall, verdict: Verdict, question: str | None = None) -> ApprovalRequest:
        if not (org_id := asked.caller.org_id or asked.store.org_id):
            raise ValueError("the caller has no organisation")
        return ApprovalRequest(
            request_id=question or asked.event["request_id"],
            caller_id=asked.caller.caller_id,
            org_id=org_id,
            tool_call=asked.call.model_copy(update={"arguments": asked.event["sanitized_args"]}),
            risk_explanation=verdict.reason,
            required_approvals=verdict.required_approvals,
        )

    async def _acquire(self, asked: AskedCall, request: ApprovalRequest, bind: str, *, wait_s: float) -> ApprovalResult:
        request_id, approvals, bind = request.request_id, asked.store.approvals, bind + types_in(asked.call.arguments)
        try:
            acquired = await approvals.acquire(request, call=asked.call, bind=bind, wait_s=wait_s)
        except asyncio.CancelledError:
            await finish(asked.record(Decision.APPROVAL_REQUIRED, _GONE, request_id=request_id))
            raise
        if acquired.status is ApprovalStatus.PENDING:
            pending = CallPendingError(acquired)
            if acquired.is_new:
                await asked.record(Decision.APPROVAL_REQUIRED, str(pending), request_id=request_id)
            raise pending
        if acquired.status is not ApprovalStatus.USED:
            raise await asked.refusal(refusal_text(acquired), approver_id=acquired.approver_id)
        try:
            if asked.before_use is not None:
                await asked.before_use()
        except BaseException:
            # A client may go away meanwhile.
            await asked.record_outcome(acquired.approval_id, _NOT_RUN)
            raise
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
