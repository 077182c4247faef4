"""The host's callbacks: what a policy returns, and which callback failed where, without a value of what it received."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from agent_gateway_store._text import word
from agent_gateway_store.encoding.plain import code_of
from agent_gateway_store.errors import GatewayStoreError
from agent_gateway_store.models.audit import Decision
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import FrozenModel, ToolCall


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
Sanitize = Callable[[ToolCall], Mapping[str, Any] | Awaitable[Mapping[str, Any]]]


class CallRefusedError(Exception):
    """The call must not run. The text is for the model; `rule` is that of its event, where no policy has decided."""

    def __init__(self, reason: str, *, rule: str = "gateway.refused") -> None:
        super().__init__(reason)
        self.rule = rule


class CallbackError(Exception):
    """A callback failed. The text names it, its line and the fields that are wrong, and quotes no value."""


async def call_back(
    role: str, callback: Callable[..., Any], *args: Any, returns: type[Any], refusals: tuple[type[Exception], ...] = ()
) -> Any:
    """Call a callback, sync or async, and return what it returns.

    Args:
        role: The argument that it was given as.
        returns: What it must return.
        refusals: What it may raise to refuse a call, beside `CallRefusedError` and errors of the store.

    Raises:
        CallbackError: It raised another error, or returned something else.
    """
    try:
        answer = callback(*args)
        if inspect.isawaitable(answer):
            answer = await answer
    except Exception as exc:
        if isinstance(exc, (CallRefusedError, CallbackError, GatewayStoreError, *refusals)):
            raise
        raise CallbackError(f"{_name(role, callback)} failed: {failure(exc, callback)}") from None
    if not isinstance(answer, returns) or answer == "":
        found = type(answer).__name__ if answer != "" else "an empty text"
        raise CallbackError(f"{_name(role, callback)} must return a {returns.__name__}, not {found}.")
    if not isinstance(answer, BaseModel):
        return answer
    try:
        # `model_copy` checks nothing: another decision must not run, and no event can be written of a wrong caller.
        return returns.model_validate(dict(answer))
    except ValidationError as exc:
        text = f"{_name(role, callback)} returned a {returns.__name__} that is not valid{_fields(exc)}."
        raise CallbackError(text) from None


def failure(exc: BaseException, callback: Callable[..., Any] | None = None) -> str:
    """Return the class of an error, the line of the callback at which it came, and the fields that it names."""
    frames = traceback.extract_tb(exc.__traceback__)
    file = getattr(code_of(callback), "co_filename", None)
    own = [frame for frame in frames if frame.filename == file] or frames[1:] or frames
    lines = [own[-1]] if own else []
    # Where a library raised the error: the callback's own line comes first.
    lines += [frame for frame in frames[-1:] if frame not in lines]
    places = ", ".join(f"{frame.filename}:{frame.lineno}" for frame in lines)
    return f"{type(exc).__name__} at {places}{_fields(exc)}"


def _fields(exc: BaseException) -> str:
    if not isinstance(exc, ValidationError):
        return ""
    # The first part of a path is a field; those below may be keys of a dict, which are values.
    found = exc.errors(include_url=False, include_context=False, include_input=False)
    names = dict.fromkeys(word(each["loc"][0]) for each in found if each["loc"])
    return f" ({exc.error_count()} wrong: {', '.join(names) or 'the value'})"


def _name(role: str, callback: Callable[..., Any]) -> str:
    code = code_of(callback)
    name = getattr(callback, "__qualname__", type(callback).__qualname__)
    return f"{role} {name}" if code is None else f"{role} {name} ({code.co_filename}:{code.co_firstlineno})"
