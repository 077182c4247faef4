"""The spool: rows that wait, on this machine's disk, for a database that is away.

A SQLite file with the columns of `audit_events`, so that rows are replayed unchanged. Several processes may share one
file, also with different databases: each row names its target, and only the rows of that target are replayed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Index, MetaData, Table, Text, delete, event, func, insert, select, update
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.models.columns import UtcDateTime
from agent_gateway_store.storage.database import create_engine, db_now
from agent_gateway_store.storage.errors import translate_errors
from agent_gateway_store.storage.permissions import create_folder
from agent_gateway_store.storage.urls import is_memory

# Chosen: a long outage must not fill the disk of the gateway.
MAX_BYTES = 2**30
# SQLite's default.
_PAGE_BYTES = 4096
_events = Table(
    "spooled_events",
    MetaData(),
    *(
        Column(name, AuditEvent.__table__.c[name].type, nullable=True)  # type: ignore[attr-defined]
        for name in AuditEvent.model_fields
        if name != "id"
    ),
    Column("target", Text, nullable=False),
    Column("spooled_at", UtcDateTime, nullable=False),
    Column("error", Text),
    Column("id", AuditEvent.__table__.c.id.type, primary_key=True),  # type: ignore[attr-defined]
    Index("ix_spooled_events_target_id", "target", "id"),
    # Never the id of a removed row again: another process that replays the old row now would remove the new one.
    sqlite_autoincrement=True,
)
_NOT_OURS = ("target", "spooled_at", "error", "id")


class Spool:
    """Rows on disk, first in, first out. Each `add` is on disk (fsync) when it returns.

    Args:
        path: The SQLite file, at most 1 GiB; its folder is made for the first row.
        database: URL of the database that the rows are for.
    """

    def __init__(self, path: Path, database: URL) -> None:
        self.path = path
        self._target = _target(database)
        self._engine: AsyncEngine | None = None

    @property
    def exists(self) -> bool:
        """True if the file is there, or if we have no right to see it."""
        try:
            return self.path.exists()
        except OSError:
            return True

    async def add(self, rows: Sequence[Mapping[str, Any]], *, error: str | None = None) -> None:
        """Keep `rows`. With an `error` they are quarantined: shown, and never replayed.

        Raises:
            StoreUnavailableError: The file cannot be written, or is full.
        """
        async with self._transaction("spool the event") as connection:
            extra = {"target": self._target, "error": error}
            statement = insert(_events).values(spooled_at=db_now())
            await connection.execute(statement, [{**row, **extra} for row in rows])

    async def waiting(self, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """Return up to `limit` rows to replay, oldest first, with their ids."""
        statement = select(_events).where(_events.c.target == self._target, _events.c.error.is_(None))
        async with self._transaction("read the spool") as connection:
            found = await connection.execute(statement.order_by(_events.c.id).limit(limit))
            rows = [dict(row) for row in found.mappings()]
        return [(row["id"], {name: row[name] for name in row if name not in _NOT_OURS}) for row in rows]

    async def remove(self, ids: Sequence[int]) -> None:
        """Remove rows that the database holds now. Removing them twice does no harm."""
        async with self._transaction("write the spool") as connection:
            await connection.execute(delete(_events).where(_events.c.id.in_(ids)))

    async def quarantine(self, row_id: int, error: str) -> None:
        """Keep a row that the database refuses out of every further replay."""
        async with self._transaction("write the spool") as connection:
            await connection.execute(update(_events).where(_events.c.id == row_id).values(error=error))

    async def counts(self) -> tuple[int, int]:
        """Return how many rows wait, and how many are quarantined."""
        if not self.exists:
            return 0, 0
        statement = select(func.count(), func.count(_events.c.error)).where(_events.c.target == self._target)
        async with self._transaction("read the spool") as connection:
            total, quarantined = (await connection.execute(statement)).one()
        return total - quarantined, quarantined

    async def close(self) -> None:
        """Close the file. Rows that wait stay in it."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await engine.dispose()

    @asynccontextmanager
    async def _transaction(self, doing: str) -> AsyncIterator[AsyncConnection]:
        with translate_errors(doing):
            engine = await self.engine()
            async with engine.begin() as connection:
                yield connection

    async def engine(self) -> AsyncEngine:
        """Return the engine of the file, which the first call makes."""
        if self._engine is not None and not self.exists:
            # The file was removed: what is written to it now would be lost when this process ends.
            await self.close()
        if self._engine is None:
            create_folder(self.path.parent)
            engine = create_engine(f"sqlite:///{self.path}", pool_size=2)
            event.listen(engine.sync_engine, "connect", _limit_size)
            try:
                async with engine.begin() as connection:
                    await connection.run_sync(_events.metadata.create_all)
            except BaseException:
                await engine.dispose()
                raise
            self._engine = engine
        return self._engine


def _limit_size(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA max_page_count={MAX_BYTES // _PAGE_BYTES}")
    cursor.close()


def _target(url: URL) -> str:
    """Name a database without its user and password."""
    name = url.database or ""
    if url.get_backend_name() == "sqlite" and not is_memory(url):
        name = str(Path(name).absolute())
    return f"{url.get_backend_name()}://{url.host or ''}:{url.port or ''}/{name}"
