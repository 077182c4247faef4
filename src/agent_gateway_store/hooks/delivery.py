"""One notice handed to one plugin."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent_gateway_store.hooks.specs import Notifier
    from agent_gateway_store.models.values import Notice

__all__ = ["DeliveryReport", "announce", "notify"]


@dataclass(frozen=True, slots=True)
class DeliveryReport:
    """How one notice fared with one plugin.

    Attributes:
        notifier: Name of the notifier; for an event hook, of the plugin.
        ok: True if the plugin returned in time and raised nothing.
        error: What went wrong, on one line of at most 500 characters, secrets masked; None if ok.
        seconds: How long it took.
        retry_after_s: Seconds that the notifier asks to be left alone (`NotDeliveredError`); None if it does not say.
        is_permanent: True if the notifier says that trying again cannot help (`NotDeliveredError`).
    """

    notifier: str
    ok: bool
    error: str | None
    seconds: float
    retry_after_s: float | None = None
    is_permanent: bool = False


async def notify(notifier: Notifier, notice: Notice) -> None:
    """Hand the notifier a copy of the notice. Runs in the plugin's thread, as does the copying."""
    method = notifier.notify_pending if notice.event == "pending" else notifier.notify_decision
    result: object = method(notice.model_copy(deep=True))
    if not inspect.isawaitable(result):
        raise TypeError("the notifier's method is not async")
    await result


async def announce(caller: Callable[..., list[object]], notice: Notice) -> None:
    """Call the event hook of one plugin with a copy of the notice, and await what it returns."""
    results = caller(notice=notice.model_copy(deep=True))
    await asyncio.gather(*(result for result in results if inspect.isawaitable(result)))
