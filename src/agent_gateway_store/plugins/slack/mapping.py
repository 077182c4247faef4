"""From a Slack user to an approver, by the hook `gateway_store_map_approver`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from agent_gateway_store._text import escape
from agent_gateway_store.hooks.executor import PluginExecutor, PluginFailure, awaited

if TYPE_CHECKING:
    from agent_gateway_store.hooks.manager import Plugins
    from agent_gateway_store.plugins.slack.clicks import Click

__all__ = ["Approvers"]

logger = logging.getLogger("agent_gateway_store.notifications")

MAP = "gateway_store_map_approver"


class Approvers:
    """Asks the plugins who it is that clicked. One that fails before anybody knew is a refusal.

    Args:
        plugins: Of the store.
        timeout_s: Seconds that each plugin has; they are asked side by side.
    """

    def __init__(self, plugins: Plugins, *, timeout_s: float) -> None:
        self._plugins = plugins
        self._executor = PluginExecutor(timeout_s)

    async def find(self, click: Click) -> str | None:
        """Return the approver id; None is a refusal. Raises nothing."""
        callers = self._plugins.callers(MAP)
        answers = await asyncio.gather(
            *(self._executor.run("map", name, partial(_answer, caller, click)) for name, caller in callers.items())
        )
        for name, answer in zip(callers, answers, strict=True):
            if isinstance(answer, PluginFailure):
                logger.warning("Plugin %s failed when asked who clicked: %s", escape(name), answer.text)
                return None
            if answer:
                return answer
        return None

    async def aclose(self) -> None:
        """End the threads."""
        await self._executor.aclose()


async def _answer(caller: Callable[..., list[object]], click: Click) -> str:
    """Run in the plugin's thread: return whom it knows, "" for nobody."""
    answers = await awaited(
        caller(channel="slack", user_id=click.user_id, user_name=click.user_name, approval_id=click.approval_id)
    )
    known = [answer for answer in answers if answer is not None]
    for answer in known:
        if not isinstance(answer, str) or not answer.strip():
            raise TypeError(f"{MAP} returned {type(answer).__name__}, not the id of an approver or None")
    return str(known[0]) if known else ""
