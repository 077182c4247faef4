"""The one place that turns an error into a sentence and an exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from errno import EDQUOT, ENOSPC
from os import strerror
from typing import TYPE_CHECKING

from agent_gateway_store import errors
from agent_gateway_store._text import describe, escape, mask_tokens

if TYPE_CHECKING:
    from pydantic import ValidationError


class ExitCode(IntEnum):
    """How the process ends; 3 means that what is there was tampered with, or does not verify."""

    # 2 is what Click uses for usage errors; 128 and the number of the signal (SIGINT 2, SIGPIPE 13) is what shells
    # report for a process that a signal ended.
    OK = 0
    ERROR = 1
    USAGE = 2
    INTEGRITY = 3
    NOT_FOUND = 4
    UNAVAILABLE = 5
    PENDING = 6
    REFUSED = 7
    INTERRUPTED = 130
    BROKEN_PIPE = 141


_CODES: dict[ExitCode, tuple[type[Exception], ...]] = {
    ExitCode.USAGE: (errors.InvalidUrlError, errors.InvalidCursorError),
    ExitCode.INTEGRITY: (errors.InvalidEvidenceError, errors.LogMismatchError, errors.ArchiveError),
    ExitCode.NOT_FOUND: (
        *(errors.ApprovalNotFoundError, errors.ApprovalExpiredError, errors.ApiKeyNotFoundError),
        *(errors.AuditEventNotFoundError, errors.SinkNotFoundError, errors.HoldNotFoundError),
    ),
    ExitCode.UNAVAILABLE: (errors.NotDeliveredError, errors.StoreUnavailableError),
    ExitCode.REFUSED: (errors.EventHeldError,),
}


class CommandError(Exception):
    """A command cannot do what was asked; the process ends with `code`."""

    def __init__(self, message: str, code: ExitCode = ExitCode.ERROR) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def file_errors(path: object, refusal: Callable[[str], Exception] = CommandError) -> Iterator[None]:
    """Let errors of the system name the path that the user gave, and raise a `refusal` for a value that is wrong."""
    try:
        yield
    except errors.GatewayStoreError:
        raise
    except OSError as exc:
        if exc.errno is None:
            raise CommandError(str(exc)) from exc
        # The system may name a file that the user never saw, such as the one that is written before it is renamed.
        step = "make room" if exc.errno in (ENOSPC, EDQUOT) else "check the path and its permissions"
        raise CommandError(f"{path}: {strerror(exc.errno)}: {step} and try again.") from exc
    except ValueError as exc:
        raise refusal(str(exc)) from exc


def explain(error: BaseException) -> tuple[str, ExitCode]:
    """Return the sentence about `error` for the user, and the exit code."""
    from pydantic import ValidationError

    if isinstance(error, CommandError):
        return str(error), error.code
    if isinstance(error, errors.GatewayStoreError):
        code = next((code for code, kinds in _CODES.items() if isinstance(error, kinds)), ExitCode.ERROR)
        return mask_tokens(str(error)), code
    if isinstance(error, ValidationError):
        if error.title == "StoreSettings":
            return f"A setting is wrong: {describe_validation(error)}. Correct it and try again.", ExitCode.USAGE
        return f"{error.title} was refused: {describe_validation(error)}.", ExitCode.ERROR
    if isinstance(error, OSError) and error.errno == ENOSPC:
        return "The disk is full: make room and try again.", ExitCode.ERROR
    if isinstance(error, FileNotFoundError) and error.filename is None:
        # Of all that the system looks for only the current folder has no name.
        return "The current folder was removed: change to another one and try again.", ExitCode.ERROR
    if isinstance(error, OSError) and error.filename is not None:
        what = f"{escape(str(error.filename))}: {error.strerror or strerror(error.errno or 0)}"
        return f"{what}: check the path and its permissions and try again.", ExitCode.ERROR
    return f"Unexpected error, {describe(error)}: run with --debug for the traceback.", ExitCode.ERROR


def describe_validation(error: ValidationError) -> str:
    """Return what is wrong as `field: reason; field: reason`, without the input, which may be a secret."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    parts = []
    # Three are read in one line; a name that was sent as a field may be as long as its sender liked.
    for each in found[:3]:
        place = ".".join(map(str, each["loc"]))[:80]
        reason = each["msg"][:1].lower() + each["msg"][1:]
        parts.append(f"{place}: {reason}" if place else reason)
    if len(found) > 3:
        parts.append(f"and {len(found) - 3} more")
    return "; ".join(parts)
