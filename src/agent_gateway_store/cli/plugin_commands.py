"""Commands that plugins add (`gateway_store_register_commands`)."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Container
from functools import partial
from typing import Any

import typer

from agent_gateway_store._text import describe
from agent_gateway_store.cli.output import complain

__all__ = ["COMMANDS", "plugin_commands"]

COMMANDS = "gateway_store_register_commands"
_PATIENCE_S = 5.0


def plugin_commands(taken: Container[str]) -> dict[str, Any]:
    """Load the plugins and return their commands and groups by name. Raises nothing but KeyboardInterrupt.

    What a plugin cannot give is left out, with one line on standard error for each plugin.

    Args:
        taken: Names that no plugin can have.
    """
    from agent_gateway_store.hooks.executor import run_in_thread
    from agent_gateway_store.hooks.manager import Plugins

    # Before any command runs: what is broken is told below, once.
    logging.getLogger("agent_gateway_store").addHandler(logging.NullHandler())
    plugins = Plugins()
    for record in plugins.records:
        if record.state == "broken":
            complain(f"Plugin {record.name} is broken: {record.error}.")
    commands: dict[str, Any] = {}
    for plugin, caller in plugins.callers(COMMANDS).items():
        try:
            made = run_in_thread(partial(_commands, caller), name=f"gateway-store {plugin}").result(_PATIENCE_S)
        except KeyboardInterrupt:
            raise
        except BaseException as exc:
            complain(f"The commands of plugin {plugin} are left out: {describe(exc)}.")
            continue
        if refused := sorted(name for name in made if name in taken or name in commands):
            complain(f"Plugin {plugin} has commands whose names are taken, which are left out: {', '.join(refused)}.")
        commands |= {name: command for name, command in made.items() if name not in refused}
    return commands


def _commands(caller: Callable[..., list[object]]) -> dict[str, Any]:
    app = typer.Typer()
    for answer in caller(app=app):
        if inspect.iscoroutine(answer):
            answer.close()
            raise TypeError(f"{COMMANDS} must not be async")
    return dict(typer.main.get_group(app).commands)
