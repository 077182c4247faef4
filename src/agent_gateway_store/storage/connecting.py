"""How a connection to PostgreSQL is made: to its end once it was begun."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg

from agent_gateway_store._concurrency import BackgroundTasks


class Connector:
    """Connects an engine with asyncpg; for `connect_args` under the name `async_creator_fn`."""

    def __init__(self) -> None:
        self._background = BackgroundTasks()

    async def __call__(self, **arguments: Any) -> asyncpg.Connection:
        """Return a connection; arguments as of `asyncpg.connect`."""
        connecting = self._background.start(asyncpg.connect(**arguments))
        try:
            await asyncio.wait([connecting])
        except asyncio.CancelledError:
            # asyncpg, cancelled while it connects, leaves a future whose exception nobody retrieves.
            connecting.add_done_callback(_terminate)
            raise
        return connecting.result()


def _terminate(connecting: asyncio.Task[asyncpg.Connection]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().terminate()
