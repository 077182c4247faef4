"""Connections of the PostgreSQL driver itself, for the paths on which SQLAlchemy would cost more than the server.

The engine makes them, so its URL, TLS, codecs and events hold; then they are taken out of its pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import asyncpg
from asyncpg.transaction import Transaction
from sqlalchemy import Dialect, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agent_gateway_store import telemetry
from agent_gateway_store._concurrency import BackgroundTasks
from agent_gateway_store.errors import GatewayStoreError
from agent_gateway_store.storage.connecting import is_away

# Chosen: a server that is well answers within milliseconds.
_CLOSE_TIMEOUT_S = 1.0
# Chosen: time for the driver to notice that its socket was closed.
_GRACE_S = 0.25
# Chosen: longer than the pauses of a busy gateway, and short beside the hours between its peaks.
IDLE_S = 60.0


@dataclass(frozen=True, slots=True)
class RawConnection:
    """A connection of the driver, with the dialect that says how values are encoded."""

    driver: asyncpg.Connection
    dialect: Dialect

    def transaction(self) -> Transaction:
        """Return a transaction that is committed at the end of its `async with`, or rolled back if the body raises."""
        return self.driver.transaction(isolation="read_committed")


class AsyncpgPool:
    """A few connections of asyncpg, made as they are needed; all but one that nobody needed for a minute are closed.

    Args:
        engine: An engine with the driver asyncpg.
        size: Most connections at once; further callers wait.
        check: Receives each new connection, and raises if it is not to be used.
    """

    def __init__(
        self, engine: AsyncEngine, *, size: int, check: Callable[[asyncpg.Connection], Awaitable[None]] | None = None
    ) -> None:
        self._engine, self._check = engine, check
        self._target = engine.url.query.get("target_session_attrs")
        self._places = asyncio.Semaphore(size)
        self._idle: list[tuple[asyncpg.Connection, AsyncConnection]] = []
        self._is_closed = False
        # How many were idle all the time since the last look.
        self._unused = 0
        self._timer: asyncio.TimerHandle | None = None
        self._background = BackgroundTasks()

    @asynccontextmanager
    async def connection(self, timeout_s: float) -> AsyncIterator[asyncpg.Connection]:
        """Acquire a connection for at most `timeout_s` seconds, the time to get one included.

        A connection whose use raised is not used again, unless it was an error of ours; nor is one whose server takes
        no writes, so that the next one may reach one that does. When the time is up the socket is closed, because a
        server that hangs does not answer a request to cancel either.

        Raises:
            TimeoutError: There was no connection to be had in time, or its use did not end in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        with telemetry.timed("database.pool_wait", pool="driver"):
            # Timers cost more than all else here, so none is made for what is there at once.
            if self._places.locked():
                async with asyncio.timeout_at(deadline):
                    await self._places.acquire()
            else:
                await self._places.acquire()
        try:
            found = await self._idle_connection()
            if found is None:
                async with asyncio.timeout_at(deadline):
                    found = await self._connect()
            driver, connection = found
            try:
                async with asyncio.timeout(None) as use:
                    watchdog = loop.call_at(deadline, _end, driver, use)
                    try:
                        yield driver
                    finally:
                        watchdog.cancel()
            except GatewayStoreError:
                # An answer of ours, not a fault of the connection.
                await self._release(driver, connection)
                raise
            except BaseException as exc:
                # In a task of its own: anyio cancels this one again and again, which SQLAlchemy would log as an error.
                await self._background.shielded(_drop(driver, connection))
                if isinstance(exc, asyncpg.ReadOnlySQLTransactionError):
                    # The others lead to the same server, which may tell nobody (through a pooler).
                    await self._drop_idle()
                if isinstance(exc, Exception) and loop.time() >= deadline:
                    # The driver answers a closed socket with any error, also with an AttributeError.
                    raise TimeoutError("The database did not answer in time.") from exc
                raise
            else:
                await self._release(driver, connection)
        finally:
            self._places.release()

    @property
    def has_idle(self) -> bool:
        """True if the next connection to be acquired may have died while it was idle."""
        return bool(self._idle)

    async def _idle_connection(self) -> tuple[asyncpg.Connection, AsyncConnection] | None:
        while self._idle:
            # The last one used: the others may grow old and be closed by the server.
            driver, connection = self._idle.pop()
            self._unused = min(self._unused, len(self._idle))
            if not driver.is_closed():
                return driver, connection
            await _drop(driver, connection)
        return None

    async def _release(self, driver: asyncpg.Connection, connection: AsyncConnection) -> None:
        is_useless = driver.is_closed() or driver.is_in_transaction() or is_away(driver, self._target)
        if self._is_closed or is_useless:
            await _drop(driver, connection)
        else:
            self._idle.append((driver, connection))
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._give_back)

    def _give_back(self) -> None:
        # The last one used is at the end, and one stays for the next command.
        count = max(0, min(self._unused, len(self._idle) - 1))
        unused, self._idle = self._idle[:count], self._idle[count:]
        self._unused, self._timer = len(self._idle), None
        if unused:
            self._background.start(_drop_all(unused))
        if len(self._idle) > 1:
            self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._give_back)

    async def _connect(self) -> tuple[asyncpg.Connection, AsyncConnection]:
        connection = await self._engine.connect()
        try:
            raw = await connection.get_raw_connection()
            driver = raw.driver_connection
            assert driver is not None  # noqa: S101
            if self._check is not None:
                await self._check(driver)
            raw.detach()
        except BaseException:
            await connection.close()
            raise
        return driver, connection

    async def close(self) -> None:
        """Close idle connections now, and those in use when they are released."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        await self._drop_idle()
        await self._background.join()

    async def _drop_idle(self) -> None:
        idle, self._idle = self._idle, []
        await _drop_all(idle)


def _end(driver: asyncpg.Connection, use: asyncio.Timeout) -> None:
    driver.terminate()
    # A closed socket does not wake a COPY that waits for room in a full send buffer.
    use.reschedule(asyncio.get_running_loop().time() + _GRACE_S)


def idle_connections(engine: AsyncEngine) -> WeakSet[asyncpg.Connection]:
    """Return the set of connections that are idle in the engine's pool, from now on."""
    idle: WeakSet[asyncpg.Connection] = WeakSet()

    @event.listens_for(engine.sync_engine, "checkin")
    def add(connection: Any, _record: Any) -> None:
        if connection is not None:
            idle.add(connection.driver_connection)

    @event.listens_for(engine.sync_engine, "checkout")
    def discard(connection: Any, _record: Any, _proxy: Any) -> None:
        idle.discard(connection.driver_connection)

    return idle


async def close_all(drivers: Iterable[asyncpg.Connection]) -> None:
    """Close unused connections, all at once: a server that hangs then costs one second, and not one for each."""
    still_open = [driver for driver in drivers if not driver.is_closed()]
    await asyncio.gather(*(driver.close(timeout=_CLOSE_TIMEOUT_S) for driver in still_open), return_exceptions=True)


async def _drop_all(idle: Sequence[tuple[asyncpg.Connection, AsyncConnection]]) -> None:
    await close_all(driver for driver, _ in idle)
    for driver, connection in idle:
        await _drop(driver, connection)


async def _drop(driver: asyncpg.Connection, connection: AsyncConnection) -> None:
    # Not `close`, which waits for the server's answer: one that hangs gives none.
    driver.terminate()
    with suppress(Exception):
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await connection.close()
