"""The spool: rows that wait, on this machine's disk, for a database that is away.

A SQLite file with the columns of `audit_events`, so that rows are replayed unchanged. Several processes may share one
file, also with different databases: each row names its target, and only the rows of that target are replayed. The
target is the identity of the database, which is the same under every spelling of its URL. Earlier versions knew only
the URL: such a row is taken by the first database that answers under it.

To remove rows takes room on the disk as well: beside the file lies a reserve, which is given up when the disk is full.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from datetime import datetime
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import (
    Column,
    Connection,
    Executable,
    Index,
    MetaData,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    delete,
    event,
    func,
    insert,
    inspect,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.schema import CreateColumn

from agent_gateway_store._text import code_text
from agent_gateway_store.audit.document import COLUMNS
from agent_gateway_store.audit.record import EncodedRow, from_values
from agent_gateway_store.errors import GatewayStoreError, StoreUnavailableError, UnreadableRowError
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.models.columns import UtcDateTime
from agent_gateway_store.storage.database import create_engine, reader_of
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.errors import is_bad_text, translate_errors
from agent_gateway_store.storage.exclusive import file_lock
from agent_gateway_store.storage.files import (
    beside,
    check_place,
    create_file,
    create_folder,
    file_id,
    is_empty,
    is_gone,
)
from agent_gateway_store.storage.urls import is_memory

# Chosen: a long outage must not fill the disk of the gateway.
MAX_BYTES = 2**30
# Chosen: to make the file takes milliseconds, and callers wait for it.
_LOCK_S = 2.0
_LOCK = ".lock"
_BESIDE = (_LOCK, "-wal", "-shm")
# SQLite's default.
_PAGE_BYTES = 4096
# Chosen: its log grows to 4 MB and by one batch of 8 MiB before it is brought into the file, which takes as much there.
_RESERVE_BYTES = 2**24
# Chosen, of one commit: as many as are replayed at once.
_REMOVED_ROWS = 500
_columns = AuditEvent.__table__.c
_events = Table(
    "spooled_events",
    MetaData(),
    *(Column(name, _columns[name].type, nullable=True) for name in COLUMNS),
    Column("target", Text, nullable=False),
    # For people: an identity does not say which database it is.
    Column("url", Text),
    Column("spooled_at", UtcDateTime, nullable=False),
    Column("error", Text),
    Column("id", _columns.id.type, primary_key=True),
    Index("ix_spooled_events_target_id", "target", "id"),
    # Never the id of a removed row again: another process that replays the old row now would remove the new one.
    sqlite_autoincrement=True,
)
_IS_ROW = _events.c.id == bindparam("row_id")

_LOG_ASIDE = (
    "%s holds events of a spool that was moved away: stop the gateways, and if it is still there put it beside that "
    "spool, under its name with -wal at the end."
)
_logger = logging.getLogger("agent_gateway_store.audit")

_Row: TypeAlias = tuple[int, EncodedRow | UnreadableRowError | None]


class Target(NamedTuple):
    """What waits for one database.

    Attributes:
        target: Its identity; its URL in rows of earlier versions.
        url: Its URL without user and password, as it was spelt last; None in rows of earlier versions.
        waiting: How many rows wait.
        quarantined: How many it has refused, or could not be read.
    """

    target: str
    url: str | None
    waiting: int
    quarantined: int


class Spool:
    """Rows on disk, first in, first out. Each `add` is on disk (fsync) when it returns.

    Args:
        path: The SQLite file, at most 1 GiB; its folder is made for the first row.
        database: URL of the database that the rows are for.
        identity: Its identity; None: not known, so that rows can be counted and neither added nor replayed.
    """

    def __init__(self, path: Path, database: URL, identity: str | None = None) -> None:
        # The folder of the process may change before the first outage. A path that begins with ~ has no home to be in.
        self.path = path if path.parts[:1] == ("~",) else path.absolute()
        self.identity = identity
        self._url = _without_user(database)
        self._engine: AsyncEngine | None = None
        self._opened: tuple[int, int] | None = None
        self._log: tuple[int, int] | None = None
        self._read_by: AsyncEngine | None = None
        self._opening = asyncio.Lock()
        # Of rows that the database holds and that could not be removed.
        self._stored: list[int] = []
        # The last one that this process could not read.
        self._unreadable = 0

    @property
    def exists(self) -> bool:
        """True if the file is there, or if we have no right to see it."""
        try:
            return self.path.exists()
        except OSError:
            return True

    async def check(self) -> None:
        """Find out whether rows could be added. Nothing is left behind; a file that is there is opened.

        Raises:
            StoreUnavailableError: They could not; the text says why and what to do.
        """
        async with _place_named(self.path, OSError, ValueError, GatewayStoreError):
            await asyncio.to_thread(check_place, self.path, _BESIDE)
            if self.exists or beside(self.path, "-wal").exists() or _logs_aside(self.path):
                async with self._transaction("write the spool"):
                    pass

    async def add(self, rows: Sequence[Mapping[str, Any]], *, error: str | None = None) -> None:
        """Keep `rows`. With an `error` they are quarantined: shown, and never replayed.

        Raises:
            StoreUnavailableError: The file cannot be written, or is full.
        """
        extra = {"target": self.identity, "url": self._url, "error": error}
        given = [{**row, **extra} for row in rows]
        # Once more into the next file where this one was moved meanwhile: twice in the spool is once in the database.
        for is_last in (False, True):
            engine = self._engine
            try:
                with translate_errors("spool the event"):
                    await self.engine()
                await asyncio.to_thread(self._keep_reserve)
                async with self._transaction("spool the event") as connection:
                    await connection.execute(insert(_events).values(spooled_at=db_now()), given)
            except StoreUnavailableError:
                if is_last or (engine is self._engine and not is_gone(self.path, self._opened)):
                    raise
            else:
                if connection.engine is self._engine and not is_gone(self.path, self._opened):
                    return

    async def waiting(self, limit: int) -> list[_Row]:
        """Return up to `limit` rows to replay, oldest first, with their ids.

        Those of earlier versions for this URL are given the identity before. What could not be removed is not returned.
        A row that is not a whole event gives an error, or None once it is quarantined: each process tries it again,
        for its version may be able to read it.
        """
        async with self._transaction("read the spool") as connection:
            if self._read_by is not connection.engine:
                # An id says something about its own file only.
                self._read_by, self._stored, self._unreadable = connection.engine, [], 0
            await self._name(connection, self._url)
            is_untried = and_(_events.c.error == UnreadableRowError.__name__, _events.c.id > self._unreadable)
            is_own = _events.c.target == self.identity
            statement = select(_events).where(is_own, or_(_events.c.error.is_(None), is_untried))
            statement = statement.where(_events.c.id > max(self._stored, default=0)).order_by(_events.c.id).limit(limit)
            try:
                return await _read(connection, statement)
            except Exception:
                # One row fails them all.
                each = await connection.execute(statement.with_only_columns(_events.c.id, _events.c.error.is_(None)))
            found = [await _read_one(connection, row_id, is_new=is_new) for row_id, is_new in each.all()]
            self._unreadable = max([self._unreadable, *(row_id for row_id, row in found if not isinstance(row, tuple))])
            return found

    async def adopt(self, target: str) -> int:
        """Have this database receive the rows that wait for `target`; return how many these are."""
        async with self._transaction("write the spool") as connection:
            return await self._name(connection, target)

    async def _name(self, connection: AsyncConnection, target: str) -> int:
        named = update(_events).where(_events.c.target == target).values(target=self.identity, url=self._url)
        return (await connection.execute(named)).rowcount

    async def remove(self, ids: Sequence[int]) -> None:
        """Remove rows that the database holds now. Removing them twice does no harm.

        Raises:
            StoreUnavailableError: The file cannot be written, as on a full disk: `remove_stored` removes them later.
        """
        try:
            await self._delete(ids)
        except StoreUnavailableError:
            self._stored += ids
            raise

    async def remove_stored(self) -> None:
        """Remove what `remove` could not.

        Raises:
            StoreUnavailableError: The file still cannot be written.
        """
        await self.engine()
        while batch := self._stored[:_REMOVED_ROWS]:
            await self._delete(batch)
            del self._stored[:_REMOVED_ROWS]

    async def _delete(self, ids: Sequence[int]) -> None:
        await self._write(delete(_events).where(_IS_ROW), [{"row_id": each} for each in ids])

    async def quarantine(self, errors: Mapping[int, Exception]) -> None:
        """Keep rows, by their ids, out of every further replay: the database refuses them, or they cannot be read."""
        rows = [{"row_id": row_id, "reason": type(error).__name__} for row_id, error in errors.items()]
        await self._write(update(_events).where(_IS_ROW).values(error=bindparam("reason")), rows)

    async def _write(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        while rows:
            try:
                async with self._transaction("write the spool") as connection:
                    # In a file that was put in its place the same ids are other rows.
                    if self._read_by in (None, connection.engine):
                        await connection.execute(statement, rows)
                return
            except StoreUnavailableError:
                is_given_up = False
                with suppress(OSError):
                    await asyncio.to_thread(self._reserve.unlink)
                    is_given_up = True
                if not is_given_up:
                    raise

    async def targets(self) -> list[Target]:
        """Return what waits, for each database."""
        if not self.exists:
            return []
        counts = (func.count() - func.count(_events.c.error), func.count(_events.c.error))
        statement = select(_events.c.target, func.max(_events.c.url), *counts).group_by(_events.c.target)
        async with self._transaction("read the spool", writes=False) as connection:
            return [Target(*row) for row in await connection.execute(statement)]

    def is_own(self, target: Target) -> bool:
        """True if this database receives what waits for `target`; without an identity the URL has to tell."""
        return self._url == target.target or (
            self._url == target.url if self.identity is None else self.identity == target.target
        )

    async def counts(self) -> tuple[int, int]:
        """Return how many rows wait for this database, and how many are quarantined."""
        own = [target for target in await self.targets() if self.is_own(target)]
        return sum(target.waiting for target in own), sum(target.quarantined for target in own)

    async def oldest(self) -> datetime | None:
        """Return when the oldest row was spooled that waits for this database; None if none does."""
        if not self.exists:
            return None
        own = _events.c.target.in_((self.identity, self._url))
        statement = select(func.min(_events.c.spooled_at)).where(own, _events.c.error.is_(None))
        async with self._transaction("read the spool", writes=False) as connection:
            since: datetime | None = (await connection.execute(statement)).scalar()
            return since

    async def close(self) -> None:
        """Close the file. Rows that wait stay in it, wherever it was moved."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            if is_gone(self.path, self._opened):
                # The only connection brings its log in as it refuses to be used.
                with suppress(DBAPIError):
                    async with engine.connect():
                        pass
            await engine.dispose()

    @asynccontextmanager
    async def _transaction(self, doing: str, *, writes: bool = True) -> AsyncIterator[AsyncConnection]:
        with translate_errors(doing):
            engine = await self.engine()
            async with (engine if writes else reader_of(engine)).begin() as connection:
                yield connection

    async def engine(self) -> AsyncEngine:
        """Return the engine of the file, which the first call makes."""
        # Batches that fail at the same time come here at the same time.
        async with self._opening, _place_named(self.path, OSError, ValueError):
            if self._engine is None or is_gone(self.path, self._opened):
                check_place(self.path, _BESIDE)
                create_folder(self.path.parent)
                # Of two that make the file at once, one would take the other's log for that of the file before.
                lock = file_lock(beside(self.path, _LOCK), wait_s=_LOCK_S, busy="Another process makes the spool")
                async with lock if self._engine is not None or is_empty(self.path) else nullcontext():
                    # Asked while it is open, for later another log may be given its inode.
                    is_own = self._engine is not None and not is_gone(beside(self.path, "-wal"), self._log)
                    # Removed or replaced: what is written to it now would be lost when this process ends.
                    await self.close()
                    await asyncio.to_thread(_set_log_aside, self.path, is_own=is_own)
                    self._engine = await self._opened_engine()
            return self._engine

    async def _opened_engine(self) -> AsyncEngine:
        # Not as text: a path may hold what ends one in a URL.
        engine = create_engine(URL.create("sqlite", database=str(self.path)), pool_size=1)
        event.listen(engine.sync_engine, "connect", self._on_connect)
        try:
            async with engine.begin() as connection:
                await connection.run_sync(_prepare)
        except BaseException:
            await engine.dispose()
            raise
        self._opened = file_id(self.path)
        return engine

    def _on_connect(self, connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA max_page_count={MAX_BYTES // _PAGE_BYTES}")
        cursor.close()
        with suppress(OSError):
            self._log = file_id(beside(self.path, "-wal"))

    @property
    def _reserve(self) -> Path:
        return self.path.with_name(f"{self.path.name}.reserve")

    def _keep_reserve(self) -> None:
        """Take room on the disk, of a small one half of what is left; where that fails there is none."""
        with suppress(OSError):
            if self._reserve.exists():
                return
            size = min(_RESERVE_BYTES, shutil.disk_usage(self.path.parent).free // 2)
            if size < _PAGE_BYTES:
                return
            create_file(self._reserve)
            try:
                # Random: zeros take no room on a disk that packs them.
                self._reserve.write_bytes(os.urandom(size))
            except OSError:
                self._reserve.unlink()


@asynccontextmanager
async def _place_named(path: Path, *errors: type[Exception]) -> AsyncIterator[None]:
    """Say which file it is, and what to do, where one of `errors` is raised over it."""
    try:
        yield
    except errors as exc:
        cause = exc.__cause__ or exc
        reason = getattr(cause, "orig", None) or getattr(cause, "strerror", None) or exc
        raise StoreUnavailableError(
            f"The spool {code_text(str(path))} cannot be written ({reason}): set AUDIT_SPOOL_PATH to a file in a "
            "folder that this process may write to."
        ) from exc


def _prepare(connection: Connection) -> None:
    """Make the table, or add the columns that the version which made it did not know."""
    _events.metadata.create_all(connection)
    present = {column["name"] for column in inspect(connection).get_columns(_events.name)}
    for column in _events.columns:
        if column.name not in present:
            definition = CreateColumn(column).compile(dialect=connection.dialect)
            connection.execute(text(f"ALTER TABLE {_events.name} ADD COLUMN {definition}"))


async def _read(connection: AsyncConnection, statement: Select[Any]) -> list[_Row]:
    found = await connection.execute(statement)
    return [(row["id"], from_values(row)) for row in found.mappings()]


async def _read_one(connection: AsyncConnection, row_id: int, *, is_new: bool) -> _Row:
    try:
        return (await _read(connection, select(_events).where(_events.c.id == row_id)))[0]
    except Exception as exc:
        if isinstance(exc, DBAPIError) and not is_bad_text(exc):
            raise
        reason = f"was altered, or a newer version wrote it ({type(exc).__name__})"
        step = "it is quarantined, and each store that opens on the spool tries it again"
        return row_id, UnreadableRowError(f"Row {row_id} of the spool {reason}: {step}.") if is_new else None


def _logs_aside(path: Path) -> list[Path]:
    log = beside(path, "-wal")
    return sorted(log.parent.glob(f"{escape(log.name)}.*"))


def _set_log_aside(path: Path, *, is_own: bool) -> None:
    """Move the log of a file that is gone out of the way, or SQLite deletes it or writes it into the next file."""
    log = beside(path, "-wal")
    if is_own or is_empty(path):
        with suppress(FileNotFoundError):
            log.rename(log.with_name(f"{log.name}.{secrets.token_hex(4)}"))
        beside(path, "-shm").unlink(missing_ok=True)
    for each in _logs_aside(path):
        if is_empty(each):
            each.unlink(missing_ok=True)
        else:
            _logger.error(_LOG_ASIDE, each)


def _without_user(url: URL) -> str:
    """Return the URL of a database without its user and password. Earlier versions named rows by it."""
    name = url.database or ""
    if url.get_backend_name() == "sqlite" and not is_memory(url):
        name = str(Path(name).absolute())
    return f"{url.get_backend_name()}://{url.host or ''}:{url.port or ''}/{name}"
