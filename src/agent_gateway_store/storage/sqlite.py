"""Engines for SQLite, and a connection whose locks end when it is closed."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import aiosqlite
from sqlalchemy import event
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from agent_gateway_store.storage.files import create_database_file, file_id, has_log_of_another, is_gone
from agent_gateway_store.storage.host import READ_ONLY
from agent_gateway_store.storage.urls import is_memory, sqlite_file

# Chosen: SQLite has one writer at a time, and a crowd of them takes seconds.
_BUSY_TIMEOUT_MS = 10_000
# Chosen: callers wait for it; what reads meanwhile has ended by then, or keeps its part in the log.
_MOVED_TIMEOUT_MS = 1_000
# Chosen: three times what a connection to a server may take, since a crowd of writers waits for the one lock.
_POOL_TIMEOUT_S = 30.0
# Chosen: as long as a store that closes waits for transactions.
_LAST_STATEMENTS_S = 5.0


_LOG_OF_ANOTHER = "the -wal file beside it belongs to a file that was moved away, so put that back or remove both"


class ClosingConnection(sqlite3.Connection):
    """Ends every statement before it closes.

    A task that is cancelled between `UPDATE ... RETURNING` and the reading of its rows leaves the statement half-read.
    Python closes by `sqlite3_close_v2`, which waits for such statements: the connection keeps its write lock until the
    garbage collector finds the cursor, and until then nobody else can write.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._cursors: WeakSet[sqlite3.Cursor] = WeakSet()

    def cursor(self, *args: Any, **options: Any) -> Any:
        """Return a cursor, and remember it while it lives."""
        cursor = super().cursor(*args, **options)
        self._cursors.add(cursor)
        return cursor

    def close(self) -> None:
        """Close the cursors, then the connection."""
        for cursor in list(self._cursors):
            cursor.close()
        super().close()


