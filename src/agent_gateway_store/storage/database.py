"""Engines and sessions, and what differs between SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any, Literal, Protocol, TypeAlias

from sqlalchemy import Executable, event
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.pool import Pool, QueuePool

from agent_gateway_store import telemetry
from agent_gateway_store._concurrency import Owner, loop_here, owner_here, require_native_threads, require_owner
from agent_gateway_store.errors import GatewayStoreError, StoreUnavailableError
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.storage.asyncpg_pool import AsyncpgPool, RawConnection, close_all, idle_connections
from agent_gateway_store.storage.connecting import postgres_engine, replace_useless
from agent_gateway_store.storage.errors import retry_conflicts, translate_errors
from agent_gateway_store.storage.host import (
    READ_ONLY,
    require_engine,
    require_session,
    require_transaction,
    session_connection,
    sole_use,
)
from agent_gateway_store.storage.sqlite import sqlite_engine
from agent_gateway_store.storage.urls import can_listen, parse_database_url

AnyConnection: TypeAlias = AsyncConnection | RawConnection
"""What a `Statement` runs on."""

Access: TypeAlias = Literal["read", "autocommit", "transaction"]
"""To read; to write by statements that each commit themselves; to write by several that commit together."""

# Chosen: for statements that find their rows by an index; long reads set their own.
_COMMAND_TIMEOUT_S = 30.0
# Chosen: `close` must end soon, and an ordinary transaction takes milliseconds.
_LAST_TRANSACTIONS_S = 5.0
# The largest that our own engine has: pool_size 10 and as many in overflow.
_MOST_RAW_CONNECTIONS = 20
# A standby that has applied all it received is up to date, however long ago the last commit was, unless nobody sends.
_REPLICA_AGE = """
SELECT CASE WHEN NOT pg_is_in_recovery() THEN NULL
    WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() AND EXISTS (SELECT FROM pg_stat_wal_receiver) THEN 0
    ELSE greatest(0, extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())) END
"""
# No two servers have started in the same microsecond, every role may ask, and a pooler changes nothing.
_SERVER = "SELECT pg_is_in_recovery(), pg_postmaster_start_time()"
NO_WRITES = (
    "The database takes no writes: it is a standby, or default_transaction_read_only is on. Promote it, or name the "
    "primary in DATABASE_URL."
)
"""What to say of a server that only reads."""


def dialect_of(connection: AnyConnection) -> str:
    """Return `sqlite` or `postgresql`."""
    return connection.dialect.name


def reader_of(engine: AsyncEngine) -> AsyncEngine:
    """Return `engine` with transactions that only read, which on SQLite do not wait for a writer."""
    return engine.execution_options(**{READ_ONLY: True})


def read_committed(engine: AsyncEngine) -> AsyncEngine:
    """Return `engine` with transactions that say READ COMMITTED themselves, whatever the server's default is."""
    if engine.dialect.name != "postgresql":
        return engine
    return engine.execution_options(isolation_level="READ COMMITTED")


class Transactions(Protocol):
    """Where a service gets its transactions from: a whole database, or one session of the caller's."""

    @property
    def replica(self) -> Transactions:
        """Where to read what may be a moment old, and decides nothing."""
        ...

    def check_owner(self) -> None:
        """Raise StoreNotOpenError where these transactions cannot be used."""
        ...

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open a transaction that only reads."""
        ...

    def write(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open a transaction that is committed at the end, or rolled back if its body raises."""
        ...

    def connection(self, access: Access) -> AbstractAsyncContextManager[AnyConnection]:
        """Acquire the fastest connection that a `Statement` runs on."""
        ...


def create_engine(url: str | URL, *, pool_size: int = 10, reads: bool = False) -> AsyncEngine:
    """Return an engine for `url` and `reads` (see `parse_database_url`). Nothing is connected yet.

    SQLite runs in WAL with synchronous=FULL, foreign keys and a busy timeout; its transactions begin IMMEDIATE unless
    marked as reading only, because one that reads first and then writes fails at once under load. PostgreSQL's
    transactions say READ COMMITTED, and its connections do not follow defaults of the server that would change what
    our statements mean or whether a commit is on disk.

    Raises:
        InvalidUrlError: See `parse_database_url`.
    """
    parsed, connect_args = parse_database_url(url, reads=reads)
    if parsed.get_backend_name() == "sqlite":
        return sqlite_engine(parsed, pool_size)
    return postgres_engine(parsed, connect_args, pool_size=pool_size, command_timeout_s=_COMMAND_TIMEOUT_S)


