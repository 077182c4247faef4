"""Rows of a SELECT of any size, a batch at a time, with memory that does not grow: one snapshot, one statement."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias, TypeVar

import aiosqlite
from sqlalchemy import Dialect

from agent_gateway_store.errors import StoreNotOpenError
from agent_gateway_store.models.tables import metadata
from agent_gateway_store.storage.database import Database, Transactions
from agent_gateway_store.storage.errors import RESTORE, is_bad_text, readable_rows, readable_text, retry_conflicts
from agent_gateway_store.storage.statements import CompiledStatement, Statement
from agent_gateway_store.storage.urls import is_memory

T = TypeVar("T")

STREAM_CLOSED = "The store was closed while this stream was open: begin a new one."
"""What the next step of such a stream says."""

# Chosen: a day, for one command of a read of any size.
LONGEST_S = 24 * 3600.0

Rows: TypeAlias = Sequence[Sequence[Any]]
# With events of 5 kB about 5 MB.
_BATCH_ROWS = 1_000
# COPY writes values as the session is set, and the reader expects these forms. The server's limits are meant for short
# transactions; pg_dump lifts them as well. A plan that was kept from a small table would read all of a large one.
_LIMITS = "('statement_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout')"
_LONG_READ = f"""
SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO'; SET LOCAL extra_float_digits = 1;
SET LOCAL plan_cache_mode = 'force_custom_plan';
SELECT set_config(name, '0', true) FROM pg_settings WHERE name IN {_LIMITS}
"""  # noqa: S608  names of our own
# What rewrites a table (pg_repack, a column with a default of its own in each row) leaves it empty for every snapshot
# from before. Ours must be taken once no such change can come: those of REPEATABLE READ and of COPY are taken before
# the statement waits for its tables. What is not a table, or not to be read, is for the read itself to say. A SELECT
# would take the snapshot, so the limits are lifted by SET.
_LOCK = f"""
SELECT (SELECT string_agg(format('SET LOCAL %s = 0; ', name), '') FROM pg_settings WHERE name IN {_LIMITS})
    || 'LOCK TABLE ONLY ' || string_agg(oid::regclass::text, ', ' ORDER BY oid) || ' IN ACCESS SHARE MODE'
FROM pg_catalog.pg_class
WHERE oid = ANY (ARRAY[{", ".join(f"to_regclass('{name}')" for name in metadata.tables)}]::oid[]) AND relkind = 'r'
    AND has_table_privilege(oid, 'SELECT')
