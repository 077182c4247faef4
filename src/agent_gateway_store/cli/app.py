"""The root command: global options, and the groups below it."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from agent_gateway_store.cli.context import Options, options_of
from agent_gateway_store.cli.errors import ExitCode, explain
from agent_gateway_store.cli.output import complain

_PACKAGE = "agent_gateway_store"
# The module of each command or group, and its line in the list of all. By their names: none but the one that is called
# is loaded, and to import the demo or the console, which import the command line, would be a circle.
_COMMANDS = {
    "demo": ("demo.command", "Run tools on real files, with audit and approvals."),
    "seed": ("demo.command", "Create a first caller and print its API key."),
    "console": ("console.command", "Serve the pages for approvals and the log."),
    "doctor": ("cli.doctor", "Check the installation; changes nothing."),
    "db": ("cli.db", "Bring the schema up to date, or check it."),
    "keys": ("cli.keys", "Issue, list, rotate and revoke API keys."),
    "audit": ("cli.export_import", "Write, find and follow audit events."),
    "approvals": ("cli.approvals", "List approvals and decide them."),
    "evidence": ("cli.evidence", "Seal and verify the log, and prove a call."),
    "retention": ("cli.retention", "Hold, prune into an archive, and erase."),
    "plugins": ("cli.plugins", "List the installed plugins, and check them."),
    "notifications": ("cli.notifications", "List, send, redrive and prune notices."),
    "sinks": ("cli.sinks", "See how far sinks are, and send again."),
}


class RootGroup(TyperGroup):
    """The root command, which catches what fails below it. Usage errors are left to Typer.

    Plugins are loaded only where their commands may be meant: for the list of all commands, and for a name that is
    none of ours.
    """

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        # Of these names Typer suggests one that is near to what was typed.
        self.commands = dict.fromkeys(_COMMANDS)  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of our commands, then those of plugins."""
        return [*_COMMANDS, *self._plugin_commands]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Load a command by name, ours or a plugin's, and return it; None if there is none."""
        if cmd_name not in _COMMANDS:
            return self._plugin_commands.get(cmd_name)
        above = typer.Typer(rich_markup_mode=None)
        above.add_typer(import_module(f"{_PACKAGE}.{_COMMANDS[cmd_name][0]}").app)
        return _take_global_options(typer.main.get_group(above).commands, self.params)[cmd_name]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a line for each command; none of ours is loaded for it."""
        rows = [(name, summary) for name, (_, summary) in _COMMANDS.items()]
        rows += [(name, each.get_short_help_str()) for name, each in self._plugin_commands.items() if not each.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    @cached_property
    def _plugin_commands(self) -> dict[str, Any]:
        from agent_gateway_store.cli.plugins import plugin_commands

        return _take_global_options(plugin_commands(_COMMANDS), self.params)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error becomes one sentence and an exit code."""
        try:
            result = super().invoke(ctx)
            # Here and not at the end of Python, so that a full disk or a closed pipe is reported as an error.
            sys.stdout.flush()
        except KeyboardInterrupt:
            complain("Stopped.")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        except BrokenPipeError:
            _drop_stdout()
            raise typer.Exit(ExitCode.BROKEN_PIPE) from None
        except Exception as exc:
            if isinstance(exc, typer.Exit | typer.Abort) or hasattr(exc, "format_message"):
                raise
            if ctx.obj and ctx.obj.debug:
                complain("".join(traceback.format_exception(exc)).rstrip(), lines=True)
            sentence, code = explain(exc)
            complain(sentence)
            try:
                sys.stdout.flush()
            except (OSError, ValueError):
                _drop_stdout()
            raise typer.Exit(code) from None
        return result


def _take_global_options(commands: Mapping[str, Any], options: list[Any]) -> dict[str, Any]:
    """Return the commands, which then take the root's options as well, except those that they have themselves."""
    for command in commands.values():
        own = {flag for each in command.params for flag in each.opts}
        for option in options:
            if not option.is_eager and not own.intersection(option.opts):
                again = copy(option)
                again.expose_value, again.hidden, again.callback = False, True, _take_late
                command.params.append(again)
        _take_global_options(getattr(command, "commands", {}), options)
    return dict(commands)


def _take_late(ctx: typer.Context, param: Any, value: Any) -> None:
    if value is not None and value is not False:
        _remember(ctx, replace(options_of(ctx), **{param.name: value}))


def _drop_stdout() -> None:
    # Python flushes standard output once more at its end, which would complain a second time.
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    name="gateway-store",
    cls=RootGroup,
    no_args_is_help=True,
    add_completion=False,
    # Rich takes longer to load than everything else that printing help does.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="The system of record of an AI-agent tool gateway: audit log, human approvals, API keys.",
    epilog="The options above may also stand after the command. "
    "Exit codes: 0 ok, 1 error, 2 usage, 3 integrity violation, 4 not found or expired, 5 a dependency is down.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"gateway-store {version('agent-gateway-store')}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    database_url: Annotated[
        str | None, typer.Option(help="Database; default: DATABASE_URL, else the SQLite file gateway.db.")
    ] = None,
    redis_url: Annotated[str | None, typer.Option(help='Redis; default: REDIS_URL; "" works without it.')] = None,
    org: Annotated[str | None, typer.Option(help="See and change only this organisation.")] = None,
    env_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, readable=True, help="Read settings from this .env file.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and what is logged.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the global options."""
    # Without a handler Python would print the store's warnings beside the one sentence that a command ends with.
    logging.getLogger("agent_gateway_store").addHandler(logging.NullHandler())
    _remember(ctx, Options(database_url, redis_url, org, env_file, debug))


def _remember(ctx: typer.Context, options: Options) -> None:
    if options.org == "":
        raise typer.BadParameter("--org must not be empty.")
    if options.database_url == "":
        raise typer.BadParameter("--database-url must not be empty.")
    if options.debug:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    ctx.find_root().obj = options
