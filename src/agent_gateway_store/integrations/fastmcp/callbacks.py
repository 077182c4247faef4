"""Calls the host's callbacks, and says which one failed and where, without a value of what it received."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any

from fastmcp.exceptions import DisabledError, NotFoundError, ToolError
from pydantic import ValidationError

from agent_gateway_store._text import word
from agent_gateway_store.encoding.plain import code_of
from agent_gateway_store.errors import GatewayStoreError

# What a callback raises to refuse a call.
_REFUSALS = (ToolError, NotFoundError, DisabledError, GatewayStoreError)


class CallbackError(Exception):
    """A callback failed. The text names it, its line and the fields that are wrong, and quotes no value."""


async def call_back(role: str, callback: Callable[..., Any], *args: Any, returns: type[Any]) -> Any:
    """Call a callback, sync or async, and return what it returns.

    Args:
        role: The argument of the middleware that it was given as.
        returns: What it must return.

    Raises:
        CallbackError: It raised an error that refuses no call, or returned something else.
    """
    try:
        answer = callback(*args)
        if inspect.isawaitable(answer):
            answer = await answer
    except _REFUSALS:
        raise
    except Exception as exc:
        raise CallbackError(f"{_name(role, callback)} failed: {failure(exc, callback)}") from None
    if not isinstance(answer, returns) or answer == "":
        found = type(answer).__name__ if answer != "" else "an empty text"
        raise CallbackError(f"{_name(role, callback)} must return a {returns.__name__}, not {found}.")
    return answer


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
