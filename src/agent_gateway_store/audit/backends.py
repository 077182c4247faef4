"""The backends, where batches of rows are committed in the fastest safe way of each driver.

A backend raises if the database cannot answer, or ends the transaction in favour of others each time it is tried. A row
that the database refuses does not fail its batch: its place in the results holds the error instead of an outcome.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from typing import Any, Protocol, TypeAlias

import aiosqlite
import asyncpg
from sqlalchemy import Text, literal, literal_column, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agent_gateway_store.audit.document import COLUMNS
from agent_gateway_store.audit.erased import IS_ERASED, blanked
from agent_gateway_store.audit.outcomes import WriteOutcome
from agent_gateway_store.audit.record import EncodedRow, is_same, key_of, mark_of, to_values, with_derived_id
from agent_gateway_store.audit.selects import JSON_FIELDS, table
from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.storage.asyncpg_pool import AsyncpgPool
from agent_gateway_store.storage.database import dialect_of, read_committed
from agent_gateway_store.storage.errors import is_outage, retry_conflicts
from agent_gateway_store.storage.identity import IDENTITY, known
from agent_gateway_store.storage.sequences import require_next_id

RowResult: TypeAlias = WriteOutcome | Exception
"""The result of one row of a batch: its outcome, or the error by which the database refuses it."""

_Key: TypeAlias = tuple[str, str]
_KEY = ("request_id", "org_id")

# Chosen: callers wait for it. Longer than any commit of a database that is well; after it the spool takes over.
_TIMEOUT_S = 5.0
# Chosen: it leaves the spool, on the same disk, two seconds of these.
_SQLITE_TIMEOUT_S = _TIMEOUT_S - 2
# Chosen: the database is probed every half second while it is away.
_PROBE_TIMEOUT_S = 1.0
_CONNECTION_LOST = (OSError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError, asyncpg.InternalClientError)


class EventDroppedError(StoreUnavailableError, ValueError):
    """The database answered, and has not stored the row: a fault of the row, as what a trigger refuses is."""

    def __init__(self) -> None:
        super().__init__(
            "The database drops the event without an error: find the trigger on audit_events that does so, and drop it."
        )


class Backend(Protocol):
    """Commits batches, of as many tasks at once as it has places.

    Attributes:
        places: How many batches it commits at once.
    """

    places: int

    async def store(self, rows: Sequence[EncodedRow]) -> list[RowResult]:
        """Commit `rows`, whose keys differ; return the result of each, in order."""
        ...

    async def probe(self) -> str:
        """Return the identity of the database that answers, soon; raise soon if none does."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


def backend_for(engine: AsyncEngine) -> Backend:
    """Return the backend for an engine's driver."""
    return PostgresBackend(engine) if engine.dialect.driver == "asyncpg" else SqliteBackend(engine)


async def store_batch(backend: Backend, rows: Sequence[EncodedRow]) -> list[RowResult]:
    """Commit `rows`, whose keys may repeat, and return the result of each, in order. Raises what the backend raises.

    The same event twice is stored once; different events under one id are stored one after the other, as if they had
    been in different batches.
    """
    first: dict[_Key, int] = {}
    repeats: dict[int, int] = {}
    others: list[int] = []
    for index, row in enumerate(rows):
        seen = first.setdefault(key_of(row), index)
        if seen == index:
            continue
        if is_same(row, mark_of(rows[seen])):
            repeats[index] = seen
        else:
            others.append(index)
    if not repeats and not others:
        return await backend.store(rows)
    results = dict(zip(first.values(), await backend.store([rows[index] for index in first.values()]), strict=True))
    if others:
        results |= dict(zip(others, await store_batch(backend, [rows[index] for index in others]), strict=True))
    for index, seen in repeats.items():
        results[index] = WriteOutcome.DUPLICATE if results[seen] is WriteOutcome.STORED else results[seen]
    return [results[index] for index in range(len(rows))]


def json_texts(connection: AsyncConnection, texts: Mapping[str, Any]) -> dict[str, Any]:
    """Return those columns of `texts` for SQLAlchemy that SQLite holds as they are written; of PostgreSQL none.

    The engine may be an application's, whose serializer writes JSON in a form that `evidence verify` does not know.
    """
    is_text = dialect_of(connection) == "sqlite"
    return {name: literal(texts[name], Text()) for name in JSON_FIELDS} if is_text else {}


