"""One plugin: what it is, what it implements, what is wrong with it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pluggy

from agent_gateway_store.hooks import specs
from agent_gateway_store.hooks.configuration import SETTINGS, SettingsState, examine_settings
from agent_gateway_store.hooks.markers import PROJECT
from agent_gateway_store.hooks.notifiers import REGISTER, Offer, examine
from agent_gateway_store.hooks.text import describe, one_line

if TYPE_CHECKING:
    from agent_gateway_store.settings import StoreSettings

__all__ = ["Plugin", "PluginRecord"]

logger = logging.getLogger("agent_gateway_store.hooks")


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """A plugin as `gateway-store plugins list` shows it.

    Attributes:
        name: Name of its entry point, or of the object given to the store.
        version: Version of its distribution; None if it was given to the store.
        distribution: Name of the package it comes from; None if it was given to the store.
        hooks: Hooks it implements, sorted. Empty for a bare notifier, and for what was not loaded.
        state: `active`; `blocked`: not loaded, on request; `broken`: something is wrong, what works is still used.
        error: Why it is blocked or broken; None if active. One line, secrets masked.
        notifiers: Names of the notifiers it gave when it was last asked.
    """

    name: str
    version: str | None
    distribution: str | None
    hooks: tuple[str, ...]
    state: Literal["active", "blocked", "broken"]
    error: str | None
    notifiers: tuple[str, ...] = ()


class Plugin:
    """A plugin and its faults. It has a pluggy manager of its own, so none can see, wrap or stop another."""

    def __init__(self, name: str, *, origin: tuple[str, str] | None = None) -> None:
        """Remember.

        Args:
            name: Unique among the loaded plugins.
            origin: Name and version of its distribution; None if it was given to the store.
        """
        self.name = name
        self.origin = origin
        self.object: object = None
        self.blocked: str | None = None
        self._bare = False
        self.notifiers: list[str] = []
        self._faults: list[str] = []
        self._notifier_faults: list[str] = []
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(specs)
        self._specs = frozenset(vars(self._manager.hook))

    @property
    def record(self) -> PluginRecord:
        """What is known of it now."""
        faults = [*self._faults, *self._notifier_faults]
        distribution, version = self.origin or (None, None)
        return PluginRecord(
            name=self.name,
            version=version,
            distribution=distribution,
            hooks=tuple(sorted(name for name in self._specs if self.caller(name) is not None)),
            state="blocked" if self.blocked else "broken" if faults else "active",
            error=self.blocked or "; ".join(faults) or None,
            notifiers=tuple(self.notifiers),
        )

    @property
    def has_notifiers(self) -> bool:
        """True if it is to be asked for notifiers."""
        return self._bare or self.caller(REGISTER) is not None

    def caller(self, hook: str) -> Callable[..., list[object]] | None:
        """Return what calls this plugin's implementations of `hook`; None if it has none."""
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return caller if caller.get_hookimpls() else None

    def fault(self, text: str, *, of_notifier: bool = False) -> None:
        """Note what is wrong, and log it; the same once."""
        faults = self._notifier_faults if of_notifier else self._faults
        if text in faults:
            return
        faults.append(text)
        logger.warning("Plugin %s is broken: %s", one_line(self.name), text)

    def adopt(self, load: Callable[[], object]) -> None:
        """Load it and take in its hook implementations; a class is called without arguments first.

        Raises nothing but KeyboardInterrupt: what goes wrong, `SystemExit` included, becomes a fault.
        """
        try:
            loaded = load()
            self.object = loaded() if inspect.isclass(loaded) else loaded
            self._manager.register(self.object, name=self.name)
            bare = hasattr(self.object, "notify_pending") or hasattr(self.object, "notify_decision")
            self._bare = bare and self.caller(REGISTER) is None
            if unknown := self._unknown_hooks():
                self.fault(f"this version knows no hook {', '.join(map(one_line, unknown))}")
            elif not self._bare and not self.record.hooks:
                self.fault("nothing in it is marked with @hookimpl, and it is no notifier")
        except KeyboardInterrupt:
            raise
        except BaseException as exc:
            self.fault(describe(exc))

    def offer(self, settings: StoreSettings) -> Offer:
        """Ask it for notifiers. Raises nothing; may take as long as the plugin likes."""
        if self._bare:
            return examine(lambda: [[self.object]])
        register = self.caller(REGISTER)
        return examine(lambda: register(settings=settings) if register else [])

    def settings(self) -> SettingsState | None:
        """Look at its settings; None if it declares none. May take as long as the plugin likes.

        Raises:
            TypeError: What it declares is no settings class. Whatever the plugin raises.
        """
        if (tell := self.caller(SETTINGS)) is None:
            return None
        told = tell()
        return examine_settings(told[0]) if told else None

    def forget_offer(self) -> None:
        """Forget what came of it when it was last asked for notifiers."""
        self._notifier_faults.clear()
        self.notifiers.clear()

    def _unknown_hooks(self) -> list[str]:
        relay: dict[str, pluggy.HookCaller] = vars(self._manager.hook)
        others = (name for name in relay if name not in self._specs)
        return sorted(name for name in others if not all(impl.optionalhook for impl in relay[name].get_hookimpls()))
