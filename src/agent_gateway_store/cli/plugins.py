"""`gateway-store plugins`: what is installed, and what is wrong with it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from agent_gateway_store.cli.output import JsonOption, print_page
from agent_gateway_store.cli.running import settings_of

if TYPE_CHECKING:
    from agent_gateway_store.settings import StoreSettings

__all__ = ["app", "plugin_records"]

app = typer.Typer(no_args_is_help=True, help="Look at the installed plugins.")

_COLUMNS = {
    "name": "name",
    "version": "version",
    "distribution": "distribution",
    "hooks": "hooks",
    "state": "state",
    "error": "why",
}


@app.callback()
def group() -> None:
    """Keep `list` a command of its own, though it is the only one."""


def plugin_records(settings: StoreSettings) -> list[dict[str, Any]]:
    """Load the plugins, ask them for their notifiers, and return what is known of each. Connects nothing."""
    from agent_gateway_store.hooks import Plugins

    plugins = Plugins()
    plugins.notifiers(settings)
    return [{**asdict(record), "hooks": list(record.hooks)} for record in plugins.records]


@app.command("list")
def list_plugins(ctx: typer.Context, json: JsonOption = False) -> None:
    """List plugins with their hooks and their state; needs no database."""
    from agent_gateway_store.results import Page

    print_page(Page(plugin_records(settings_of(ctx))), columns=_COLUMNS, as_json=json)