async def insert_event(connection: AsyncConnection, row: EncodedRow) -> WriteOutcome:
    """Insert one row through SQLAlchemy, which works on every connection; does not commit.

    The same event again changes nothing (DUPLICATE). Another event under a used request_id is stored under a derived id
    with the label REQUEST_ID_REUSED (STORED).

    Raises:
        EventDroppedError: The database keeps no such row.
    """
    insert = postgresql.insert if dialect_of(connection) == "postgresql" else sqlite.insert
    is_gone = False
    while True:
        values = to_values(row) | json_texts(connection, dict(zip(COLUMNS, row, strict=True)))
        statement = insert(table).values(values).on_conflict_do_nothing(index_elements=_KEY)
        if (await connection.execute(statement.returning(table.c.id))).first() is not None:
            return WriteOutcome.STORED
        request_id, org_id = key_of(row)
        same_key = select(_STORED_MARK).where(table.c.request_id == request_id, table.c.org_id == org_id)
        found = (await connection.execute(same_key)).first()
        if found is None:
            # Once: it was deleted in between.
            if is_gone:
                raise EventDroppedError
            is_gone = True
            continue
        stored = found[0]
        if is_same(row, stored):
            return WriteOutcome.DUPLICATE
        # In a loop, since somebody may have used the derived id on purpose: the next one differs again.
        row = with_derived_id(blanked(row) if stored == _ERASED else row)


async def _insert_free(
    rows: Sequence[EncodedRow], insert: Callable[[list[EncodedRow]], Awaitable[dict[_Key, str | None]]]
) -> list[RowResult]:
    """Insert `rows`, whose keys differ, those whose key is taken under derived ids; return the result of each.

    `insert` inserts the rows whose key is free, and returns the others' keys with the mark of what is stored there, or
    with `_DROPPED`.
    """
    results: dict[int, RowResult] = {}
    open_rows = dict(enumerate(rows))
    while open_rows:
        known = await insert(list(open_rows.values()))
        taken = {index: row for index, row in open_rows.items() if key_of(row) in known}
        same = {index for index, row in taken.items() if is_same(row, known[key_of(row)])}
        results |= dict.fromkeys(open_rows.keys() - taken.keys(), WriteOutcome.STORED)
        results |= dict.fromkeys(same, WriteOutcome.DUPLICATE)
        dropped = {index for index, row in taken.items() if known[key_of(row)] == _DROPPED}
        results |= {index: EventDroppedError() for index in dropped}
        open_rows = {
            index: with_derived_id(blanked(row) if known[key_of(row)] == _ERASED else row)
            for index, row in taken.items()
            if index not in same | dropped
        }
    return [results[index] for index in range(len(rows))]


class SqliteBackend:
    """`executemany` in one transaction on the driver's own connection.

    It waits less long for another process that has the write lock than an ordinary transaction does: there is the
    spool.
    """

    # The database has one writer.
    places = 1

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._busy_timeout_ms: int | None = None

    async def store(self, rows: Sequence[EncodedRow]) -> list[RowResult]:
        """Commit `rows` together, or raise within three seconds.

        If a key is taken, look for all keys first; if a row is refused, commit each on its own.
        """
        deadline = asyncio.get_running_loop().time() + _SQLITE_TIMEOUT_S
        async with self._driver(deadline) as driver:
            return await _store_on(driver, rows, deadline)

    async def probe(self) -> str:
        """Begin to write, since reading works while another process has the lock."""
        deadline = asyncio.get_running_loop().time() + _PROBE_TIMEOUT_S
        async with self._driver(deadline) as driver:
            await _begin(driver, deadline)
            try:
                ((identity,),) = await driver.execute_fetchall(str(IDENTITY))
            finally:
                await driver.rollback()
        return known(identity)

    async def close(self) -> None:
        """There is no connection to close."""

    @asynccontextmanager
    async def _driver(self, deadline: float) -> AsyncIterator[aiosqlite.Connection]:
        async with AsyncExitStack() as stack:
            async with asyncio.timeout_at(deadline):
                connection = await stack.enter_async_context(self._engine.connect())
            driver = (await connection.get_raw_connection()).driver_connection
            assert isinstance(driver, aiosqlite.Connection)  # noqa: S101
            if self._busy_timeout_ms is None:
                ((self._busy_timeout_ms,),) = await driver.execute_fetchall("PRAGMA busy_timeout")
            try:
                yield driver
            finally:
                # The next user of the connection has no spool.
                await driver.execute(f"PRAGMA busy_timeout={self._busy_timeout_ms}")


async def _store_on(driver: aiosqlite.Connection, rows: Sequence[EncodedRow], deadline: float) -> list[RowResult]:
    refused: list[RowResult] = []
    for insert in (_insert_all, _insert_unknown):
        try:
            await _begin(driver, deadline)
            results = await insert(driver, rows)
            await driver.commit()
        except Exception as exc:
            # Raises, too, where the connection is closed.
            await driver.rollback()
            # The second is the driver's own, of a value that it cannot bind.
            if is_outage(exc) and not isinstance(exc, aiosqlite.ProgrammingError):
                raise
            refused = [exc]
        except BaseException:
            if driver.in_transaction:
                await driver.rollback()
            raise
        else:
            return results
    return refused if len(rows) == 1 else [(await _store_on(driver, [row], deadline))[0] for row in rows]


