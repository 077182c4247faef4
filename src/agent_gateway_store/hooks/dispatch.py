"""Notices on their way to plugins, each plugin apart from all others."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from agent_gateway_store.hooks.lane import Lane
from agent_gateway_store.hooks.text import one_line
from agent_gateway_store.hooks.threads import in_thread

if TYPE_CHECKING:
    from agent_gateway_store.hooks.loading import Plugins
    from agent_gateway_store.hooks.specs import Notifier
    from agent_gateway_store.hooks.worker import Call
    from agent_gateway_store.models.values import Notice
    from agent_gateway_store.settings import StoreSettings

__all__ = ["DeliveryReport", "Dispatcher"]

logger = logging.getLogger("agent_gateway_store.hooks")


@dataclass(frozen=True, slots=True)
class DeliveryReport:
    """How one notice fared with one plugin.

    Attributes:
        notifier: Name of the notifier; for an event hook, of the plugin.
        ok: True if the plugin returned in time and raised nothing.
        error: What went wrong, on one line of at most 500 characters, secrets masked; None if ok.
        seconds: How long it took.
    """

    notifier: str
    ok: bool
    error: str | None
    seconds: float


class Dispatcher:
    """Hands notices to notifiers and event hooks; no plugin can stall or break the caller or another plugin.

    Each notifier, and each plugin with an event hook, has a daemon thread with an event loop, started by its first
    notice. Every call is bounded by `plugin_timeout_seconds` (and a quarter of a second to give way). What goes wrong is
    reported, and logged at WARNING on `agent_gateway_store.hooks`. May be used from any event loop, and from several.
    """

    def __init__(self, plugins: Plugins, settings: StoreSettings) -> None:
        """Remember. Starts no thread and calls no plugin.

        Args:
            plugins: Who is listening. May be shared.
            settings: `plugin_timeout_seconds` is used; plugins are handed all of it.
        """
        self._plugins = plugins
        self._settings = settings
        self._notifiers: dict[str, Notifier] | None = None
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._collecting = threading.Lock()
        self._lock = threading.Lock()
        self._closed = False

    async def open(self) -> tuple[str, ...]:
        """Ask the plugins for their notifiers, once; later calls return at once. Does not block the event loop.

        Returns:
            Names of the notifiers, in order.
        """
        return tuple(await self._opened())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the notifiers, in order. Before `open`, asks the plugins and blocks until all have answered."""
        return tuple(self._collect())

    @property
    def abandoned(self) -> dict[str, int]:
        """How many threads have not come back, by notifier (or plugin) name; those without any are left out."""
        with self._lock:
            lanes = list(self._lanes.items())
        counts: dict[str, int] = {}
        for (_kind, name), lane in lanes:
            if stuck := lane.abandoned:
                counts[name] = counts.get(name, 0) + stuck
        return counts

    async def deliver(self, notifier_name: str, notice: Notice) -> DeliveryReport:
        """Hand one notice to one notifier. Raises nothing; cancelling it cancels the call.

        Args:
            notifier_name: One of `names`; any other gives a report that is not ok.
            notice: What to tell. The notifier gets a copy of its own.

        Returns:
            How it went.
        """

        if (notifier := (await self._opened()).get(notifier_name)) is None:
            return self._reported(notifier_name, "no notifier of this name is loaded")
        return await self._run("notifier", notifier_name, lambda: _notify(notifier, notice))

    async def deliver_all(self, notice: Notice) -> list[DeliveryReport]:
        """Hand one notice to every notifier, side by side. Raises nothing.

        Returns:
            One report per notifier, in the order of `names`.
        """
        notifiers = await self._opened()
        return list(await asyncio.gather(*(self.deliver(name, notice) for name in notifiers)))

    async def emit(self, notice: Notice) -> list[DeliveryReport]:
        """Call `gateway_store_approval_event` of every plugin that has it, side by side. Raises nothing.

        Returns:
            One report per plugin.
        """
        callers = self._plugins.callers("gateway_store_approval_event")
        runs = [self._run("plugin", name, partial(_announce, caller, notice)) for name, caller in callers.items()]
        return list(await asyncio.gather(*runs))

    def close(self, timeout: float = 1.0) -> None:
        """End the threads; calls under way are cancelled and reported. A second call does nothing.

        Args:
            timeout: Seconds to wait for them in all. A thread that is blocked is left behind: it is a daemon.
        """
        with self._lock:
            self._closed = True
            lanes = list(self._lanes.values())
        deadline = time.monotonic() + timeout
        for worker in [worker for lane in lanes if (worker := lane.stop())]:
            worker.join(max(0.0, deadline - time.monotonic()))

    async def aclose(self, timeout: float = 1.0) -> None:
        """Do as `close`, without blocking the event loop."""
        await asyncio.wrap_future(in_thread(lambda: self.close(timeout), name="gateway-store close"))

    def _collect(self) -> dict[str, Notifier]:
        with self._collecting:
            if self._notifiers is None:
                self._notifiers = self._plugins.notifiers(self._settings)
            return self._notifiers

    async def _opened(self) -> dict[str, Notifier]:
        if self._notifiers is not None:
            return self._notifiers
        return await asyncio.wrap_future(in_thread(self._collect, name="gateway-store plugins"))

    async def _run(self, kind: str, name: str, call: Call) -> DeliveryReport:
        with self._lock:
            lane = self._lanes.setdefault((kind, name), Lane(name))
            if self._closed:
                lane.stop()
        started = time.monotonic()
        error = await lane.run(call, self._settings.plugin_timeout_seconds)
        return self._reported(name, error, time.monotonic() - started)

    def _reported(self, name: str, error: str | None, seconds: float = 0.0) -> DeliveryReport:
        if error is not None:
            logger.warning("Plugin %s did not take a notice: %s", one_line(name), error)
        return DeliveryReport(notifier=name, ok=error is None, error=error, seconds=seconds)


async def _notify(notifier: Notifier, notice: Notice) -> None:
    # Runs in the plugin's thread, as does the copying: no plugin sees an object that another one can change.
    method = notifier.notify_pending if notice.event == "pending" else notifier.notify_decision
    result: object = method(notice.model_copy(deep=True))
    if not inspect.isawaitable(result):
        raise TypeError("the notifier's method is not async")
    await result


async def _announce(caller: Callable[..., list[object]], notice: Notice) -> None:
    results = caller(notice=notice.model_copy(deep=True))
    await asyncio.gather(*(result for result in results if inspect.isawaitable(result)))
