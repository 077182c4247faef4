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

from agent_gateway_store.cli import (
    approvals,
    db,
    evidence,
    export_import,
    keys,
    notifications,
    plugins,
    retention,
    sinks,
)
from agent_gateway_store.cli.context import Options, options_of
from agent_gateway_store.cli.doctor import doctor
from agent_gateway_store.cli.errors import ExitCode, explain
from agent_gateway_store.cli.output import complain

# By their names, since an import of the demo or the console, which import the command line, would be a circle.
_ABOVE = ("agent_gateway_store.demo.command", "agent_gateway_store.console.command")


class RootGroup(TyperGroup):
    """The root command, which catches what fails below it. Usage errors are left to Typer.

    The demo, the console and the plugins are loaded only where their commands may be meant: for the list of all
    commands, and for a name that is none of the groups below.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of our commands, then those of plugins."""
        return [*self._commands_above, *super().list_commands(ctx), *self._plugin_commands]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by name, ours or a plugin's; None if there is none."""
        own = super().get_command(ctx, cmd_name) or self._commands_above.get(cmd_name)
        return own or self._plugin_commands.get(cmd_name)

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Let the commands below take the global options, too, before the first of them is read."""
        _take_global_options(self.commands, self.params)
        return super().make_context(info_name, args, parent, **extra)

    @cached_property
    def _commands_above(self) -> dict[str, Any]:
        groups = (typer.main.get_group(import_module(module).app) for module in _ABOVE)
        found = {name: each for group in groups for name, each in group.commands.items()}
        return _take_global_options(found, self.params)

    @cached_property
    def _plugin_commands(self) -> dict[str, Any]:
        return _take_global_options(plugins.plugin_commands({*self.commands, *self._commands_above}), self.params)

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
app.add_typer(db.app, name="db")
app.add_typer(keys.app, name="keys")
app.add_typer(export_import.app, name="audit")
app.add_typer(approvals.app, name="approvals")
app.add_typer(evidence.app, name="evidence")
app.add_typer(retention.app, name="retention")
app.add_typer(plugins.app, name="plugins")
app.add_typer(notifications.app, name="notifications")
app.add_typer(sinks.app, name="sinks")
app.command("doctor")(doctor)


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
