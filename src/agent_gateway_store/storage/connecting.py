"""How a connection to PostgreSQL is made: to a server that takes writes, and to its end once it was begun."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg

from agent_gateway_store._concurrency import BackgroundTasks

# What says that another server may do: refused, not to be reached, starting up, a standby, gone while it answered.
_TRY_NEXT = (
    OSError,
    asyncpg.CannotConnectNowError,
    asyncpg.ConnectionDoesNotExistError,
    asyncpg.TargetServerAttributeNotMatched,
)
_READS_ONLY = ("standby", "read-only", "prefer-standby", "any")


class Connector:
    """Connects an engine with asyncpg; for `connect_args` under the name `async_creator_fn`.

    Of several servers the one that was connected last is tried first, and each has its share of the time: a server that
    hangs does not keep the others from being tried.
    """

    def __init__(self) -> None:
        self._background = BackgroundTasks()
        self._last = 0

    async def __call__(self, **arguments: Any) -> asyncpg.Connection:
        """Return a connection; arguments as of `asyncpg.connect`, and `listen`, which is ours."""
        arguments.pop("listen", None)
        connecting = self._background.start(self._connect(**arguments))
        try:
            await asyncio.wait([connecting])
        except asyncio.CancelledError:
            # asyncpg, cancelled while it connects, leaves a future whose exception nobody retrieves.
            connecting.add_done_callback(_terminate)
            raise
        return connecting.result()

    async def _connect(self, host: Any = None, port: Any = None, **arguments: Any) -> asyncpg.Connection:
        if not isinstance(host, list) or arguments.get("target_session_attrs") == "prefer-standby":
            return await asyncpg.connect(host=host, port=port, **arguments)
        if (timeout_s := arguments.pop("timeout", None)) is not None:
            timeout_s /= len(host)
        failure: BaseException | None = None
        for step in range(len(host)):
            index = (self._last + step) % len(host)
            try:
                connection = await asyncpg.connect(host=host[index], port=port[index], timeout=timeout_s, **arguments)
            except _TRY_NEXT as exc:
                # That no server takes writes says more than that another one is away.
                if not isinstance(failure, asyncpg.TargetServerAttributeNotMatched):
                    failure = exc
            else:
                self._last = index
                return connection
        assert failure is not None  # noqa: S101
        raise failure


def _terminate(connecting: asyncio.Task[asyncpg.Connection]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().terminate()


def is_away(driver: asyncpg.Connection, target: object = None) -> bool:
    """True if the server of this connection said that it takes no writes, while one that does is wanted.

    Args:
        driver: PostgreSQL tells it on connecting and after each change, so this asks nothing.
        target: `target_session_attrs` of the URL.
    """
    if target in _READS_ONLY:
        return False
    told = driver.get_settings()
    return "on" in (getattr(told, "in_hot_standby", None), getattr(told, "default_transaction_read_only", None))
