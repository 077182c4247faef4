"""The plugins that receive checkpoints, and keep them where whoever owns the database cannot rewrite them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from agent_gateway_store._concurrency import BackgroundTasks
from agent_gateway_store._text import escape
from agent_gateway_store.hooks.executor import PluginExecutor, awaited
from agent_gateway_store.hooks.manager import Plugins
from agent_gateway_store.models.evidence import Checkpoint

CHECKPOINT = "gateway_store_checkpoint"
_logger = logging.getLogger("agent_gateway_store.hooks")


class CheckpointHooks:
    """Hands each new checkpoint to the plugins, in the background.

    Args:
        plugins: Gives the plugins, at the first checkpoint.
        executor: Where they run.
    """

    def __init__(self, plugins: Callable[[], Plugins], executor: PluginExecutor) -> None:
        self._plugins, self._executor = plugins, executor
        self._tasks = BackgroundTasks()

    def notify(self, checkpoint: Checkpoint) -> None:
        """Hand over a checkpoint that is committed."""
        for name, caller in self._plugins().callers(CHECKPOINT).items():
            self._tasks.start(self._call(name, caller, checkpoint))

    async def close(self) -> None:
        """Wait for the plugins for as long as one call may take."""
        await self._tasks.join(self._executor.timeout_s)

    async def _call(self, name: str, caller: Callable[..., list[object]], checkpoint: Checkpoint) -> None:
        failure = await self._executor.run("checkpoint", name, partial(_hand_over, caller, checkpoint))
        if failure is not None:
            _logger.warning("Plugin %s failed to take a checkpoint: %s", escape(name), failure.text)


async def _hand_over(caller: Callable[..., list[Any]], checkpoint: Checkpoint) -> None:
    await awaited(caller(checkpoint=checkpoint))