"""  # noqa: S608  likewise


@asynccontextmanager
async def _long_read(driver: Any, isolation: str = "read_committed", *, locked: bool = False) -> AsyncIterator[None]:
    """Open a transaction that only reads, without limits of time; a statement of SQLite needs none.

    `locked`: nobody rewrites our tables from before its snapshot on.
    """
    if isinstance(driver, aiosqlite.Connection):
        yield
        return
    lock = None
    if locked:
        async with driver.transaction(isolation="read_committed", readonly=True):
            lock = await driver.fetchval(_LOCK)
    transaction = driver.transaction(isolation=isolation, readonly=True)
    await transaction.start()
    try:
        if lock is not None:
            await driver.execute(lock, timeout=LONGEST_S)
        await driver.execute(_LONG_READ)
        yield
    except TimeoutError:
        # A ROLLBACK would wait for its answer as long again; its user closes it.
        raise
    except BaseException:
        await transaction.rollback()
        raise
    await transaction.commit()


class Snapshot:
    """A connection on which every read sees the database as it was at the first one."""

    def __init__(self, driver: Any, dialect: Dialect) -> None:
        self._driver, self.dialect = driver, dialect

    async def fetched(self, query: Statement, values: Mapping[str, Any] | None = None) -> Rows:
        """Return all rows of a query."""
        compiled = query.compiled(self.dialect)
        arguments = compiled.arguments(values or {})
        try:
            return await _fetched(self._driver, compiled.text, arguments)
        except sqlite3.OperationalError as exc:
            # Read like this at need alone: it takes a call for each value.
            if not is_bad_text(exc):
                raise
            self._driver.text_factory = lambda stored: stored.decode(errors="surrogateescape")
            return await _fetched(self._driver, compiled.text, arguments)


@asynccontextmanager
async def snapshot(database: Database) -> AsyncIterator[Snapshot]:
    """Open a `Snapshot` for reads that may take long; holds a connection until the end."""
    async with database.raw_connection() as driver:
        if isinstance(driver, aiosqlite.Connection):
            await driver.execute("BEGIN")
            try:
                yield Snapshot(driver, database.engine.dialect)
            finally:
                await driver.rollback()
                driver.text_factory = str
            return
        async with _long_read(driver, "repeatable_read", locked=True):
            # Refused, in place of an answer from which a policy leaves rows out.
            await driver.execute("SET LOCAL row_security = off")
            yield Snapshot(driver, database.engine.dialect)


async def _fetched(driver: Any, text: str, arguments: Sequence[Any]) -> Rows:
    if isinstance(driver, aiosqlite.Connection):
        # Closed where a value cannot be read, too: an open cursor keeps its connection at this state of the database.
        async with driver.execute(text, arguments) as cursor:
            return list(await cursor.fetchall())
    return await driver.fetch(text, *arguments, timeout=LONGEST_S)  # type: ignore[no-any-return]


def built(query: CompiledStatement, rows: Rows, build: Callable[[Rows], T]) -> T:
    """Return what `build` makes of rows, whose first column is their id; an altered one raises UnreadableRowError."""
    try:
        return build(rows)
    except Exception:
        for row in rows:
            with readable_rows(f"Row {row[0]} of {query.table}", RESTORE):
                build([row])
        raise


async def _batches(
    driver: Any, query: CompiledStatement, arguments: Sequence[Any], batch: int
) -> AsyncGenerator[Rows, None]:
    text = query.text
    if isinstance(driver, aiosqlite.Connection):
        async with driver.execute(text, arguments) as cursor:
            while True:
                with readable_text(query.table):
                    found = list(await cursor.fetchmany(batch))
                if not found:
                    return
                yield found
    # Without a name: asyncpg counts them in each process, and one that stays in a connection of PgBouncer would meet
    # that of the next gateway.
    statement = await driver.prepare(text, name="", timeout=LONGEST_S)
    cursor = await statement.cursor(*arguments, timeout=LONGEST_S)
    while found := await cursor.fetch(batch, timeout=LONGEST_S):
        yield found


@retry_conflicts
async def fetched(database: Database, query: CompiledStatement, values: Mapping[str, Any]) -> Rows:
    """Return all rows of a query that may take long."""
    arguments = query.arguments(values)
    async with database.raw_connection() as driver, _long_read(driver):
        with readable_text(query.table):
            return await _fetched(driver, query.text, arguments)


async def read_all(source: Transactions, query: Statement, values: Mapping[str, Any]) -> Rows:
    """Return all rows of a query that may take longer than a command is allowed to; in a session, of any."""
    if isinstance(source, Database):
        return await fetched(source, query.compiled(source.engine.dialect), values)
    async with source.connection("read") as connection:
        return await query.tuples(connection, values)


async def streamed(
    database: Database, query: CompiledStatement, values: Mapping[str, Any], *, batch: int = _BATCH_ROWS
) -> AsyncGenerator[Rows, None]:
    """Yield the rows of `query` in batches, by a server-side cursor. Callers that stop early close it (`aclosing`)."""
    arguments = query.arguments(values)
    if is_memory(database.engine.url):
        # There is one connection, which the reader of these rows may need.
        rows = await fetched(database, query, values)
        for start in range(0, len(rows), batch):
            yield rows[start : start + batch]
        return
    async with (
        database.raw_connection() as driver,
        _long_read(driver),
        aclosing(_batches(driver, query, arguments, batch)) as batches,
    ):
        async for rows in batches:
            yield rows


@asynccontextmanager
async def ended_with(database: Database, batches: AsyncGenerator[T, None]) -> AsyncIterator[AsyncGenerator[T, None]]:
    """Close as `aclosing` does; the database, too, closes the generator with itself while its consumer does nothing."""
    database.streams.add(batches)
    try:
        yield batches
    finally:
        database.streams.discard(batches)
        await batches.aclose()


def require_open(database: Database, batches: AsyncGenerator[Any, None]) -> None:
    """Raise StoreNotOpenError if the database has closed the generator, which would else look like its end."""
    if batches not in database.streams:
        raise StoreNotOpenError(STREAM_CLOSED)


async def copied(
    database: Database,
    query: CompiledStatement,
    values: Mapping[str, Any],
    take: Callable[[bytes], None],
    *,
    block_bytes: int,
    parallel: bool = True,
) -> None:
    """Hand the rows of `query` to `take`, in a thread, as blocks of CSV of whole rows. PostgreSQL only.

    COPY is much faster than a cursor: no row becomes a Python object. NULL is an empty field without quotes, and an
    empty text one with quotes. At most two blocks are in memory: one is taken while the next one arrives.

    Args:
        parallel: False for the few rows of a LIMIT: to start workers for them takes as long as to read them.
    """
    arguments = query.arguments(values)
    parts: list[bytes] = []
    size = 0
    under_way: asyncio.Future[None] | None = None
    loop = asyncio.get_running_loop()

    async def flush() -> None:
        nonlocal size, under_way
        block = b"".join(parts)
        parts.clear()
        size = 0
        if under_way is not None:
            await under_way
        under_way = loop.run_in_executor(thread, take, block) if block else None

    async def receive(data: bytes) -> None:
        # The server sends one message for each row, and the driver whole messages, so a block ends with a row.
        nonlocal size
        parts.append(bytes(data))
        size += len(data)
        if size >= block_bytes:
            await flush()

    # One thread for all blocks: the allocators of C libraries keep memory for each thread that uses them.
    with ThreadPoolExecutor(1, thread_name_prefix="gateway-store bulk") as thread:
        try:
            async with database.raw_connection() as driver, _long_read(driver, locked=True):
                if not parallel:
                    await driver.execute("SET LOCAL max_parallel_workers_per_gather = 0")
                await driver.copy_from_query(query.text, *arguments, output=receive, format="csv", timeout=LONGEST_S)
            await flush()
        finally:
            if under_way is not None:
                await asyncio.wait([under_way])
        if under_way is not None:
            under_way.result()
