"""Finds the plugins and loads them, each apart from the others."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

from agent_gateway_store._text import describe, escape
from agent_gateway_store.hooks import PROJECT
from agent_gateway_store.hooks.plugin import REGISTER, REGISTER_SINKS, SETTINGS, Plugin, PluginRecord, SettingsState

if TYPE_CHECKING:
    from agent_gateway_store.hooks.specs import Notifier, Sink
    from agent_gateway_store.settings import StoreSettings

LOAD_VARIABLE = "AGENT_GATEWAY_STORE_LOAD_PLUGINS"
BLOCK_VARIABLE = "AGENT_GATEWAY_STORE_BLOCK_PLUGINS"

DISTRIBUTION = "agent-gateway-store"

logger = logging.getLogger("agent_gateway_store.hooks")


class Plugins:
    """The plugins of a store: those given to it, then those installed. All are loaded at once, in the calling thread.

    Each is loaded, called and reported apart from the others. One that cannot be imported, raises (`SystemExit`
    included) or has the wrong shape is recorded as broken, and the rest are used. Of those installed the bundled ones
    come first, and no other distribution takes their names.

    Args:
        given: Modules, objects with hook implementations, notifiers, or classes of these that need no argument. They
            take precedence over an installed plugin of the same name.
        environ: Where the two variables are read; None means `os.environ`. `AGENT_GATEWAY_STORE_LOAD_PLUGINS` names the
            installed plugins to load, separated by commas: empty means none, unset all.
            `AGENT_GATEWAY_STORE_BLOCK_PLUGINS` names plugins, given or installed, that are never loaded.
        load_bundled: False leaves the bundled ones unloaded, which keep their names all the same.
    """

    def __init__(
        self, given: Iterable[object] = (), *, environ: Mapping[str, str] | None = None, load_bundled: bool = True
    ) -> None:
        environ = os.environ if environ is None else environ
        self._load = _names_in(environ[LOAD_VARIABLE]) if LOAD_VARIABLE in environ else None
        self._block = _names_in(environ.get(BLOCK_VARIABLE, ""))
        self._load_bundled = load_bundled
        self._plugins: list[Plugin] = []
        self._callers: dict[str, Mapping[str, Callable[..., list[object]]]] = {}
        for each in given:
            self._add_given(each)
        first_installed = len(self._plugins)
        self._bundled: set[str] = set()
        for entry_point, origin in _installed():
            if origin[0] == DISTRIBUTION:
                self._bundled.add(entry_point.name)
            self._add_installed(entry_point, origin)
        found = {plugin.name for plugin in self._plugins[first_installed:]}
        for name in sorted((self._load or set()) - found):
            self._new(name).add_problem(f"{LOAD_VARIABLE} names it, but no such plugin is installed")

    @property
    def records(self) -> list[PluginRecord]:
        """The present record of each plugin, in the order of loading."""
        return [plugin.record for plugin in self._plugins]

    def add_problem(self, name: str, text: str) -> None:
        """Record and log a problem of the plugin of this name."""
        next(plugin for plugin in self._plugins if plugin.name == name).add_problem(text)

    def callers(self, hook: str) -> Mapping[str, Callable[..., list[object]]]:
        """Return by plugin name the function that calls that plugin's implementations of `hook`.

        It raises what the plugin raises, and affects no other plugin. The results of async implementations are
        coroutines, to be awaited.
        """
        if (found := self._callers.get(hook)) is None:
            asked = ((plugin.name, plugin.caller(hook)) for plugin in self._plugins)
            # Kept, since every decision and every batch of events asks, and all plugins were loaded at the start.
            found = self._callers[hook] = {name: caller for name, caller in asked if caller is not None}
        return found

    def notifiers(self, settings: StoreSettings) -> dict[str, Notifier]:
        """Ask every plugin for its notifiers. Raises nothing.

        The plugins are asked side by side, each in a thread, and together have `plugin_timeout_seconds` to answer. The
        call blocks that long at most. An object that is not a notifier, and a second notifier of a name, is left out
        and recorded.

        Returns:
            Notifiers by name, in the order of loading; new ones at each call.
        """
        return self._offered(REGISTER, "notifier", settings)

    def sinks(self, settings: StoreSettings) -> dict[str, Sink]:
        """Ask every plugin for its sinks, as `notifiers` does for those."""
        return self._offered(REGISTER_SINKS, "sink", settings)

    def _offered(self, hook: str, kind: str, settings: StoreSettings) -> dict[str, Any]:
        # Here, so that a command line without a store loads no asyncio.
        from agent_gateway_store.hooks.executor import ask_plugins

        for plugin in self._plugins:
            plugin.forget_offer(hook)
        offering = {plugin.name: plugin for plugin in self._plugins if plugin.offers(hook)}
        asked = {name: partial(plugin.offer, settings, hook) for name, plugin in offering.items()}
        found: dict[str, Any] = {}
        for plugin_name, offered in ask_plugins(asked, settings.plugin_timeout_seconds):
            plugin = offering[plugin_name]
            if isinstance(offered, BaseException):
                plugin.add_problem(f"{hook}: {describe(offered)}", of=hook)
                continue
            fitting, problems = offered
            for problem in problems:
                plugin.add_problem(problem, of=hook)
            for name, each in fitting:
                if name in self._bundled and plugin.origin and plugin.origin[0] != DISTRIBUTION:
                    # Also where the bundled one is not set up: what is sent to it may not go to somebody else.
                    plugin.add_problem(f"the name {name} is that of a bundled {kind}", of=hook)
                elif found.setdefault(name, each) is not each:
                    plugin.add_problem(f"a {kind} named {name} is already there", of=hook)
                else:
                    plugin.offered[hook].append(name)
        return found

    def settings(self, timeout_s: float) -> dict[str, SettingsState]:
        """Return the state of the settings that plugins declare, by plugin name. Raises nothing; records problems.

        The plugins are asked side by side, and together have `timeout_s` seconds to answer.
        """
        from agent_gateway_store.hooks.executor import ask_plugins

        asked = {plugin.name: plugin.settings for plugin in self._plugins if plugin.caller(SETTINGS) is not None}
        found: dict[str, SettingsState] = {}
        for name, state in ask_plugins(asked, timeout_s):
            if isinstance(state, BaseException):
                self.add_problem(name, f"{SETTINGS}: {describe(state)}")
            elif state is not None:
                found[name] = state
        return found

    def _new(self, name: str, *, origin: tuple[str, str] | None = None) -> Plugin:
        plugin = Plugin(name, origin=origin)
        self._plugins.append(plugin)
        if name in self._block:
            plugin.blocked = f"named in {BLOCK_VARIABLE}"
        return plugin

    def _add_given(self, given: object) -> None:
        # Unlike an installed plugin, one that is given twice is meant twice: say, two webhooks.
        own_name = name = _name_of(given)
        taken, count = {plugin.name for plugin in self._plugins}, 1
        while name in taken:
            count += 1
            name = f"{own_name}-{count}"
        plugin = self._new(name)
        if own_name in self._block:
            plugin.blocked = f"named in {BLOCK_VARIABLE}"
        if plugin.blocked is None:
            plugin.adopt(lambda: given)

    def _add_installed(self, entry_point: metadata.EntryPoint, origin: tuple[str, str]) -> None:
        rivals = [plugin for plugin in self._plugins if plugin.name in (entry_point.name, entry_point.value)]
        plugin = self._new(entry_point.name, origin=origin)
        if plugin.blocked is not None:
            return
        if self._load is not None and plugin.name not in self._load:
            plugin.blocked = f"not named in {LOAD_VARIABLE}"
        elif any(rival.origin is None for rival in rivals):
            plugin.blocked = "the store was given a plugin that takes its place"
        elif rivals:
            taken_by = " ".join(rivals[0].origin or ())
            plugin.add_problem(f"another installed plugin has taken its name, that of {taken_by}")
        elif self._load_bundled or plugin.name not in self._bundled:
            plugin.adopt(entry_point.load)


def _installed() -> list[tuple[metadata.EntryPoint, tuple[str, str]]]:
    """Return the entry points of our group, each with the name and version of its distribution, none of them loaded.

    The bundled ones come first, each part sorted by name and then by package. Of a distribution that is found twice
    the first on `sys.path` counts. One whose metadata cannot be read is left out.
    """
    found: list[tuple[metadata.EntryPoint, tuple[str, str]]] = []
    seen: set[str] = set()
    for distribution in metadata.distributions():
        # One by one, as `metadata.entry_points` raises if the metadata of any package is damaged.
        try:
            entry_points = distribution.entry_points.select(group=PROJECT)
            origin = (escape(distribution.name), escape(distribution.version)) if entry_points else ("", "")
        except Exception as exc:
            logger.debug("A distribution cannot be read: %s", describe(exc))
            continue
        if entry_points and origin[0].lower() not in seen:
            seen.add(origin[0].lower())
            found.extend((entry_point, origin) for entry_point in entry_points)
    return sorted(found, key=lambda pair: (pair[1][0] != DISTRIBUTION, pair[0].name, pair[1]))


def _names_in(variable: str) -> frozenset[str]:
    """Return the names in a comma-separated list."""
    return frozenset(name.strip() for name in variable.split(",") if name.strip())


def _name_of(plugin: object) -> str:
    """Return what to call a plugin object: its `name`, else the name of the module or class. Raises nothing."""
    own = plugin if inspect.ismodule(plugin) or inspect.isclass(plugin) else type(plugin)
    try:
        name = plugin.__dict__["__name__"] if inspect.ismodule(plugin) else getattr(plugin, "name", None)
    except Exception:
        name = None
    return name if isinstance(name, str) and name.strip() else own.__name__