def _raw_pool_size(pool: Pool, *, owned: bool) -> int:
    """Return the most raw connections: as many as our own engine has, and no more than a host allows its own."""
    if not isinstance(pool, QueuePool) or pool.size() == 0 or pool._max_overflow < 0:
        return _MOST_RAW_CONNECTIONS
    size: int = pool.size() + pool._max_overflow
    return size if owned else min(_MOST_RAW_CONNECTIONS, size)


class Database:
    """One engine, the sessions over it, and the process and event loop it belongs to.

    Args:
        engine: An engine that stays the caller's, or one made from a URL that `close` disposes of.
        owned: Whether `close` disposes of it.
        url: Where the engine came from; None for the caller's.
        replica: Where to read what may be a moment old; it is opened and closed with this one. None: here.

    Raises:
        TypeError: `engine` is not an AsyncEngine.
        ValueError: The store cannot do all its work on this engine: the sentence says what to give in its place.
    """

    def __init__(
        self, engine: AsyncEngine, *, owned: bool, url: str | None = None, replica: Database | None = None
    ) -> None:
        require_engine(engine)
        self._read_as: str = "be read"
        if replica is not None:
            if replica.dialect != engine.dialect.name:
                raise ValueError("DATABASE_READ_URL must lead to a copy of the database, of the same kind.")
            replica._read_as = "be read at DATABASE_READ_URL"
        self._replica = replica
        self.engine = engine
        self.owned = owned
        self.url = url
        self.sessions = async_sessionmaker(engine, expire_on_commit=False)
        self._writer = read_committed(engine)
        if not owned and self._writer is not engine:
            # On a view of the host's engine, whose own uses it leaves alone.
            event.listen(self._writer.sync_engine, "handle_error", replace_useless)
        self._reader = reader_of(self._writer)
        self._owner: Owner | None = None
        self._under_way = 0
        # The generators that open streams read from. `close` ends those that are idle.
        self.streams: set[AsyncGenerator[Any, None]] = set()
        self._raw_pool: AsyncpgPool | None = None
        self._idle = idle_connections(engine) if owned and engine.dialect.driver == "asyncpg" else ()

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self.engine.dialect.name

    @property
    def can_listen(self) -> bool:
        """True if LISTEN and NOTIFY work: on PostgreSQL, unless the URL says `listen=false` or `pgbouncer=true`."""
        return self.engine.dialect.driver == "asyncpg" and can_listen(self.url or self.engine.url)

    @property
    def replica(self) -> Database:
        """Where to read what may be a moment old, and decides nothing: DATABASE_READ_URL, else this database."""
        return self._replica or self

    def bind_to_loop(self) -> None:
        """Bind to this process and event loop; from elsewhere every use raises."""
        if self._replica is not None:
            self._replica.bind_to_loop()
        self._owner = owner_here()

    @property
    def is_owner(self) -> bool:
        """True in the process and event loop that opened it."""
        return self._owner == owner_here()

    def check_owner(self) -> None:
        """Raise StoreNotOpenError outside the process and event loop that opened the store."""
        require_owner(self._owner)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that only reads."""
        with self._counted(), translate_errors(self._read_as):
            async with _measured(self._reader.connect()) as connection:
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that is committed at the end, or rolled back if its body raises."""
        with self._counted(), translate_errors("be written"):
            async with _measured(self._writer.begin()) as connection:
                if not self.owned:
                    # A host can set its driver so that only the connection itself tells.
                    await require_transaction(connection)
                yield connection

    @asynccontextmanager
    async def connection(self, access: Access) -> AsyncIterator[AnyConnection]:
        """Acquire the fastest connection that a `Statement` runs on: the driver's own on PostgreSQL.

        There the whole body must end within the timeout of one command. With "transaction" everything is committed at
        the end, or rolled back if the body raises; with "autocommit" each statement commits itself.
        """
        if self.engine.dialect.driver != "asyncpg":
            async with self.read() if access == "read" else self.write() as sql_connection:
                yield sql_connection
            return
        if self._raw_pool is None:
            self._raw_pool = AsyncpgPool(self.engine, size=_raw_pool_size(self.engine.pool, owned=self.owned))
        doing = self._read_as if access == "read" else "be written"
        with self._counted(), translate_errors(doing):
            async with self._raw_pool.connection(_COMMAND_TIMEOUT_S) as driver:
                connection = RawConnection(driver, self.engine.dialect)
                if access != "transaction":
                    yield connection
                    return
                async with connection.transaction():
                    yield connection

    @asynccontextmanager
    async def raw_connection(self) -> AsyncIterator[Any]:
        """Acquire the driver's own connection for a read that may take long.

        A PostgreSQL connection whose use raised is not used again. One of SQLite is, because a database in memory would
        end with it.
        """
        task = asyncio.current_task()
        cancelled_before = task.cancelling() if task else 0
        with self._counted(), translate_errors(self._read_as):
            async with self._reader.connect() as connection:
                try:
                    yield (await connection.get_raw_connection()).driver_connection
                except GeneratorExit:
                    # A reader that stops early: the connection is well.
                    raise
                except BaseException as exc:
                    if self.dialect != "sqlite":
                        await connection.invalidate()
                    if task and task.cancelling() > cancelled_before and isinstance(exc, Exception):
                        # When a COPY is cancelled the driver raises other errors instead.
                        raise asyncio.CancelledError from exc
                    raise

    async def ping(self) -> None:
        """Return if the database answers, and takes writes.

        Raises:
            StoreUnavailableError: It does not.
        """
        async with self.read() as connection:
            if self.dialect == "sqlite":
                await connection.exec_driver_sql("SELECT 1")
            # A standby says so, too.
            elif (await connection.exec_driver_sql("SHOW transaction_read_only")).scalar() == "on":
                raise StoreUnavailableError(NO_WRITES)

    async def replica_age_s(self) -> float | None:
        """Return how many seconds old, at most, what this server shows is; None: it is not a standby.

        Raises:
            StoreUnavailableError: It does not answer.
        """
        if self.dialect == "sqlite":
            return None
        async with self.read() as connection:
            age = (await connection.exec_driver_sql(_REPLICA_AGE)).scalar()
        return None if age is None else float(age)

    async def is_replica_apart(self) -> bool:
        """Return True if DATABASE_READ_URL leads to another server than this one that is not a standby either.

        Raises:
            StoreUnavailableError: One of the two does not answer.
        """
        if self.replica is self or self.dialect == "sqlite":
            return False
        async with self.read() as here, self.replica.read() as there:
            servers = [(await each.exec_driver_sql(_SERVER)).one() for each in (here, there)]
        return not any(each[0] for each in servers) and servers[0] != servers[1]

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.check_owner()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def close(self) -> None:
        """Refuse new uses, let those under way end, and close the connections if they are ours.

        Safe to call twice. It waits five seconds at most for those under way, on SQLite five more for statements of
        tasks that were cancelled, and ends streams that wait for their consumer.
        """
        if self._replica is not None:
            await self._replica.close()
        self._owner = None
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_TRANSACTIONS_S):
                await self._end_idle_streams()
                while self._under_way:
                    await asyncio.sleep(0.005)
                    await self._end_idle_streams()
        if self._raw_pool is not None:
            await self._raw_pool.close()
            self._raw_pool = None
        if self.owned:
            # The pool would close one after the other, and wait for each as long as for a command if the server hangs.
            await close_all(self._idle)
            await self.engine.dispose()

    async def _end_idle_streams(self) -> None:
        for batches in tuple(self.streams):
            # A generator that runs is at work for its consumer.
            if batches in self.streams and not batches.ag_running:  # type: ignore[attr-defined]  # of generators alone
                self.streams.discard(batches)
                with suppress(GatewayStoreError):
                    await batches.aclose()

    async def dispose_detached(self) -> None:
        """Close what can be closed from here of a database whose process or event loop may have ended."""
        pid, loop = self._owner or owner_here()
        self._owner = None
        # SQLite's connections have threads of their own and answer any loop; the garbage collector takes the others.
        here = loop is asyncio.get_running_loop() or (loop.is_closed() and self.dialect == "sqlite")
        await self.engine.dispose(close=here and pid == os.getpid())


