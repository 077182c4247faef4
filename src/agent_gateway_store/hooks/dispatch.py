"""Notices on their way to plugins, each plugin apart from all others."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from agent_gateway_store.hooks.delivery import DeliveryReport, announce, notify
from agent_gateway_store.hooks.fault import Fault
from agent_gateway_store.hooks.lanes import Lanes
from agent_gateway_store.hooks.text import describe, one_line
from agent_gateway_store.hooks.threads import in_thread

if TYPE_CHECKING:
    from agent_gateway_store.hooks.loading import Plugins
    from agent_gateway_store.hooks.specs import Notifier
    from agent_gateway_store.hooks.worker import Call
    from agent_gateway_store.models.values import Notice
    from agent_gateway_store.settings import StoreSettings

__all__ = ["DeliveryReport", "Dispatcher"]

logger = logging.getLogger("agent_gateway_store.hooks")


class Dispatcher:
    """Hands notices to notifiers and event hooks; no plugin can stall or break the caller or another plugin.

    Each notifier, and each plugin with an event hook, has a daemon thread with an event loop, started by its first
    notice. A call is bounded by `plugin_timeout_seconds`, plus a quarter of a second to give way. What goes wrong is
    reported, and logged at WARNING on `agent_gateway_store.hooks`. May be used from any event loop, and from several.
    """

    def __init__(self, plugins: Plugins, settings: StoreSettings) -> None:
        """Remember; start no thread and call no plugin.

        Args:
            plugins: Who is listening. May be shared.
            settings: `plugin_timeout_seconds` is used; plugins are handed all of it.
        """
        self._plugins = plugins
        self._settings = settings
        self._notifiers: dict[str, Notifier] | None = None
        self._lanes = Lanes(settings.plugin_timeout_seconds, reopens=False)
        self._collecting = threading.Lock()

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
        return self._lanes.abandoned

    async def deliver(self, notifier_name: str, notice: Notice) -> DeliveryReport:
        """Hand one notice to one notifier. Raises nothing; cancelling it cancels the call.

        Args:
            notifier_name: One of `names`; any other gives a report that is not ok.
            notice: What to tell. The notifier gets a copy of its own.

        Returns:
            How it went.
        """
        if (notifier := (await self._opened()).get(notifier_name)) is None:
            return self._reported(notifier_name, Fault("no notifier of this name is loaded"))
        return await self._run("notifier", notifier_name, partial(notify, notifier, notice))

    async def deliver_all(self, notice: Notice) -> list[DeliveryReport]:
        """Hand one notice to every notifier, side by side. Raises nothing; one report each, in the order of `names`."""
        return list(await asyncio.gather(*(self.deliver(name, notice) for name in await self._opened())))

    async def emit(self, notice: Notice) -> list[DeliveryReport]:
        """Call `gateway_store_approval_event` of every plugin that has it, side by side. Raises nothing.

        Returns:
            One report per plugin.
        """
        callers = self._plugins.callers("gateway_store_approval_event")
        runs = [self._run("plugin", name, partial(announce, caller, notice)) for name, caller in callers.items()]
        return list(await asyncio.gather(*runs))

    def close(self, timeout: float = 1.0) -> None:
        """End the threads; calls under way are cancelled and reported. A second call does nothing.

        Args:
            timeout: Seconds to wait for them in all. A thread that is blocked is left behind: it is a daemon.
        """
        self._lanes.close(timeout)

    async def aclose(self, timeout: float = 1.0) -> None:
        """Do as `close`, without blocking the event loop."""
        await self._lanes.aclose(timeout)

    def _collect(self) -> dict[str, Notifier]:
        with self._collecting:
            if self._notifiers is None:
                self._notifiers = self._plugins.notifiers(self._settings)
            return self._notifiers

    async def _opened(self) -> dict[str, Notifier]:
        if self._notifiers is not None:
            return self._notifiers
        try:
            collected = in_thread(self._collect, name="gateway-store plugins")
        except RuntimeError as exc:
            logger.warning("Notifiers could not be collected: %s", describe(exc))
            return {}
        return await asyncio.wrap_future(collected)

    async def _run(self, kind: str, name: str, call: Call) -> DeliveryReport:
        started = time.monotonic()
        fault = await self._lanes.run(kind, name, call)
        return self._reported(name, fault, time.monotonic() - started)

    def _reported(self, name: str, fault: Fault | None, seconds: float = 0.0) -> DeliveryReport:
        if fault is None:
            return DeliveryReport(notifier=name, ok=True, error=None, seconds=seconds)
        logger.warning("Plugin %s did not take a notice: %s", one_line(name), fault.text)
        return DeliveryReport(
            notifier=name,
            ok=False,
            error=fault.text,
            seconds=seconds,
            retry_after_s=fault.retry_after_s,
            is_permanent=fault.is_permanent,
        )