async def _begin(driver: aiosqlite.Connection, deadline: float) -> None:
    left_s = max(0.0, deadline - asyncio.get_running_loop().time())
    # SQLite's own wait ends where the deadline is: the driver's thread cannot be stopped in it.
    await driver.executescript(f"PRAGMA busy_timeout={left_s * 1000:.0f}; BEGIN IMMEDIATE")


async def _insert_all(driver: aiosqlite.Connection, rows: Sequence[EncodedRow]) -> list[RowResult]:
    cursor = await driver.executemany(_SQLITE_INSERT, [_sqlite_values(row) for row in rows])
    if rows and cursor.rowcount != len(rows):
        raise EventDroppedError
    return [WriteOutcome.STORED] * len(rows)


async def _insert_unknown(driver: aiosqlite.Connection, rows: Sequence[EncodedRow]) -> list[RowResult]:
    async def insert(rows: list[EncodedRow]) -> dict[_Key, str | None]:
        # Nobody writes between the read and the insert: the transaction holds the database's one write lock.
        found = await driver.execute_fetchall(_SQLITE_KNOWN, [json.dumps([key_of(row) for row in rows])])
        known = {(request_id, org_id): mark for request_id, org_id, mark in found}
        await _insert_all(driver, [row for row in rows if key_of(row) not in known])
        return known

    return await _insert_free(rows, insert)


class PostgresBackend:
    """COPY on two separate connections, outside the pool; a single row by INSERT.

    COPY cannot skip a conflict, so if a key is taken the batch is sent again as one INSERT ... ON CONFLICT. The same is
    done if a trigger drops some of its rows, to learn which.
    """

    # Measured: with a third one nothing is won, as Python and the server are both at work with two.
    places = 2

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = read_committed(engine)
        self._pool = AsyncpgPool(engine, size=self.places, check=require_next_id)
        self._under_way: dict[asyncio.Future[None], frozenset[_Key]] = {}

    async def store(self, rows: Sequence[EncodedRow]) -> list[RowResult]:
        """Commit `rows`, or raise within five seconds. A connection that died idle is replaced.

        If the answer to a commit was lost, the second attempt finds the same events stored: DUPLICATE.
        """
        deadline = asyncio.get_running_loop().time() + _TIMEOUT_S
        async with self._apart(rows, deadline):
            return await self._store_until(deadline, rows)

    @asynccontextmanager
    async def _apart(self, rows: Sequence[EncodedRow], deadline: float) -> AsyncIterator[None]:
        """Wait for the batches under way that share a key with this one.

        Two transactions that insert the same keys in different orders would wait for each other.
        """
        keys, done = frozenset(map(key_of, rows)), asyncio.get_running_loop().create_future()
        async with asyncio.timeout_at(deadline):
            while others := [other for other, its_keys in self._under_way.items() if not keys.isdisjoint(its_keys)]:
                await asyncio.wait(others)
        self._under_way[done] = keys
        try:
            yield
        finally:
            del self._under_way[done]
            done.set_result(None)

    @retry_conflicts
    async def _store_until(self, deadline: float, rows: Sequence[EncodedRow]) -> list[RowResult]:
        loop = asyncio.get_running_loop()
        while self._pool.has_idle:
            try:
                return await self._store(rows, deadline - loop.time())
            except _CONNECTION_LOST:
                if loop.time() >= deadline:
                    raise
        return await self._store(rows, deadline - loop.time())

    async def probe(self) -> str:
        """Have the connection answer within a second."""
        async with self._pool.connection(_PROBE_TIMEOUT_S) as driver:
            return known(await driver.fetchval(str(IDENTITY)))

    async def _store(self, rows: Sequence[EncodedRow], timeout_s: float) -> list[RowResult]:
        async with self._pool.connection(timeout_s) as driver:
            return await self._copy(driver, rows)

    async def _copy(self, driver: asyncpg.Connection, rows: Sequence[EncodedRow]) -> list[RowResult]:
        is_copied = False
        try:
            if len(rows) == 1:
                # An INSERT takes fewer round trips than a COPY.
                if await driver.execute(_INSERT_ONE, *rows[0]) == "INSERT 0 1":
                    return [WriteOutcome.STORED]
            else:
                copied = await driver.copy_records_to_table(table.name, records=rows, columns=COLUMNS)
                if copied == f"COPY {len(rows)}":
                    return [WriteOutcome.STORED] * len(rows)
                is_copied = True
        except asyncpg.FeatureNotSupportedError:
            # No COPY goes into a table with policies of row-level security.
            pass
        except Exception as exc:
            if is_outage(exc):
                raise
        results = await self._insert(driver, rows)
        # The rows that were not dropped are stored by the COPY.
        found = WriteOutcome.STORED if is_copied else WriteOutcome.DUPLICATE
        return [found if result is WriteOutcome.DUPLICATE else result for result in results]

    async def _insert(self, driver: asyncpg.Connection, rows: Sequence[EncodedRow]) -> list[RowResult]:
        try:
            return await _insert_on_conflict(driver, rows)
        except Exception as exc:
            if is_outage(exc):
                raise
        return await _store_each(self._engine, rows)

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()