@asynccontextmanager
async def _measured(acquiring: AbstractAsyncContextManager[AsyncConnection]) -> AsyncIterator[AsyncConnection]:
    async with AsyncExitStack() as stack:
        with telemetry.timed("database.pool_wait", pool="engine"):
            connection = await stack.enter_async_context(acquiring)
        yield connection


class SessionTransactions:
    """Transactions in a session that the caller owns: `write` commits it, and rolls it back on an error.

    Args:
        session: Used by one task at a time.
        model: The table whose rows are read or written: a session may be bound to several engines.
        atomic: Whether the statements of one `write` must commit together, or not at all.

    Raises:
        TypeError: `session` is not an AsyncSession.
        ValueError: The store cannot work in this session: the sentence says what to give in its place.
    """

    def __init__(self, session: AsyncSession, model: type, *, atomic: bool = False) -> None:
        require_session(session, model, atomic=atomic)
        self._session, self._model, self._atomic = session, model, atomic

    @property
    def replica(self) -> SessionTransactions:
        """This object: a session has no replica."""
        return self

    def check_owner(self) -> None:
        """Do nothing: the owner of a session knows where it can be used."""

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Read in the session's transaction, which is left as it is."""
        with translate_errors("be read", in_session=True), sole_use(self._session):
            yield await session_connection(self._session, self._model, writing=False, atomic=False)

    @asynccontextmanager
    async def connection(self, access: Access) -> AsyncIterator[AnyConnection]:
        """Give the session's connection: to read, or to write and commit it."""
        async with self.read() if access == "read" else self.write() as connection:
            yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """Write in the session's transaction and commit it."""
        with translate_errors("be written", in_session=True), sole_use(self._session):
            try:
                yield await session_connection(self._session, self._model, writing=True, atomic=self._atomic)
                await self._session.commit()
            except BaseException:
                await self._session.rollback()
                raise


