"""What the store needs of an engine or a session that the host hands in; anything else is refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, insert, select
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.pool import StaticPool

from agent_gateway_store.errors import SessionInUseError

READ_ONLY = "agent_gateway_store_read_only"
"""The execution option of our own that marks a transaction as reading only."""

# By dialect: the driver, and the isolation level for which our transactions are written.
_DRIVERS = {"postgresql": ("asyncpg", "READ COMMITTED"), "sqlite": ("aiosqlite", "SERIALIZABLE")}
# The options that change neither what a statement does nor where. Statements on the driver itself see no option at all.
_HARMLESS = (
    *("compiled_cache", "insertmanyvalues_page_size", "isolation_level", "logging_token", "preserve_rowcount"),
    READ_ONLY,
)
# Some statements are sent as text, in which no schema is translated; and `execute` of an async connection takes no
# server-side cursor.
_REFUSED = ("schema_translate_map", "stream_results", "yield_per")
_IN_USE = "agent_gateway_store_in_use"


def require_engine(engine: object) -> None:
    """Raise TypeError or ValueError, which says what to give in its place, unless the store can work on `engine`."""
    if not isinstance(engine, AsyncEngine):
        raise TypeError(f"engine must be an AsyncEngine (see create_async_engine), not {type(engine).__name__}.")
    bind = engine.sync_engine
    _require_driver(bind)
    if isinstance(bind.pool, StaticPool):
        raise ValueError(
            "This engine gives one connection to several tasks at once (StaticPool, SQLAlchemy's default for "
            "SQLite in memory): give the URL sqlite:// in its place."
        )
    for name, value in bind.get_execution_options().items():
        if name not in _HARMLESS and value is not None:
            raise _refused_option(name)
    level, needed = _isolation_level(bind), _DRIVERS[bind.dialect.name][1]
    if level not in (None, needed):
        raise ValueError(
            f"The store does not work at the isolation level {level} of this engine: "
            f'give engine.execution_options(isolation_level="{needed}").'
        )


def require_session(session: object, model: type, *, atomic: bool) -> None:
    """Raise as `require_engine` does for a session, as far as can be known before it is connected.

    Args:
        session: What the host handed in.
        model: The table whose rows are read or written: a session may be bound to several engines.
        atomic: Whether statements must commit together, or not at all.
    """
    if not isinstance(session, AsyncSession):
        raise TypeError(f"session must be an AsyncSession of SQLAlchemy, not {type(session).__name__}.")
    try:
        bind = session.get_bind(model, clause=select(model))
    except UnboundExecutionError:
        raise ValueError(
            f"This session has no engine for {model.__name__}: bind it to the engine of the store's database."
        ) from None
    _require_bind(bind, atomic=atomic)


@contextmanager
def sole_use(session: AsyncSession) -> Iterator[None]:
    """Use `session` alone; raise SessionInUseError where another task of the store's uses it."""
    if session.info.get(_IN_USE):
        raise SessionInUseError
    session.info[_IN_USE] = True
    try:
        yield
    finally:
        del session.info[_IN_USE]


async def session_connection(session: AsyncSession, model: type, *, writing: bool, atomic: bool) -> AsyncConnection:
    """Return the connection of the session's transaction, which begins if none is open.

    Arguments and errors are as of `require_session`; a session may read from another server than it writes to.
    """
    clause = insert(model) if writing else select(model)
    connection = await session.connection(bind_arguments={"mapper": model, "clause": clause})
    _require_bind(connection.sync_connection, atomic=atomic)
    if atomic:
        await require_transaction(connection)
    return connection


async def require_transaction(connection: AsyncConnection) -> None:
    """Raise ValueError if the driver commits each statement by itself, in whatever way it was set to do so."""
    raw = await connection.get_raw_connection()
    driver: Any = raw.driver_connection
    if connection.dialect.name == "sqlite":
        commits = driver.isolation_level is None and not driver.in_transaction
    else:
        commits = connection.dialect.detect_autocommit_setting(raw.dbapi_connection)  # type: ignore[arg-type]
    if commits:
        raise _autocommit()


def _require_driver(bind: Engine | Connection) -> None:
    name, driver = bind.dialect.name, bind.dialect.driver
    if _DRIVERS.get(name, ("",))[0] != driver:
        raise ValueError(
            f"The store does not work with the driver {driver} of this engine: make it by create_async_engine with a "
            "URL that begins with postgresql+asyncpg:// or sqlite+aiosqlite://."
        )


def _require_bind(bind: Engine | Connection | None, *, atomic: bool) -> None:
    assert bind is not None  # noqa: S101
    _require_driver(bind)
    options = bind.get_execution_options()
    for name in _REFUSED:
        if options.get(name):
            raise _refused_option(name)
    if atomic and _isolation_level(bind) == "AUTOCOMMIT":
        raise _autocommit()


def _isolation_level(bind: Engine | Connection) -> str | None:
    # What `create_engine` was given is kept nowhere else, and a connected dialect names the server's own default.
    given = bind.get_execution_options().get("isolation_level") or bind.dialect._on_connect_isolation_level
    return given and str(given).upper().replace("_", " ")


def _refused_option(name: str) -> ValueError:
    how = (
        "keep the tables in the schema that the connections' search_path names (connect_args={'server_settings': "
        "{'search_path': ...}})"
        if name == "schema_translate_map"
        else "leave it out"
    )
    return ValueError(f"The execution option {name} would not reach every statement of the store: {how}.")


def _autocommit() -> ValueError:
    return ValueError(
        "AUTOCOMMIT commits each statement by itself, so nothing could be rolled back: give a session or an engine "
        "with transactions."
    )
