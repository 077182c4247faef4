"""One at a time in all processes that share a database."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from sqlalchemy import text
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.storage.database import Database, read_committed
from agent_gateway_store.storage.errors import translate_errors
from agent_gateway_store.storage.files import FILE_MODE, create_database_file, create_file, is_of_another_user
from agent_gateway_store.storage.urls import real_sqlite_file

FOLDER_LOCK = ".lock"
"""The file by which a folder is locked: readers of data sets pass over names that begin with a dot."""

POLL_S = 0.01
"""Seconds between two tries to take a lock. Chosen: a person notices no such wait."""
# Idle while others work: the server's limits are meant for other transactions.
_NO_LIMITS = """
SELECT set_config(name, '0', true) FROM pg_settings
WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout')
"""

StillHeld: TypeAlias = Callable[[], Awaitable[None]]
"""Raises StoreUnavailableError where the lock was lost since it was taken."""


def key_of(name: str) -> int:
    """Return the key of a lock that is not known before it is needed: 63 bits, so that no two meet by chance."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8]) >> 1


@asynccontextmanager
async def detached(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Open a connection of PostgreSQL outside the pool, which may have a single place, and end it with its locks."""
    driver: Any = None
    try:
        async with read_committed(engine).connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            await connection.run_sync(lambda sync: sync.detach())
            yield connection
    finally:
        # SQLAlchemy only forgets a detached connection whose statement was cancelled: without this it would hold the
        # lock until the garbage collector comes by.
        if driver is not None:
            driver.terminate()


class ExclusiveLock:
    """A lock of one database, which dies with its holder: an advisory lock, or one of a file beside SQLite's.

    Args:
        database: Whose.
        key: Of the advisory lock.
        suffix: What the name of the file ends in.
        wait_s: How long to wait for it, in seconds; 0: not at all.
        busy: What to say where another process has it, as the beginning of a sentence.
    """

    def __init__(self, database: Database, *, key: int, suffix: str, wait_s: float, busy: str) -> None:
        self._database, self._key, self._suffix, self._wait_s, self._busy = database, key, suffix, wait_s, busy
        self.open()

    def open(self) -> None:
        """Serve the event loop in which the store opens: the tasks that wait for each other here are of one."""
        self._here = asyncio.Lock()

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[StillHeld]:
        """Wait for the lock; yield what raises StoreUnavailableError where it was lost meanwhile.

        Raises:
            StoreUnavailableError: Another process has it, or the database is away.
        """
        self._database.check_owner()
        async with self._here:
            context = self._advisory if self._database.dialect == "postgresql" else self._file
            async with context() as still_held:
                yield still_held

    @asynccontextmanager
    async def _advisory(self) -> AsyncIterator[StillHeld]:
        with translate_errors("be locked against other processes"):
            async with detached(self._database.engine) as connection:
                await connection.execute(text(_NO_LIMITS))
                deadline = asyncio.get_running_loop().time() + self._wait_s
                taken = text(f"SELECT pg_try_advisory_xact_lock({self._key})")
                # Polled: a wait that ends by lock_timeout is an error in the server's log.
                while not (await connection.execute(taken)).scalar():
                    if asyncio.get_running_loop().time() >= deadline:
                        raise StoreUnavailableError(f"{self._busy}: try again.")
                    await asyncio.sleep(POLL_S)

                async def still_held() -> None:
                    await connection.execute(text("SELECT 1"))

                yield still_held

    @asynccontextmanager
    async def _file(self) -> AsyncIterator[StillHeld]:
        async def still_held() -> None:
            """Return: the lock of a file is not lost."""

        async with sqlite_lock(self._database.engine.url, self._suffix, wait_s=self._wait_s, busy=self._busy):
            yield still_held


@asynccontextmanager
async def sqlite_lock(url: URL, suffix: str, *, wait_s: float, busy: str) -> AsyncIterator[None]:
    """Hold the lock of the file beside that of a SQLite database; of one in memory, and of another kind, none."""
    file = real_sqlite_file(url)
    if file is None:
        yield
        return
    async with file_lock(file.with_name(file.name + suffix), wait_s=wait_s, busy=busy):
        yield


@asynccontextmanager
async def file_lock(path: Path, *, wait_s: float, busy: str) -> AsyncIterator[None]:
    """Hold the lock of a file, which is made. A process that is frozen keeps it, and one that ends loses it.

    Raises:
        StoreUnavailableError: Another process has it, or it cannot be locked.
    """
    create_database_file(path)
    try:
        lock = await _locked(path, wait_s)
    except sqlite3.OperationalError as exc:
        if _is_busy(exc):
            what = f"{busy}: wait for it or end it, then try again."
        elif is_of_another_user(path):
            what = f"{path} belongs to another user: work as that one, or let this one write it."
        else:
            what = f"{path} cannot be locked: check that its folder can be written, on a file system that has locks."
        raise StoreUnavailableError(what) from exc
    except sqlite3.DatabaseError as exc:
        raise StoreUnavailableError(
            f"{path} cannot be locked, for it is a file of something else: remove it, or choose another folder."
        ) from exc
    try:
        yield
    finally:
        lock.close()


@asynccontextmanager
async def folder_lock(folder: Path, *, wait_s: float, busy: str, mode: int = FILE_MODE) -> AsyncIterator[None]:
    """Hold the lock of a folder that is there, by a file in it, which only who may write it can lock.

    Raises:
        OSError: The folder cannot be written.
        StoreUnavailableError: As of `file_lock`.
    """
    path = folder / FOLDER_LOCK
    with suppress(FileExistsError):
        create_file(path, mode)
    async with file_lock(path, wait_s=wait_s, busy=busy):
        yield


async def _locked(path: Path, wait_s: float) -> sqlite3.Connection:
    deadline = asyncio.get_running_loop().time() + wait_s
    # SQLite's own locks work on every platform, and end with the process that holds them.
    lock = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        while True:
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as exc:
                if not _is_busy(exc) or asyncio.get_running_loop().time() >= deadline:
                    raise
                await asyncio.sleep(POLL_S)
            else:
                return lock
    except BaseException:
        lock.close()
        raise


def _is_busy(exc: sqlite3.OperationalError) -> bool:
    # The upper bits of an extended code say more.
    return exc.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
