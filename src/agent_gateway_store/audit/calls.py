"""One tool call from its beginning to its audit event, and the calls whose end nobody recorded."""

from __future__ import annotations

import asyncio
import inspect
import math
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from uuid import UUID, uuid4

import anyio
from pydantic import ValidationError
from sqlalchemy import bindparam, literal_column, select

from agent_gateway_store._text import escape
from agent_gateway_store.audit.outcomes import WriteOutcome
from agent_gateway_store.audit.selects import select_events, table
from agent_gateway_store.errors import AuditUnavailableError, GatewayStoreError
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus
from agent_gateway_store.models.columns import UtcDateTime
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import ToolCall
from agent_gateway_store.storage.filters import Shape
from agent_gateway_store.storage.statements import Statement, literal_number

P = ParamSpec("P")
T = TypeVar("T")

HIDDEN = "[hidden]"
HashApproval = Callable[[UUID | str], Awaitable[str]]
INTENT, OUTCOME = "intent", "outcome"
_RUNS = (Decision.ALLOW, Decision.SANITIZE_AND_ALLOW)
# Arguments of `audit.call` beside the fields, and those of them that a guard gives by itself.
_OPTIONS = ("rule", "intent")
_OF_THE_GUARD = ("decision", "rationale", "approval_id", "sanitize", "sanitized_args")


def argument_names(call: ToolCall) -> dict[str, Any]:
    """Return the names of the arguments of `call`, each value hidden."""
    return dict.fromkeys(call.arguments, HIDDEN)


