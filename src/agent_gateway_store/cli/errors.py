"""The one place that turns an error into a sentence on standard error and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from enum import IntEnum
from errno import ENOSPC
from functools import cached_property
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from agent_gateway_store._text import describe, mask_tokens
from agent_gateway_store.cli.output import complain
from agent_gateway_store.cli.plugin_commands import plugin_commands

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = ["CommandError", "ExitCode", "RootGroup", "explain", "spell_validation"]


class ExitCode(IntEnum):
    """What the process says at its end; 3 is kept for integrity violations."""

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
            return f"A setting is wrong: {spell_validation(error)}. Correct it and try again.", ExitCode.USAGE
        return f"{error.title} was refused: {spell_validation(error)}.", ExitCode.ERROR
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


def spell_validation(error: ValidationError) -> str:
    """Return what is wrong as `field: reason; field: reason`, without the input, which may be a secret."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    spelt = [f"{_place(each['loc'])}{_lower_first(each['msg'])}" for each in found[:3]]
    more = [f"and {len(found) - 3} more"] if len(found) > 3 else []
    return "; ".join([*spelt, *more])


def _place(location: tuple[int | str, ...]) -> str:
    place = ".".join(str(part) for part in location)
    return f"{place[:80]}: " if place else ""


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


class RootGroup(TyperGroup):
    """The root command: whatever fails below ends here. Usage errors are left to Typer.

    Plugins are loaded where their commands may be meant: for the list of all, and for a name that is none of ours.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of our commands, then those of plugins."""
        return [*super().list_commands(ctx), *self._plugin_commands]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by name, ours or a plugin's; None if there is none."""
        return super().get_command(ctx, cmd_name) or self._plugin_commands.get(cmd_name)

    @cached_property
    def _plugin_commands(self) -> dict[str, Any]:
        return plugin_commands(self.commands)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error becomes one sentence and an exit code."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        except BrokenPipeError:
            _drop_stdout()
            raise typer.Exit(ExitCode.BROKEN_PIPE) from None
        except Exception as exc:
            if isinstance(exc, typer.Exit | typer.Abort) or hasattr(exc, "format_message"):
                raise
            if ctx.params.get("debug"):
                complain("".join(traceback.format_exception(exc)).rstrip(), lines=True)
            sentence, code = explain(exc)
            complain(sentence)
            _drop_unwritable()
            raise typer.Exit(code) from None
        return result


def _drop_unwritable() -> None:
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _drop_stdout()


def _drop_stdout() -> None:
    # Python flushes standard output once more at its end, which would complain a second time.
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