@retry_conflicts
async def changed(database: Transactions, statement: Executable) -> int:
    """Run one UPDATE or DELETE, again where it meets another transaction; return how many rows there were."""
    async with database.write() as connection:
        return (await connection.execute(statement)).rowcount


_environment: dict[asyncio.AbstractEventLoop, Database] = {}


async def get_db() -> AsyncIterator[AsyncSession]:
    """Yield a session on DATABASE_URL and close it afterwards; what was not committed is rolled back.

    For FastAPI: `session: Annotated[AsyncSession, Depends(get_db)]`. The engine is made at the first call, one for
    each process and event loop; `close_db` closes it. On SQLite the session's transactions begin IMMEDIATE, so keep
    them short.

    Raises:
        StoreUnavailableError: This database is away, or does not answer in time. What else is raised while the session
            is used, also by other engines, passes unchanged.
        SchemaOutOfDateError: A table or column is missing.
        SessionInUseError: Several tasks used the session at once.
        StoreNotOpenError: No event loop of asyncio runs here, or gevent or eventlet has patched this process.
    """
    loop, url = loop_here(), StoreSettings().database_url
    database = _environment.get(loop)
    if database is None or not database.is_owner or database.url != url:
        require_native_threads()
        # Engines of closed loops, and of before a fork or a change of the URL, are closed here as nobody else does.
        past = [other for other in _environment if other is loop or other.is_closed()]
        retired = [_environment.pop(other) for other in past]
        database = _environment[loop] = Database(create_engine(url), owned=True, url=url)
        database.bind_to_loop()
        for left_behind in retired:
            await left_behind.dispose_detached()
    with translate_errors("be used", engine=database.engine):
        async with database.sessions() as session:
            yield session


async def close_db() -> None:
    """Close the connections that `get_db` opened in this event loop. For the end of a FastAPI lifespan."""
    if (database := _environment.pop(asyncio.get_running_loop(), None)) is not None:
        await database.close()