def shown_arguments(call: ToolCall, sanitize: Callable[[ToolCall], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return what `sanitize` makes of a copy of `call`: what it changes is neither what is hashed nor what runs."""
    if sanitize is argument_names:
        return argument_names(call)
    try:
        copied = call.model_copy(deep=True)
    except Exception:
        # A generator, a lock: Python cannot copy everything.
        copied = call.model_copy(update={"arguments": dict(call.arguments)})
    return sanitize(copied)


def draft_event(
    call: ToolCall,
    caller: CallerIdentity,
    *,
    shown: Mapping[str, Any],
    args_hash: str,
    fields: Mapping[str, Any],
) -> AuditEvent:
    """Return the event of a call that has not run yet; `fields` win over what the call and its caller say.

    Raises:
        ValidationError: A field is not valid, or there is no such field.
    """
    given: dict[str, Any] = {
        "request_id": uuid4().hex,
        "org_id": caller.org_id,
        "caller_id": caller.caller_id,
        "caller_role": caller.role,
        "key_id": caller.key_id,
        "environment": caller.environment,
        "mcp_server": call.server,
        "tool_name": call.tool,
        "raw_args_hash": args_hash,
        "sanitized_args": dict(shown),
        "risk_score": 0.0,
        "latency_ms": 0,
    }
    return AuditEvent(**{**given, **fields})


def wrong_fields(call: ToolCall, caller: CallerIdentity, fields: Mapping[str, Any]) -> list[str]:
    """Return the names of what a host may not give as `fields` of the event of a call that a guard releases."""
    given = {"decision": Decision.DENY, "matched_policy_rule": "", "deterministic_rationale": ""} | {
        name: value for name, value in fields.items() if name not in _OPTIONS
    }
    wrong = [name for name in _OF_THE_GUARD if name in fields]
    try:
        draft_event(call, caller, shown={}, args_hash="0" * 64, fields=given)
    except ValidationError as exc:
        wrong += [str(each["loc"][0]) for each in exc.errors(include_input=False, include_context=False) if each["loc"]]
    return wrong


class RecordedCall:
    """One tool call from its beginning to its event, which is written once; `AuditManager.call` makes it.

    `async with` runs the call in its body. As a decorator it records each call of a coroutine function.

    Args:
        draft: Returns the event, as `draft_event` does; raises where nothing could be written.
        write: Stores an event.
        intent: Whether to write an event of the intent before, which the outcome names as its parent.
        hash_approval: Returns the hash of an approval, which the event holds so that evidence proves both.

    Attributes:
        handled: The error that the caller handles, where it calls from another thread.
    """

    def __init__(
        self,
        draft: Callable[[], AuditEvent],
        write: Callable[[AuditEvent], Awaitable[WriteOutcome]],
        *,
        intent: bool,
        hash_approval: HashApproval,
    ) -> None:
        self._draft, self._write, self._intent, self._hash_approval = draft, write, intent, hash_approval
        self._event: AuditEvent | None = None
        self.handled: BaseException | None = None

    def __call__(self, tool: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        """Return `tool` as a function whose calls are recorded.

        Raises:
            TypeError: It must be a coroutine function: calling it is not all of the call.
        """
        if not is_kind(tool, inspect.iscoroutinefunction):
            raise TypeError(f"Only calls of a coroutine function can be recorded: make {_name(tool)} an `async def`.")

        @wraps(tool)
        async def run(*args: P.args, **kwargs: P.kwargs) -> T:
            async with self.anew():
                return await tool(*args, **kwargs)

        return run

    def anew(self) -> RecordedCall:
        """Return the same call, to be recorded once more."""
        return RecordedCall(self._draft, self._write, intent=self._intent, hash_approval=self._hash_approval)

    async def __aenter__(self) -> AuditEvent:
        """Return the event of the call, which may run now.

        Raises:
            AuditUnavailableError: The intent could not be stored; the call must not run.
            RuntimeError: It was entered before.
        """
        if self._event is not None:
            raise RuntimeError("This call was recorded before: make another one by `audit.call`.")
        self._event = event = self._draft()
        if event.approval_id is not None:
            # Before the body, though the call waits for it: what the tool may change in the database is no more what
            # was decided, and an intent holds it too.
            # An approval of another store, or a database that is away: the event says less, and the call runs.
            with suppress(GatewayStoreError):
                event.extra = {"approval_sha256": await self._hash_approval(event.approval_id)} | event.extra
        if self._intent:
            first = event.model_copy(update={"request_id": uuid4().hex, "extra": event.extra | {"phase": INTENT}})
            if await self._write(first) == WriteOutcome.LOST:
                raise AuditUnavailableError("The intent of the call could not be stored, so the call was not run.")
            event.parent_request_id, event.extra = first.request_id, event.extra | {"phase": OUTCOME}
        # A None that the body sets stands, too.
        event.model_fields_set.discard("execution_status")
        self._start, self._started_at = CallStart(self.handled), time.perf_counter()
        return event

    async def __aexit__(self, _type: object, exc: BaseException | None, _traceback: object) -> None:
        """Write the event with its latency and its status, whatever was raised meanwhile."""
        event, status = self._event, ExecutionStatus.SUCCESS if exc is None else self._start.status_of(exc)
        assert event is not None  # noqa: S101
        # A call that the policy stopped has no status, even if its refusal was raised here.
        was_run = event.decision in _RUNS or event.approval_id is not None
        if was_run and event.execution_status is None and "execution_status" not in event.model_fields_set:
            event.execution_status = status
        event.latency_ms = round((time.perf_counter() - self._started_at) * 1000)
        # A caller that is cancelled once more does not cancel the write.
        await self._write(event)


class CallStart:
    """What goes on around a call when its tool begins: cancellations and errors that are not the tool's own.

    Args:
        handled: The error that the caller handles; None: the one of this thread.
    """

    def __init__(self, handled: BaseException | None = None) -> None:
        self._outer = list(_causes(handled or sys.exc_info()[1]))
        self._cancellations, self._is_in_ended_scope = _cancellations()

    def status_of(self, exc: BaseException) -> ExecutionStatus:
        """Return how a call ended whose tool raised `exc`."""
        # A tool may raise once more what is handled outside, with its causes.
        own = list(_causes(exc, () if any(each is exc for each in self._outer) else self._outer))
        cancellations, is_in_ended_scope = _cancellations()
        # A tool that is cancelled may raise an error of its own while it ends.
        is_cancelled = is_in_ended_scope > self._is_in_ended_scope or cancellations > self._cancellations
        if sys.version_info < (3, 13) and not is_in_ended_scope:
            # A TaskGroup that fails leaves behind the cancellation by which it woke its own task, which is not a cause.
            kinds = asyncio.CancelledError, BaseExceptionGroup
            is_raised, is_of_group = (any(isinstance(each, kind) for each in own) for kind in kinds)
            is_cancelled &= is_raised or not is_of_group
        if is_cancelled or isinstance(exc, asyncio.CancelledError | KeyboardInterrupt | GeneratorExit):
            return ExecutionStatus.CANCELLED
        # Frameworks raise an error of their own for a tool that takes too long, with the TimeoutError as its cause, or
        # from None.
        is_late = any(isinstance(each, TimeoutError) for each in own)
        return ExecutionStatus.TIMEOUT if is_late else ExecutionStatus.TOOL_ERROR


def _cancellations() -> tuple[int, bool]:
    """Return how often the running task was cancelled, and whether its scope of anyio has ended."""
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0, anyio.current_effective_deadline() == -math.inf


def _causes(exc: BaseException | None, outer: Iterable[BaseException] = ()) -> Iterator[BaseException]:
    """Yield an error and those that led to it, up to those in `outer`."""
    seen, waiting = set(map(id, outer)), [exc]
    while waiting:
        cause = waiting.pop()
        # Python lets an error be a cause of itself, in a circle.
        if cause is None or id(cause) in seen:
            continue
        yield cause
        seen.add(id(cause))
        waiting.append(cause.__cause__ or cause.__context__)
        if isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
            waiting.append(cause.exceptions[0])


async def run_tool(tool: Callable[[], Awaitable[T]]) -> T:
    """Call `tool`, and return what its awaitable returns.

    Raises:
        TypeError: It returned none: a generator, which has not begun, or the value of a plain function, which has run.
    """
    made = tool()
    if not inspect.isawaitable(made):
        raise TypeError(
            f"The tool returned {type(made).__name__}, which cannot be awaited: make {_name(tool)} an `async def`."
        )
    return await made


def is_kind(tool: Callable[..., object], *kinds: Callable[[object], bool]) -> bool:
    """Return whether `tool`, or for an object its `__call__`, is a function of one of these kinds."""
    return any(kind(each) for kind in kinds for each in (tool, type(tool).__call__))


def _name(tool: object) -> str:
    return escape(getattr(tool, "__name__", type(tool).__name__))


def orphans(shape: Shape, *, limit: int) -> Statement:
    """Return the SELECT of intents without outcome from before the parameter `p_before`, newest first."""

    def build(dialect: str) -> Any:
        phase = "{}.extra ->> 'phase' = '{}'" if dialect == "postgresql" else "json_extract({}.extra, '$.phase') = '{}'"
        outcome = table.alias("outcome")
        # A value and no NOT EXISTS, of which PostgreSQL, without statistics, makes a join that reads every outcome for
        # each intent; and the organisation in no condition of an index, which would be read whole each time.
        has_outcome = (
            select(literal_number(1))
            .select_from(outcome)
            .where(
                outcome.c.parent_request_id == table.c.request_id,
                outcome.c.org_id.concat("") == table.c.org_id,
                literal_column(phase.format("outcome", OUTCOME)),
            )
            .correlate(table)
            .limit(literal_number(1))
            .scalar_subquery()
        )
        return (
            select_events(dialect, shape)
            .where(
                literal_column(phase.format("audit_events", INTENT)),
                table.c.timestamp < bindparam("p_before", type_=UtcDateTime()),
                has_outcome.is_(None),
            )
            .order_by(table.c.timestamp.desc(), table.c.id.desc())
            .limit(literal_number(limit))
        )

    return Statement(build)
