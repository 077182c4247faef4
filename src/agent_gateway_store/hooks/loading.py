"""Finds plugins and loads them one by one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING

from agent_gateway_store.hooks.configuration import SETTINGS, SettingsState
from agent_gateway_store.hooks.discovery import identity, installed, name_of, names_in
from agent_gateway_store.hooks.notifiers import REGISTER
from agent_gateway_store.hooks.plugin import Plugin, PluginRecord
from agent_gateway_store.hooks.text import describe
from agent_gateway_store.hooks.threads import in_thread

if TYPE_CHECKING:
    from agent_gateway_store.hooks.specs import Notifier
    from agent_gateway_store.settings import StoreSettings

__all__ = ["BLOCK_VARIABLE", "LOAD_VARIABLE", "Plugins"]

LOAD_VARIABLE = "AGENT_GATEWAY_STORE_LOAD_PLUGINS"
BLOCK_VARIABLE = "AGENT_GATEWAY_STORE_BLOCK_PLUGINS"


class Plugins:
    """The plugins of a store: those given to it, then those installed.

    Each is loaded, called and reported alone. One that cannot be imported, raises (`SystemExit` included) or is of the
    wrong shape is recorded as broken, and the rest go on.
    """

    def __init__(self, given: Iterable[object] = (), *, environ: Mapping[str, str] | None = None) -> None:
        """Load them all, in the calling thread.

        Args:
            given: Modules, objects with hook implementations, notifiers, or classes of these that need no argument.
                They take precedence over an installed plugin of the same name.
            environ: Where the two variables are read; None means `os.environ`. `AGENT_GATEWAY_STORE_LOAD_PLUGINS`
                names the installed plugins to load, separated by commas: empty means none, unset all.
                `AGENT_GATEWAY_STORE_BLOCK_PLUGINS` names plugins, given or installed, that are never loaded.
        """
        environ = os.environ if environ is None else environ
        self._load = names_in(environ[LOAD_VARIABLE]) if LOAD_VARIABLE in environ else None
        self._block = names_in(environ.get(BLOCK_VARIABLE, ""))
        self._plugins: list[Plugin] = []
        for each in given:
            self._add_given(each)
        first_installed = len(self._plugins)
        for entry_point, distribution in installed():
            self._add_installed(entry_point, distribution)
        found = {plugin.name for plugin in self._plugins[first_installed:]}
        for name in sorted((self._load or set()) - found):
            self._new(name).fault(f"{LOAD_VARIABLE} names it, but no such plugin is installed")

    @property
    def records(self) -> list[PluginRecord]:
        """One record per plugin as it stands now, in the order of loading."""
        return [plugin.record for plugin in self._plugins]

    def callers(self, hook: str) -> dict[str, Callable[..., list[object]]]:
        """Return, by plugin name, what calls that plugin's implementations of `hook`.

        Calling one touches no other plugin. It raises what the plugin raises; the results of async implementations are
        coroutines, to be awaited.

        Args:
            hook: Name of a hook of this package.
        """
        return {plugin.name: caller for plugin in self._plugins if (caller := plugin.caller(hook)) is not None}

    def notifiers(self, settings: StoreSettings) -> dict[str, Notifier]:
        """Ask every plugin for its notifiers. Raises nothing.

        The plugins are asked side by side, each in a thread, and together have `plugin_timeout_seconds` to answer. The
        call blocks that long at most. What does not fit, and a second notifier of a name, is left out and recorded.

        Args:
            settings: Handed to the plugins.

        Returns:
            Notifiers by name, in the order of loading. New ones with each call.
        """
        timeout = settings.plugin_timeout_seconds
        deadline = time.monotonic() + timeout
        asked = []
        for plugin in self._plugins:
            plugin.forget_offer()
            if plugin.has_notifiers:
                try:
                    future = in_thread(partial(plugin.offer, settings), name=f"gateway-store {plugin.name}")
                except RuntimeError as exc:
                    plugin.fault(describe(exc), of_notifier=True)
                else:
                    asked.append((plugin, future))
        notifiers: dict[str, Notifier] = {}
        for plugin, future in asked:
            try:
                offer = future.result(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                plugin.fault(f"{REGISTER} did not return within {timeout:g} seconds", of_notifier=True)
                continue
            for fault in offer.faults:
                plugin.fault(fault, of_notifier=True)
            for name, notifier in offer.fitting:
                if notifiers.setdefault(name, notifier) is not notifier:
                    plugin.fault(f"a notifier named {name} is already there", of_notifier=True)
                else:
                    plugin.notifiers.append(name)
        return notifiers

    def settings(self, timeout_s: float) -> dict[str, SettingsState]:
        """Look at the settings that plugins declare, as they stand in the environment. Raises nothing.

        Args:
            timeout_s: Seconds that each plugin has to tell.

        Returns:
            By plugin name, for those that declare settings. What went wrong is recorded.
        """
        found: dict[str, SettingsState] = {}
        for plugin in self._plugins:
            if plugin.caller(SETTINGS) is None:
                continue
            try:
                state = in_thread(plugin.settings, name=f"gateway-store {plugin.name}").result(timeout_s)
            except BaseException as exc:
                plugin.fault(f"{SETTINGS}: {describe(exc)}")
            else:
                if state is not None:
                    found[plugin.name] = state
        return found

    def _new(self, name: str, *, origin: tuple[str, str] | None = None) -> Plugin:
        plugin = Plugin(name, origin=origin)
        self._plugins.append(plugin)
        if name in self._block:
            plugin.blocked = f"named in {BLOCK_VARIABLE}"
        return plugin

    def _add_given(self, given: object) -> None:
        name, count = name_of(given), 1
        taken = {plugin.name for plugin in self._plugins}
        blocked = name in self._block
        while name in taken:
            count += 1
            name = f"{name_of(given)}-{count}"
        plugin = self._new(name)
        if blocked:
            plugin.blocked = f"named in {BLOCK_VARIABLE}"
        if plugin.blocked is None:
            plugin.adopt(lambda: given)

    def _add_installed(self, entry_point: metadata.EntryPoint, distribution: metadata.Distribution) -> None:
        rivals = [plugin for plugin in self._plugins if plugin.name in (entry_point.name, entry_point.value)]
        plugin = self._new(entry_point.name, origin=identity(distribution))
        if plugin.blocked is not None:
            return
        if self._load is not None and plugin.name not in self._load:
            plugin.blocked = f"not named in {LOAD_VARIABLE}"
        elif any(rival.origin is None for rival in rivals):
            plugin.blocked = "the store was given a plugin that takes its place"
        elif rivals:
            plugin.fault("another installed plugin has taken its name")
        else:
            plugin.adopt(entry_point.load)
