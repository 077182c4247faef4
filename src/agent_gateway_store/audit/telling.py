"""Plugins that hear of events after their commit (`gateway_store_audit_written`)."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import islice
from typing import Any, TypeAlias

from agent_gateway_store._text import escape
from agent_gateway_store.audit.record import EncodedRow, to_values
from agent_gateway_store.hooks.executor import PluginExecutor, awaited
from agent_gateway_store.hooks.manager import Plugins
from agent_gateway_store.models.audit import AuditEvent

__all__ = ["WRITTEN", "Telling"]

WRITTEN = "gateway_store_audit_written"

_Caller: TypeAlias = Callable[..., list[object]]
_MAX_WAITING = 10_000
_BATCH_ROWS = 500

_logger = logging.getLogger("agent_gateway_store.hooks")


class Telling:
    """Tells plugins of committed records, in the background. No write waits for it, and memory is bounded.

    Args:
        plugins: Gives the plugins, at the first commit.
        executor: Where they run.
    """

    def __init__(self, plugins: Callable[[], Plugins], executor: PluginExecutor) -> None:
        self.untold = 0
        self._plugins = plugins
        self._executor = executor
        self._waiting: dict[str, deque[EncodedRow]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @cached_property
    def _callers(self) -> dict[str, _Caller]:
        return self._plugins().callers(WRITTEN)

    @property
    def is_wanted(self) -> bool:
        """True if some plugin wants to hear of events."""
        return bool(self._callers)

    def tell(self, records: Sequence[EncodedRow]) -> None:
        """Queue committed records for every plugin that wants them; what a slow one has no room for is dropped."""
        for name in self._callers:
            waiting = self._waiting.setdefault(name, deque())
            room = _MAX_WAITING - len(waiting)
            waiting.extend(islice(records, room))
            if dropped := max(0, len(records) - room):
                if not self.untold:
                    _logger.warning("Plugin %s is too slow to hear of every audit event.", escape(name))
                self.untold += dropped
            if name not in self._tasks:
                self._tasks[name] = task = asyncio.get_running_loop().create_task(self._drain(name, waiting))
                task.add_done_callback(partial(self._forget, name))

    async def close(self) -> None:
        """Let what waits be told for as long as one call may take; the rest is counted as untold."""
        if tasks := list(self._tasks.values()):
            _, late = await asyncio.wait(tasks, timeout=self._executor.timeout_s)
            for task in late:
                task.cancel()
            await asyncio.wait(tasks)
        left = sum(map(len, self._waiting.values()))
        self._waiting.clear()
        if left:
            self.untold += left
            _logger.warning("%d audit events were not told to plugins: the store was closed.", left)

    def _forget(self, name: str, _task: asyncio.Task[None]) -> None:
        self._tasks.pop(name, None)

    async def _drain(self, name: str, waiting: deque[EncodedRow]) -> None:
        while waiting:
            batch = [waiting.popleft() for _ in range(min(_BATCH_ROWS, len(waiting)))]
            try:
                failure = await self._executor.run("written", name, partial(_hand_over, self._callers[name], batch))
            except asyncio.CancelledError:
                self.untold += len(batch)
                raise
            if failure is not None:
                self.untold += len(batch)
                text = "Plugin %s failed to hear of %d audit events: %s"
                _logger.warning(text, escape(name), len(batch), failure.text)


async def _hand_over(caller: _Caller, batch: Sequence[EncodedRow]) -> None:
    """Run in the plugin's thread, the copying included."""
    events = [AuditEvent.model_validate(to_values(record)) for record in batch]
    results: list[Any] = caller(events=events)
    await awaited(results)
