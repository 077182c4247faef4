"""Engines of PostgreSQL, whose connections lead to a server that takes writes and have our settings of a session."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import asyncpg
from sqlalchemy import event
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from agent_gateway_store._concurrency import BackgroundTasks
from agent_gateway_store.storage.errors import sqlstate_of

# Chosen: TLS and a server that just starts included; asyncpg's own default is 60 seconds.
_CONNECT_TIMEOUT_S = 10.0
# Defaults of a server, database or role that would change how our SQL is read, how times and numbers become text, which
# transactions conflict, whether a commit is on disk, and whether a statement is compiled (JIT), which takes longer than
# it runs. A stronger synchronous_commit than "on" is left alone. A backend that waits for a lock, or for a standby,
# sees that we gave up only if it looks now and then (chosen: less than our shortest timeout), and those that we left
# would use up max_connections. PostgreSQL 14 and later can look, on Linux at any rate.
_SESSION = """
SET jit = off; SET default_transaction_isolation = 'read committed'; SET standard_conforming_strings = on;
SET transform_null_equals = off; SET array_nulls = on; SET quote_all_identifiers = off;
SET TimeZone = 'UTC'; SET DateStyle = 'ISO'; SET IntervalStyle = 'postgres'; SET extra_float_digits = 1;
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';
SELECT set_config('client_connection_check_interval', '2s', false)
WHERE current_setting('client_connection_check_interval', true) = '0' AND version() LIKE '%linux%'
"""

# What says that another server may do: refused, not to be reached, starting up, a standby, gone while it answered; and
# what PgBouncer says where its server is gone.
_TRY_NEXT = (
    OSError,
    asyncpg.CannotConnectNowError,
    asyncpg.PostgresConnectionError,
    asyncpg.TargetServerAttributeNotMatched,
)
# What a server must not be, for each value of `target_session_attrs` that is asked for.
_STATE = """
SELECT pg_is_in_recovery() AS "primary", current_setting('transaction_read_only') = 'on' AS "read-write"
"""
_IS_NEW = "agent_gateway_store.is_new"
_READS_ONLY = ("standby", "read-only", "prefer-standby", "any")


class Connector:
    """Connects an engine with asyncpg; for `connect_args` under the name `async_creator_fn`.

    Of several servers the one that was connected last is tried first, and each has its share of the time: a server that
    hangs does not keep the others from being tried.
    """

    def __init__(self) -> None:
        self._background = BackgroundTasks()
        self._last = 0

    async def __call__(self, **arguments: Any) -> asyncpg.Connection:
        """Return a connection; arguments as of `asyncpg.connect`, and `listen` and `ask_for`, which are ours."""
        arguments.pop("listen", None)
        connecting = self._background.start(self._connect(**arguments))
        try:
            await asyncio.wait([connecting])
        except asyncio.CancelledError:
            # asyncpg, cancelled while it connects, leaves a future whose exception nobody retrieves.
            connecting.add_done_callback(_terminate)
            raise
        return connecting.result()

    async def _connect(self, host: Any = None, port: Any = None, **arguments: Any) -> asyncpg.Connection:
        if not isinstance(host, list) or arguments.get("target_session_attrs") == "prefer-standby":
            return await _connect_one(host=host, port=port, **arguments)
        if (timeout_s := arguments.pop("timeout", None)) is not None:
            timeout_s /= len(host)
        failures: list[BaseException] = []
        for step in range(len(host)):
            index = (self._last + step) % len(host)
            try:
                connection = await _connect_one(host=host[index], port=port[index], timeout=timeout_s, **arguments)
            except _TRY_NEXT as exc:
                failures.append(exc)
            else:
                self._last = index
                return connection
        # One that did not answer in time may be the right one, and what a server said tells more than one that is away.
        telling = (TimeoutError, asyncpg.TargetServerAttributeNotMatched, BaseException)
        raise next(each for kind in telling for each in reversed(failures) if isinstance(each, kind))


async def _connect_one(*, ask_for: str | None = None, timeout: float | None = None, **arguments: Any) -> Any:
    """Return a connection to a server which says itself, where a pooler is before it, that it is what is asked for."""
    started = asyncio.get_running_loop().time()
    connection = await asyncpg.connect(timeout=timeout, **arguments)
    if ask_for is not None:
        try:
            async with asyncio.timeout_at(None if timeout is None else started + timeout):
                # In a transaction: outside, a pooler may change the server between two messages.
                await connection.execute("BEGIN")
                state = await connection.fetchrow(_STATE)
                await connection.execute("COMMIT")
            if state[ask_for]:
                raise asyncpg.TargetServerAttributeNotMatched(f"The server is not {ask_for}.")
        except BaseException:
            connection.terminate()
            raise
    return connection


def _terminate(connecting: asyncio.Task[asyncpg.Connection]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().terminate()


def is_away(driver: asyncpg.Connection, target: object = None) -> bool:
    """True if the server of this connection said that it takes no writes, while one that does is wanted.

    Args:
        driver: PostgreSQL tells it on connecting and after each change, so this asks nothing.
        target: `target_session_attrs` of the URL.
    """
    if target in _READS_ONLY:
        return False
    reported = driver.get_settings()
    return "on" in (getattr(reported, "in_hot_standby", None), getattr(reported, "default_transaction_read_only", None))


def postgres_engine(
    url: URL, connect_args: Mapping[str, Any], *, pool_size: int, command_timeout_s: float
) -> AsyncEngine:
    """Return an engine of asyncpg; arguments as `parse_database_url` and `create_engine` give them."""
    engine = create_async_engine(
        url,
        # Said in each BEGIN, so that it holds through PgBouncer as well.
        isolation_level="READ COMMITTED",
        connect_args={
            "timeout": _CONNECT_TIMEOUT_S,
            "command_timeout": command_timeout_s,
            "async_creator_fn": Connector(),
            **connect_args,
        },
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=_CONNECT_TIMEOUT_S,
        hide_parameters=True,
    )
    # Not as startup parameters, which poolers refuse; and in PgBouncer's transaction mode others would get them.
    if connect_args.get("statement_cache_size") != 0:
        event.listen(engine.sync_engine, "connect", _prepare_postgresql)
    event.listen(engine.sync_engine, "connect", _mark_new)
    event.listen(engine.sync_engine, "checkout", _ping)
    event.listen(engine.sync_engine, "handle_error", replace_useless)
    target = url.query.get("target_session_attrs")

    @event.listens_for(engine.sync_engine, "checkin")
    def replace_standby(connection: Any, record: ConnectionPoolEntry) -> None:
        if connection is not None and is_away(connection.driver_connection, target):
            record.invalidate()

    return engine


def _prepare_postgresql(connection: Any, _record: Any) -> None:
    connection.run_async(lambda driver: driver.execute(_SESSION))


def _mark_new(_connection: Any, record: ConnectionPoolEntry) -> None:
    record.info[_IS_NEW] = True


def _ping(connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
    """Have a connection replaced that died while it was idle, at the price of a round trip for each checkout.

    SQLAlchemy's own `pool_pre_ping` takes three with asyncpg, and waits a second time where the server hangs. A new
    connection is used as it is: where a pooler lets us in but has no server, the first statement says so, whereas
    SQLAlchemy would say only that it is closed.
    """
    if record.info.pop(_IS_NEW, False):
        return
    try:
        connection.run_async(lambda driver: driver.execute("SELECT", timeout=_CONNECT_TIMEOUT_S))
    except Exception as exc:
        connection.driver_connection.terminate()
        raise InvalidatePoolError from exc


def replace_useless(context: ExceptionContext) -> None:
    """Have a connection replaced whose server has become a standby or gives no answer, as for `handle_error`."""
    # read_only_sql_transaction: the pool's other connections lead there as well.
    if sqlstate_of(context.original_exception) == "25006":
        context.is_disconnect = True
    elif isinstance(context.original_exception, TimeoutError):
        # A ROLLBACK would wait for its answer as long again. To close takes two seconds at most, in which the driver
        # asks the server to stop the statement: its locks would stay otherwise.
        context.is_disconnect = True
