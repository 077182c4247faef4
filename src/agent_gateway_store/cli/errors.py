"""The one place that turns an error into a sentence and an exit code."""

from __future__ import annotations

from enum import IntEnum
from errno import ENOSPC
from typing import TYPE_CHECKING

from agent_gateway_store._text import describe, mask_tokens

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = ["CommandError", "ExitCode", "describe_validation", "explain"]


class ExitCode(IntEnum):
    """How the process ends; 3 is kept for integrity violations."""

    OK = 0
    ERROR = 1
    USAGE = 2
    INTEGRITY = 3
    NOT_FOUND = 4
    UNAVAILABLE = 5
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class CommandError(Exception):
    """A command cannot do what was asked.

    Attributes:
        code: How the process ends.
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.ERROR) -> None:
        super().__init__(message)
        self.code = code


def explain(error: BaseException) -> tuple[str, ExitCode]:
    """Return the sentence that tells the user about `error`, and the exit code."""
    from pydantic import ValidationError

    from agent_gateway_store import errors

    if isinstance(error, CommandError):
        return str(error), error.code
    if isinstance(error, errors.GatewayStoreError):
        return mask_tokens(str(error)), _code(error)
    if isinstance(error, ValidationError):
        if error.title == "StoreSettings":
            return f"A setting is wrong: {describe_validation(error)}. Correct it and try again.", ExitCode.USAGE
        return f"{error.title} was refused: {describe_validation(error)}.", ExitCode.ERROR
    if isinstance(error, OSError) and error.errno == ENOSPC:
        return "The disk is full: make room and try again.", ExitCode.ERROR
    return f"Unexpected error, {describe(error)}: run with --debug for the traceback.", ExitCode.ERROR


def _code(error: Exception) -> ExitCode:
    from agent_gateway_store import errors

    codes = {
        errors.ApprovalNotFoundError: ExitCode.NOT_FOUND,
        errors.ApprovalExpiredError: ExitCode.NOT_FOUND,
        errors.ApiKeyNotFoundError: ExitCode.NOT_FOUND,
        errors.InvalidUrlError: ExitCode.USAGE,
        errors.InvalidCursorError: ExitCode.USAGE,
        errors.StoreUnavailableError: ExitCode.UNAVAILABLE,
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), ExitCode.ERROR)


def describe_validation(error: ValidationError) -> str:
    """Return what is wrong as `field: reason; field: reason`, without the input, which may be a secret."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    parts = [f"{_place(each['loc'])}{_lower_first(each['msg'])}" for each in found[:3]]
    more = [f"and {len(found) - 3} more"] if len(found) > 3 else []
    return "; ".join([*parts, *more])


def _place(location: tuple[int | str, ...]) -> str:
    place = ".".join(str(part) for part in location)
    return f"{place[:80]}: " if place else ""


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
