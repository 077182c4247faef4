"""`gateway-store plugins`: what is installed, what is wrong with it, whether it works; and the commands of plugins."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

import typer

from agent_gateway_store._text import describe
from agent_gateway_store.cli.context import run, settings_of
from agent_gateway_store.cli.errors import CommandError, ExitCode
from agent_gateway_store.cli.output import JsonOption, complain, print_page
from agent_gateway_store.clock import utc_now

if TYPE_CHECKING:
    from agent_gateway_store.hooks.dispatch import Dispatcher
    from agent_gateway_store.hooks.manager import Plugins
    from agent_gateway_store.hooks.plugin import PluginRecord, SettingsState
    from agent_gateway_store.models.values import Notice
    from agent_gateway_store.settings import StoreSettings

app = typer.Typer(name="plugins", no_args_is_help=True, help="List the installed plugins, and check them.")

COMMANDS = "gateway_store_register_commands"
# Seconds that plugins have to register their commands, which takes no I/O of theirs: as long as PLUGIN_TIMEOUT_SECONDS
# is by default, which cannot be read here: no option, and so no settings, is known yet.
_PATIENCE_S = 5.0
_SAME = ("name", "version", "distribution", "hooks", "notifiers", "sinks", "settings", "state")
_COLUMNS = {name: name for name in _SAME} | {"error": "why"}
_CHECKED = {name: name for name in ("name", "settings", "notifiers", "ok", "problems")}


def _load(settings: StoreSettings) -> tuple[Plugins, dict[str, SettingsState]]:
    """Load the plugins and ask them for their notifiers, sinks, commands and settings. Connects nothing."""
    from agent_gateway_store.hooks.manager import Plugins

    plugins = Plugins()
    plugins.notifiers(settings)
    plugins.sinks(settings)
    for plugin, made in _commands(plugins):
        if isinstance(made, BaseException):
            plugins.add_problem(plugin, f"{COMMANDS}: {describe(made)}")
    return plugins, plugins.settings(settings.plugin_timeout_seconds)


def plugin_records(settings: StoreSettings) -> list[dict[str, Any]]:
    """Return what is known of each plugin, its settings included. Connects nothing."""
    from agent_gateway_store.hooks.manager import DISTRIBUTION
    from agent_gateway_store.hooks.plugin import REGISTER, SETTINGS

    plugins, configured = _load(settings)
    found = []
    for record in plugins.records:
        state = configured.get(record.name)
        item = {**asdict(record), "settings": asdict(state) if state else None}
        only_notifies = {REGISTER} <= {*record.hooks} <= {REGISTER, SETTINGS}
        # A stranger's plugin may well work by its defaults; of ours, none that has settings does.
        unset = record.distribution == DISTRIBUTION and state is not None and state.state == "defaults"
        if record.state == "active" and not (record.notifiers or record.sinks) and (only_notifies or unset):
            prefix = f": set the variables that begin with {state.prefix}" if state else ""
            item |= {"state": "idle", "error": f"it does nothing yet{prefix}"}
        found.append(item)
    return found


@app.command("list")
def list_plugins(ctx: typer.Context, json: JsonOption = False) -> None:
    """List plugins with their hooks, settings and state; needs no database.

    A plugin is active, idle (it works, and does nothing before its settings are given), blocked or broken.
    """
    _print_plugins(plugin_records(settings_of(ctx)), _COLUMNS, as_json=json)


@app.command()
def check(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Only these; default: all.")] = None,
    send: Annotated[bool, typer.Option("--send/--no-send", help="Send a test notice through each notifier.")] = True,
    json: JsonOption = False,
) -> None:
    """Check the settings of plugins and send a test notice. Exit code 1 if anything fails.

    The notice is that of a made-up approval, which is then cancelled; it says that it is a test.
    """
    settings = settings_of(ctx)
    plugins, configured = _load(settings)
    known = {record.name for record in plugins.records}
    if unknown := [name for name in names or () if name not in known]:
        raise CommandError(
            f"There is no plugin {', '.join(unknown)}: see `gateway-store plugins list`.", ExitCode.NOT_FOUND
        )
    checked = run(check_plugins(plugins, configured, settings, only=names or (), send=send))
    _print_plugins(checked, _CHECKED, as_json=json)
    if not all(each["ok"] for each in checked):
        raise typer.Exit(ExitCode.ERROR)


def _print_plugins(items: list[dict[str, Any]], columns: dict[str, str], *, as_json: bool) -> None:
    from agent_gateway_store.results import Page

    if not as_json:
        items = [item | {"settings": _settings_text(item["settings"])} for item in items]
    print_page(Page(items), columns=columns, optional={"hooks", "distribution"}, as_json=as_json)


def _settings_text(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return ""
    return ": ".join(filter(None, (settings["state"], "; ".join(settings["problems"]))))


def plugin_commands(taken: Container[str]) -> dict[str, Any]:
    """Load the plugins and return their commands and groups by name, but for `taken` names.

    Raises nothing but KeyboardInterrupt: the commands of a plugin that fails are left out, with a line on stderr.
    """
    from agent_gateway_store.hooks.manager import Plugins

    # Before any command runs, and so before `root` does the same: what is broken is printed below, once.
    logging.getLogger("agent_gateway_store").addHandler(logging.NullHandler())
    plugins = Plugins(load_bundled=False)
    for record in plugins.records:
        if record.state == "broken":
            complain(f"Plugin {record.name} is broken: {record.error}.")
    commands: dict[str, Any] = {}
    for plugin, made in _commands(plugins):
        if isinstance(made, BaseException):
            complain(f"The commands of plugin {plugin} are left out: {describe(made)}.")
            continue
        if refused := sorted(name for name in made if name in taken or name in commands):
            complain(f"Plugin {plugin} has commands whose names are taken, which are left out: {', '.join(refused)}.")
        commands |= {name: command for name, command in made.items() if name not in refused}
    return commands


def _commands(plugins: Plugins) -> Iterator[tuple[str, dict[str, Any] | BaseException]]:
    """Yield for each plugin that has commands its name, and the commands by name or why there are none."""
    callers = plugins.callers(COMMANDS)
    if not callers:
        return
    from agent_gateway_store.hooks.executor import ask_plugins

    yield from ask_plugins({name: partial(_registered, caller) for name, caller in callers.items()}, _PATIENCE_S)


def _registered(caller: Callable[..., list[object]]) -> dict[str, Any]:
    app = typer.Typer()
    for answer in caller(app=app):
        # Closed, since a coroutine that is dropped makes Python warn on standard error.
        if inspect.iscoroutine(answer):
            answer.close()
            raise TypeError(f"{COMMANDS} must not be async")
    return dict(typer.main.get_group(app).commands)


async def check_plugins(
    plugins: Plugins,
    configured: Mapping[str, SettingsState],
    settings: StoreSettings,
    *,
    only: Container[str] = (),
    send: bool = True,
) -> list[dict[str, Any]]:
    """Check plugins, all but the blocked ones, and send two test notices through each of their notifiers.

    With `only`, the names of those to check, what is not ready to work is a failure. The notifiers are those that took
    the test notices; without `send`: all of them.
    """
    import asyncio

    from agent_gateway_store.hooks.dispatch import Dispatcher

    dispatcher = Dispatcher(plugins, settings)
    chosen = [each for each in plugins.records if (each.name in only if only else each.state != "blocked")]
    try:
        if send:
            await dispatcher.open()
        return await asyncio.gather(
            *(_check(each, configured.get(each.name), dispatcher if send else None, bool(only)) for each in chosen)
        )
    finally:
        await dispatcher.aclose()


async def _check(
    record: PluginRecord, settings: SettingsState | None, dispatcher: Dispatcher | None, is_named: bool
) -> dict[str, Any]:
    from agent_gateway_store.hooks.plugin import REGISTER

    problems = [record.error] if record.error else []
    # Every installed plugin is checked by default; one that nobody has set up is a failure only where it was named.
    if settings is not None and (settings.state == "wrong" or (is_named and settings.state == "missing")):
        problems += settings.problems
    if is_named and record.state == "active" and REGISTER in record.hooks and not record.notifiers:
        reads = f": see the variables {settings.prefix}..." if settings is not None else ""
        problems.append(f"it offers no notifier, so it is not set up{reads}")
    reached = []
    for notifier in record.notifiers:
        error = await _send(dispatcher, notifier) if dispatcher is not None else None
        if error is None:
            reached.append(notifier)
        else:
            problems.append(f"{notifier}: {error}")
    return {
        "name": record.name,
        "settings": settings and asdict(settings),
        "notifiers": reached,
        "ok": not problems,
        "problems": problems,
    }


async def _send(dispatcher: Dispatcher, notifier: str) -> str | None:
    for notice in sample_notices():
        if (report := await dispatcher.deliver(notifier, notice)).error is not None:
            return report.error
    return None


def sample_notices() -> Sequence[Notice]:
    """Return the notices of one made-up approval: that it waits, then that it was cancelled."""
    from agent_gateway_store.models.values import ApprovalStatus, Notice, ToolCall

    # The second notice cancels the first, so that no channel is left with a question that nobody can answer.
    now = utc_now()
    pending = Notice(
        event="pending",
        delivery_id=uuid4(),
        approval_id=uuid4(),
        org_id="default",
        request_id="plugins-check",
        caller_id="gateway-store",
        tool_call=ToolCall(server="gateway-store", tool="plugins_check", arguments={"test": True}),
        risk_explanation="This is a test by `gateway-store plugins check`. Nobody needs to decide.",
        created_at=now,
        expires_at=now + timedelta(minutes=1),
        status=ApprovalStatus.PENDING,
    )
    decided = {
        "event": "decision",
        "delivery_id": uuid4(),
        "status": ApprovalStatus.CANCELLED,
        "approver_id": "gateway-store",
        "note": "The test is over.",
        "decided_at": now,
    }
    return pending, pending.model_copy(update=decided)
