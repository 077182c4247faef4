"""One at a time in all processes: what prunes, erases, or changes a hold."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import text

from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.storage.database import Database, read_committed
from agent_gateway_store.storage.errors import translate_errors
from agent_gateway_store.storage.files import create_database_file
from agent_gateway_store.storage.urls import is_memory

# Any number that is not used otherwise: the bytes of "agwhold".
LOCK_KEY = int.from_bytes(b"agwhold", "big")
# Chosen: many times what a prune holds it for, and less than the timeout of one command.
_WAIT_S = 20.0
# Chosen: a prune leaves the lock alone for longer than that between two batches.
_POLL_S = 0.01
PAUSE_S = 3 * _POLL_S
# Idle while files are written: the server's limits are meant for other transactions.
_LIMITS = f"""
SELECT set_config(name, CASE name WHEN 'lock_timeout' THEN '{_WAIT_S:.0f}s' ELSE '0' END, true) FROM pg_settings
WHERE name IN ('lock_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout')
"""  # noqa: S608  names of our own


class RetentionLock:
    """The lock of one database; dies with its holder."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._here = asyncio.Lock()

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Wait for the lock; yield what raises StoreUnavailableError where it was lost meanwhile."""
        self._database.check_owner()
        async with self._here:
            context = self._advisory if self._database.dialect == "postgresql" else self._file
            async with context() as still_held:
                yield still_held

    @asynccontextmanager
    async def _advisory(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        with translate_errors("be locked against other retention commands"):
            # Outside the pool, which may have a single place; a transaction, because PgBouncer gives nobody a session.
            async with read_committed(self._database.engine).connect() as connection:
                await connection.run_sync(lambda sync: sync.detach())
                await connection.execute(text(_LIMITS))
                await connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK_KEY})"))

                async def still_held() -> None:
                    await connection.execute(text("SELECT 1"))

                yield still_held

    @asynccontextmanager
    async def _file(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        async def still_held() -> None:
            """Return: the lock of a file is not lost."""

        url = self._database.engine.url
        if is_memory(url) or not url.database:
            yield still_held
            return
        path = Path(url.database.removeprefix("file:").partition("?")[0] + ".retention.lock")
        lock = await self._taken(path)
        try:
            yield still_held
        finally:
            lock.close()

    async def _taken(self, path: Path) -> sqlite3.Connection:
        create_database_file(path)
        deadline = asyncio.get_running_loop().time() + _WAIT_S
        try:
            # SQLite's own locks work on every platform, and end with the process that holds them.
            lock = sqlite3.connect(path, timeout=0, isolation_level=None)
            while True:
                try:
                    lock.execute("BEGIN EXCLUSIVE")
                except sqlite3.OperationalError:
                    if asyncio.get_running_loop().time() > deadline:
                        lock.close()
                        raise
                    await asyncio.sleep(_POLL_S)
                else:
                    return lock
        except sqlite3.OperationalError as exc:
            raise StoreUnavailableError(
                f"Another retention command is at work, or {path} cannot be written: try again."
            ) from exc