class _Connection(aiosqlite.Connection):
    """Ends, and its thread with it, however often it is closed and stopped at once.

    Where a task is cancelled, SQLAlchemy closes its connection in another task, and if the task is cancelled once more
    it stops the connection as well. aiosqlite's own `close` would then close the database a second time, which fails,
    or wait for ever for an answer of a thread that has ended (https://github.com/omnilib/aiosqlite/issues/369).
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(partial(sqlite3.connect, *arguments, factory=ClosingConnection, **options), iter_chunk_size=64)
        # It must not keep the process alive. SQLAlchemy sets this only where it connects by itself.
        self._worker.daemon = True

    @property
    def _worker(self) -> Any:
        # A connection of aiosqlite 0.21, which CrewAI asks for, is itself the thread.
        return getattr(self, "_thread", self)

    @property
    def is_stopped(self) -> bool:
        """Whether the thread ends, or has ended."""
        return not self._running

    def stop(self) -> Any:
        """Let the thread close the database and end."""
        older: Any = self
        return super().stop() if hasattr(aiosqlite.Connection, "stop") else older._stop_running()

    def run(self) -> None:
        """Work as the thread of aiosqlite 0.21, whose end would leave the database open."""
        try:
            super().run()  # type: ignore[misc]  # of its `Thread`
        finally:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    async def close(self) -> None:
        """Stop, and wait until the thread has ended, also if the caller is cancelled meanwhile."""
        self.stop()
        try:
            await self.ended()
        finally:
            # The thread calls this loop once more; if the loop were closed by then, it would print a traceback.
            await self.ended()

    async def _execute(self, fn: Any, *args: Any, **options: Any) -> Any:
        # aiosqlite logs what it calls, at DEBUG, with every value that is bound to a statement.
        return await super()._execute(lambda: fn(*args, **options))  # type: ignore[no-untyped-call]  # of aiosqlite

    async def ended(self) -> None:
        """Wait until the thread has ended."""
        while self._worker.is_alive():
            await asyncio.sleep(0.001)


def sqlite_engine(url: URL, pool_size: int) -> AsyncEngine:
    """Return an engine for a SQLite URL: see `create_engine`."""
    path = sqlite_file(url)
    if path is not None and not path.is_absolute():
        # Later connections, and callers that ask the engine for its URL, must find the same file.
        url = url.set(database=_from_here(str(url.database)))
    file = _File(path, is_made=url.query.get("mode", "rwc") == "rwc")
    engine = create_async_engine(
        url,
        connect_args={
            "timeout": _BUSY_TIMEOUT_MS / 1000,
            "isolation_level": None,
            "async_creator_fn": file.connect,
        },
        poolclass=AsyncAdaptedQueuePool,
        # A database in memory ends with its connection, so there is exactly one, which is never closed.
        pool_size=1 if is_memory(url) else pool_size,
        max_overflow=0,
        pool_timeout=_POOL_TIMEOUT_S,
        hide_parameters=True,
    )
    # Ours have `stop` with every aiosqlite; SQLAlchemy looks for it in the driver's own class.
    engine.dialect.has_terminate = True
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "connect", file.note)
    event.listen(engine.sync_engine, "checkout", file.compare)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    event.listen(engine.sync_engine, "engine_disposed", file.await_closed)
    return engine


def _from_here(name: str) -> str:
    """Return a relative name of a file, or a URI of SQLite that holds one, with the folder it counts from."""
    if not name.startswith("file:"):
        return str(Path(name).absolute())
    return f"{Path.cwd().as_uri().rstrip('/')}/{name.removeprefix('file:')}"


class _File:
    """The file of an engine. Removed or replaced, it is not used: writes would be gone, or meet another's log."""

    def __init__(self, file: Path | None, *, is_made: bool) -> None:
        self._file, self._is_made = file and file.absolute(), is_made
        self._opened: tuple[int, int] | None = None
        self._connections: WeakSet[_Connection] = WeakSet()

    async def connect(self, *args: Any, **options: Any) -> aiosqlite.Connection:
        """Connect; for `connect_args` under the name `async_creator_fn`."""
        self._require_same()
        if self._file is not None and has_log_of_another(self._file):
            raise sqlite3.OperationalError(_LOG_OF_ANOTHER)
        if self._file is not None and self._is_made:
            create_database_file(self._file)
        connection = _Connection(*args, **options)
        self._connections.add(connection)
        opening = asyncio.ensure_future(connection)
        try:
            return await asyncio.shield(opening)
        except BaseException:
            # The connection opens all the same when the caller is cancelled, and would never be closed.
            with suppress(Exception, asyncio.CancelledError):
                await opening
            await connection.close()
            raise

    def note(self, _connection: Any, _record: Any) -> None:
        """Note which file the first connection has opened."""
        # A URI of SQLite may name a file in a way that only SQLite reads.
        if self._opened is None and self._file is not None and self._file.exists():
            self._opened = file_id(self._file)

    def compare(self, _connection: Any, _record: Any, _proxy: Any) -> None:
        """Refuse a connection whose file is gone."""
        try:
            self._require_same()
        except sqlite3.OperationalError as exc:
            _bring_log_in(_connection)
            # What SQLAlchemy makes of errors of a driver, but not of those of a listener.
            raise OperationalError(None, None, exc) from exc

    def await_closed(self, _engine: Any) -> None:
        """Wait for the connections that cancelled tasks have given up; not where nobody can wait, as after a fork."""
        if in_greenlet():
            await_only(self._closed())

    async def _closed(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_STATEMENTS_S):
                for connection in tuple(self._connections):
                    if connection.is_stopped:
                        await connection.ended()

    def _require_same(self) -> None:
        if self._file is not None and self._opened is not None and is_gone(self._file, self._opened):
            raise sqlite3.OperationalError("the database file was removed or replaced")


def _bring_log_in(connection: Any) -> None:
    """Write what the log holds into the file itself, wherever that was moved: SQLite does not when it closes it."""
    with suppress(Exception):
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={_MOVED_TIMEOUT_MS}")
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
        cursor.close()


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    try:
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout={_BUSY_TIMEOUT_MS}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            # REPLACE deletes rows, which the triggers of append-only tables refuse then.
            "recursive_triggers=ON",
            # Otherwise what was deleted or moved stays in the file until its room is used again.
            "secure_delete=ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()
    except BaseException:
        # The pool does not know it yet, and its thread would go on for ever.
        connection.close()
        raise


def _begin_sqlite(connection: Any) -> None:
    # The driver's own transactions are off (isolation_level None), so this is the only BEGIN.
    read_only = connection.get_execution_options().get(READ_ONLY)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
