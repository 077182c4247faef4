"""Dispatch: hands notices to plugins, and asks plugins whether they object to a decision."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from agent_gateway_store._text import describe, escape, plugin_text
from agent_gateway_store.errors import DecisionVetoedError
from agent_gateway_store.hooks.executor import PluginExecutor, PluginFailure, awaited, run_in_thread

if TYPE_CHECKING:
    from agent_gateway_store.hooks.manager import Plugins
    from agent_gateway_store.hooks.specs import Notifier
    from agent_gateway_store.models.values import Notice, PendingApproval
    from agent_gateway_store.settings import StoreSettings

_EVENT = "gateway_store_approval_event"
_VETO = "gateway_store_veto_decision"

logger = logging.getLogger("agent_gateway_store.hooks")


@dataclass(frozen=True, slots=True)
class DeliveryReport:
    """The result of handing one notice to one plugin.

    Attributes:
        notifier: Name of the notifier; for an event hook, of the plugin.
        ok: True if the plugin returned in time and raised nothing.
        error: What went wrong, on one line of at most 500 characters, secrets masked; None if ok.
        seconds: How long it took.
        retry_after_s: Seconds to wait before the next attempt, as the notifier asks (`NotDeliveredError`); None if it
            does not say.
        is_permanent: True if the notifier says that no further attempt can help (`NotDeliveredError`).
    """

    notifier: str
    ok: bool
    error: str | None
    seconds: float
    retry_after_s: float | None = None
    is_permanent: bool = False


class Dispatcher:
    """Hands notices to notifiers and event hooks; no plugin can stall or break the caller or another plugin.

    Each notifier, and each plugin with an event hook, has a daemon thread with an event loop, started by its first
    notice. A call is bounded by `plugin_timeout_seconds`, plus a quarter of a second to end after its cancellation.
    What goes wrong is reported, and logged at WARNING on `agent_gateway_store.hooks`. May be used from any event loop,
    and from several.

    Args:
        plugins: The plugins that receive notices. May be shared.
        settings: Given to the plugins; `plugin_timeout_seconds` is used here.
        executor: Where the plugins run; None: a new one.
    """

    def __init__(self, plugins: Plugins, settings: StoreSettings, executor: PluginExecutor | None = None) -> None:
        self._plugins = plugins
        self._settings = settings
        self._executor = executor or PluginExecutor(settings.plugin_timeout_seconds)
        self._notifiers: dict[str, Notifier] | None = None
        self._collecting = threading.Lock()
        self._is_closed = False

    async def open(self) -> tuple[str, ...]:
        """Ask the plugins for their notifiers, once; later calls return at once. Does not block the event loop.

        Returns:
            Names of the notifiers, in order.
        """
        return tuple(await self._opened())

    async def deliver(self, notifier_name: str, notice: Notice) -> DeliveryReport:
        """Hand one notice to one notifier. Raises nothing; cancelling it cancels the call.

        Args:
            notifier_name: One that `open` returned; any other gives a report that is not ok.
            notice: What to send. The notifier gets a copy.
        """
        if (notifier := (await self._opened()).get(notifier_name)) is None:
            return _report(notifier_name, PluginFailure("no notifier of this name is loaded"), 0.0)
        return await self._run("notifier", notifier_name, partial(_notify, notifier, notice))

    async def deliver_all(self, notice: Notice) -> list[DeliveryReport]:
        """Hand one notice to every notifier, side by side. Raises nothing; one report each, in their order."""
        return list(await asyncio.gather(*(self.deliver(name, notice) for name in await self._opened())))

    @property
    def has_event_hooks(self) -> bool:
        """True if a plugin has `gateway_store_approval_event`, so that `emit` calls something."""
        return bool(self._plugins.callers(_EVENT))

    async def emit(self, notice: Notice) -> list[DeliveryReport]:
        """Call `gateway_store_approval_event` of every plugin that has it, side by side. Raises nothing.

        Returns:
            One report per plugin.
        """
        callers = self._plugins.callers(_EVENT)
        runs = [self._run("plugin", name, partial(_emit, caller, notice)) for name, caller in callers.items()]
        return list(await asyncio.gather(*runs))

    def close(self, timeout: float = 1.0) -> None:
        """End the threads of the executor; calls under way are cancelled and reported. A second call does nothing.

        Args:
            timeout: Seconds to wait for all of them. A thread that is blocked goes on: it is a daemon.
        """
        self._is_closed = True
        self._executor.close(timeout)

    async def aclose(self, timeout: float = 1.0) -> None:
        """Close as `close` does, without blocking the event loop."""
        self._is_closed = True
        await self._executor.aclose(timeout)

    def _collect(self) -> dict[str, Notifier]:
        # Deliveries of several event loops may come first at once, and each plugin is asked once.
        with self._collecting:
            if self._notifiers is None:
                self._notifiers = self._plugins.notifiers(self._settings)
            return self._notifiers

    async def _opened(self) -> dict[str, Notifier]:
        if self._notifiers is not None:
            return self._notifiers
        try:
            collected = run_in_thread(self._collect, name="gateway-store plugins")
        except RuntimeError as exc:
            logger.warning("Notifiers could not be collected: %s", describe(exc))
            return {}
        return await asyncio.wrap_future(collected)

    async def _run(self, hook: str, name: str, function: Callable[[], Awaitable[None]]) -> DeliveryReport:
        started = time.monotonic()
        if self._is_closed:
            failure: PluginFailure | None = PluginFailure("the dispatcher is closed")
        else:
            failure = await self._executor.run(hook, name, function)
        return _report(name, failure, time.monotonic() - started)


class PluginHooks:
    """The plugins that have a hook.

    Args:
        plugins: Gives the plugins, when the hook is first wanted.
        executor: Where they run.
    """

    def __init__(self, plugins: Callable[[], Plugins], executor: PluginExecutor) -> None:
        self._plugins = plugins
        self._executor = executor


class Vetoes(PluginHooks):
    """The plugins that may object to a decision. One objection, or one failure, is a refusal."""

    @property
    def is_wanted(self) -> bool:
        """True if a plugin has `gateway_store_veto_decision`."""
        return bool(self._plugins().callers(_VETO))

    async def require_none(
        self,
        request: PendingApproval,
        *,
        decision: Literal["APPROVED", "DENIED"],
        approver_id: str,
        note: str,
        channel: str,
    ) -> None:
        """Return if no plugin objects. All are asked side by side, each within PLUGIN_TIMEOUT_SECONDS.

        Raises:
            DecisionVetoedError: One objects, raised, hung, or returned neither text nor None; of several, the first in
                the order of loading is named.
        """
        callers = self._plugins().callers(_VETO)
        facts = {"decision": decision, "approver_id": approver_id, "note": note, "channel": channel}
        objections = await asyncio.gather(
            *(
                self._executor.run("veto", name, partial(_objection, caller, request, facts))
                for name, caller in callers.items()
            )
        )
        refusals = []
        for name, objection in zip(callers, objections, strict=True):
            if isinstance(objection, PluginFailure):
                logger.warning("Plugin %s failed when asked about a decision: %s", escape(name), objection.text)
                refusals.append((name, f"it failed ({objection.text})"))
            elif objection:
                refusals.append((name, objection))
        if refusals:
            plugin, reason = refusals[0]
            raise DecisionVetoedError(
                f"Plugin {escape(plugin)} refuses this decision: {reason.rstrip('. ')}. "
                "Put that right and decide again, or cancel the approval.",
                approval_id=request.approval_id,
                plugin=plugin,
                reason=reason,
            )


def _report(name: str, failure: PluginFailure | None, seconds: float) -> DeliveryReport:
    if failure is None:
        return DeliveryReport(notifier=name, ok=True, error=None, seconds=seconds)
    logger.warning("Plugin %s did not take a notice: %s", escape(name), failure.text)
    return DeliveryReport(name, False, failure.text, seconds, failure.retry_after_s, failure.is_permanent)


# The functions below run in the plugin's thread, so that copying does not hold up the event loop either.


def _copy(notice: Notice) -> Notice:
    # Only the arguments of the call can be changed by a plugin; copying everything takes four times as long.
    return notice.model_copy(update={"tool_call": notice.tool_call.model_copy(deep=True)})


async def _notify(notifier: Notifier, notice: Notice) -> None:
    method = notifier.notify_pending if notice.event == "pending" else notifier.notify_decision
    result: object = method(_copy(notice))
    if not inspect.isawaitable(result):
        raise TypeError("the notifier's method is not async")
    await result


async def _emit(caller: Callable[..., list[object]], notice: Notice) -> None:
    results = caller(notice=_copy(notice))
    await asyncio.gather(*(result for result in results if inspect.isawaitable(result)))


async def _objection(caller: Callable[..., list[object]], request: PendingApproval, facts: dict[str, str]) -> str:
    """Return the objection of one plugin, "" for none."""
    answers = await awaited(caller(request=request.model_copy(deep=True), **facts))
    for answer in answers:
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"{_VETO} returned {type(answer).__name__}, not a text or None")
    objections = [plugin_text(answer) or "no reason given" for answer in answers if isinstance(answer, str) and answer]
    return "; ".join(objections)
