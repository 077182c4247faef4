"""Rows of a SELECT of any size, a batch at a time, with memory that does not grow: one snapshot, one statement."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import aiosqlite
import asyncpg

from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.statements import CompiledStatement
from agent_gateway_store.storage.urls import is_memory

# Chosen: a day, for one command of a read of any size.
LONGEST_S = 24 * 3600.0

Rows: TypeAlias = Sequence[Sequence[Any]]
# With events of 5 kB about 5 MB.
_BATCH_ROWS = 1_000
# COPY writes values as the session is set, and the reader expects these forms. The server's limits are meant for short
# transactions; pg_dump lifts them as well.
_LONG_READ = """
SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO'; SET LOCAL extra_float_digits = 1;
SELECT set_config(name, '0', true) FROM pg_settings
WHERE name IN ('statement_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout')
"""


@asynccontextmanager
async def _long_read(driver: asyncpg.Connection) -> AsyncIterator[None]:
    async with driver.transaction(isolation="read_committed", readonly=True):
        await driver.execute(_LONG_READ)
        yield


@retry_conflicts
async def fetched(database: Database, query: CompiledStatement, values: Mapping[str, Any]) -> Rows:
    """Return all rows of a query that may take long."""
    arguments = query.arguments(values)
    async with database.raw_connection() as driver:
        if isinstance(driver, aiosqlite.Connection):
            return list(await driver.execute_fetchall(query.text, arguments))
        async with _long_read(driver):
            return await driver.fetch(query.text, *arguments, timeout=LONGEST_S)  # type: ignore[no-any-return]


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
    async with database.raw_connection() as driver:
        if isinstance(driver, aiosqlite.Connection):
            async with driver.execute(query.text, arguments) as cursor:
                while found := list(await cursor.fetchmany(batch)):
                    yield found
            return
        async with _long_read(driver):
            cursor = await driver.cursor(query.text, *arguments, timeout=LONGEST_S)
            while found := await cursor.fetch(batch, timeout=LONGEST_S):
                yield found


async def copied(
    database: Database,
    query: CompiledStatement,
    values: Mapping[str, Any],
    take: Callable[[bytes], None],
    *,
    block_bytes: int,
) -> None:
    """Hand the rows of `query` to `take`, in a thread, as blocks of CSV of whole rows. PostgreSQL only.

    COPY is much faster than a cursor: no row becomes a Python object. NULL is an empty field without quotes, and an
    empty text one with quotes. At most two blocks are in memory: one is taken while the next one arrives.
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
            async with database.raw_connection() as driver, _long_read(driver):
                await driver.copy_from_query(query.text, *arguments, output=receive, format="csv", timeout=LONGEST_S)
            await flush()
        finally:
            if under_way is not None:
                await asyncio.wait([under_way])
        if under_way is not None:
            under_way.result()