@retry_conflicts
async def _store_each(engine: AsyncEngine, rows: Sequence[EncodedRow]) -> list[RowResult]:
    """Commit `rows` by one INSERT each, together; if one is refused, each on its own."""
    try:
        async with engine.begin() as connection:
            return [await insert_event(connection, row) for row in rows]
    except Exception as exc:
        if is_outage(exc):
            raise
        if len(rows) == 1:
            return [exc]
    return [(await _store_each(engine, [row]))[0] for row in rows]


async def _insert_on_conflict(driver: asyncpg.Connection, rows: Sequence[EncodedRow]) -> list[RowResult]:
    async def insert(rows: list[EncodedRow]) -> dict[_Key, str | None]:
        known: dict[_Key, str | None] = {}
        # Twice: a row whose key was taken may have been deleted before it was looked for.
        for _ in range(2):
            stored = {tuple(found) for found in await driver.fetch(_INSERT_MANY, *zip(*rows, strict=True))}
            rows = [row for row in rows if key_of(row) not in stored]
            if rows:
                found = await driver.fetch(_KNOWN, *zip(*map(key_of, rows), strict=True))
                known |= {(request_id, org_id): mark for request_id, org_id, mark in found}
                rows = [row for row in rows if key_of(row) not in known]
            if not rows:
                return known
        return known | dict.fromkeys(map(key_of, rows), _DROPPED)

    return await _insert_free(rows, insert)


def _sqlite_values(row: EncodedRow) -> tuple[Any, ...]:
    values = list(row)
    stamp: datetime = values[_TIMESTAMP]
    # The texts that SQLAlchemy's own types write, so that all rows compare and read back alike.
    values[_TIMESTAMP] = stamp.replace(tzinfo=None).isoformat(" ", "microseconds")
    values[_APPROVAL_ID] = values[_APPROVAL_ID] and values[_APPROVAL_ID].replace("-", "")
    return tuple(values)


# No hash: under this id an event was erased, so what arrives later is kept blanked.
_ERASED = "erased"
# Neither inserted nor there.
_DROPPED = "dropped"
_MARK_SQL = f"CASE WHEN {IS_ERASED} THEN '{_ERASED}' ELSE content_hash || COALESCE(':' || trace_id, '') END"
_STORED_MARK = literal_column(_MARK_SQL, Text())
_TIMESTAMP, _APPROVAL_ID = map(COLUMNS.index, ("timestamp", "approval_id"))
_NAMES = ", ".join(COLUMNS)
_SQLITE_INSERT = f"INSERT INTO {table.name} ({_NAMES}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608
# SQLite never reorders a CROSS JOIN: it looks each key up in the index, and does not read the whole table.
_SQLITE_KNOWN = (
    f"SELECT request_id, org_id, {_MARK_SQL} FROM json_each(?) AS key CROSS JOIN {table.name} "  # noqa: S608
    "ON request_id = json_extract(key.value, '$[0]') AND org_id = json_extract(key.value, '$[1]')"
)
_TYPES = [table.c[name].type.compile(postgresql.dialect()) for name in COLUMNS]  # type: ignore[no-untyped-call]
_ON_CONFLICT = f"ON CONFLICT ({', '.join(_KEY)}) DO NOTHING"
_INSERT_ONE = (
    f"INSERT INTO {table.name} ({_NAMES}) "  # noqa: S608
    f"VALUES ({', '.join(f'${number}' for number in range(1, len(COLUMNS) + 1))}) {_ON_CONFLICT}"
)
_INSERT_MANY = (
    f"INSERT INTO {table.name} ({_NAMES}) "  # noqa: S608
    f"SELECT * FROM unnest({', '.join(f'${number}::{kind}[]' for number, kind in enumerate(_TYPES, 1))}) "
    f"{_ON_CONFLICT} RETURNING request_id, org_id"
)
_KNOWN = (
    f"SELECT request_id, org_id, {_MARK_SQL} FROM {table.name} "  # noqa: S608
    "WHERE (request_id, org_id) IN (SELECT * FROM unnest($1::text[], $2::text[]))"
)
