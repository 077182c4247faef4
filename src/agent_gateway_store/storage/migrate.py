"""The schema: find the scripts, read the revision of a database, bring it up to date.

Everything runs on the caller's async engine, under a running loop, from a checkout or from an installed wheel.
"""

from __future__ import annotations

import io
import logging
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.to_thread
from sqlalchemy import Connection, event, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agent_gateway_store._text import code_text
from agent_gateway_store.errors import SchemaOutOfDateError, StoreUnavailableError, UnsupportedDatabaseError
from agent_gateway_store.storage.database import read_committed, reader_of
from agent_gateway_store.storage.errors import sqlstate_of, translate_errors
from agent_gateway_store.storage.exclusive import detached, sqlite_lock
from agent_gateway_store.storage.urls import parse_database_url

if TYPE_CHECKING:
    from alembic.config import Config

T = TypeVar("T")

VERSION_TABLE = "agent_gateway_store_version"
# The letters "agsmig": advisory locks of PostgreSQL are numbers that all users of a database share.
LOCK_KEY = 0x616773_6D6967
# Chosen: longer than a migration of an empty database, shorter than a supervisor waits.
_LOCK_TIMEOUT_S = 60.0
# In each transaction of a migration, since PgBouncer would hand a setting of the session to others. No statement has a
# limit, as an index of a large table takes hours; a lock has one, because all writers queue behind who waits for it.
LIMITS = f"""
SELECT set_config(name, CASE name WHEN 'lock_timeout' THEN '{_LOCK_TIMEOUT_S:.0f}s' ELSE '0' END, true) FROM pg_settings
WHERE name IN ('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout')
"""  # noqa: S608
_POLL_S = 0.1  # chosen: short beside a migration
_INSUFFICIENT_PRIVILEGE = "42501"
_REVISION = re.compile(r'^revision = "(.+)"\ndown_revision = (?:"(.+)"|None)$', re.MULTILINE)
_alembic = threading.Lock()
_logger = logging.getLogger("agent_gateway_store.storage")


def migrations_path() -> Path:
    """Return the folder of the scripts: inside an installed wheel, else beside `src` in a checkout."""
    package = Path(str(files("agent_gateway_store")))
    for folder in (package / "migrations", package.parent.parent / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise SchemaOutOfDateError("The migration scripts are missing: reinstall agent-gateway-store.")


def _config(connection: Connection | None = None, **attributes: Any) -> Config:
    from alembic.config import Config

    config = Config(output_buffer=io.StringIO(), stdout=io.StringIO())
    # ConfigParser reads a single % as the beginning of a reference.
    config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    config.attributes.update(attributes, connection=connection)
    return config


def _revisions() -> dict[str, str | None]:
    """Return each revision of this package with the one before it.

    Read as text: Alembic takes longer to load than everything else that opening a store does.
    """
    scripts = (file.read_text(encoding="utf-8") for file in (migrations_path() / "versions").glob("*.py"))
    return {revision: before or None for script in scripts for revision, before in _REVISION.findall(script)}


def head() -> str:
    """Return the revision that this version of the package needs."""
    revisions = _revisions()
    (newest,) = revisions.keys() - revisions.values()
    return newest


async def current(engine: AsyncEngine) -> str | None:
    """Return the revision of the database, or None for one without our tables."""
    return await _read(engine, "read its schema", _revision)


async def _read(engine: AsyncEngine, doing: str, function: Callable[[Connection], T]) -> T:
    with translate_errors(doing):
        async with reader_of(engine).connect() as connection:
            return await connection.run_sync(function)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608


async def is_empty(engine: AsyncEngine) -> bool:
    """True if the database holds no table at all."""
    return not await _read(engine, "read its tables", lambda sync: inspect(sync).get_table_names())


async def check_server(engine: AsyncEngine) -> None:
    """Raise UnsupportedDatabaseError, with the command that makes a right one, unless the database can hold every text.

    A server whose commits are not on disk when it acknowledges them is named in the log.
    """

    def check(connection: Connection) -> None:
        encoding, durable, database, role = connection.execute(
            text(
                "SELECT current_setting('server_encoding'), current_setting('synchronous_commit') <> 'off', "
                "quote_ident(current_database() || '_utf8'), quote_ident(current_user)"
            )
        ).one()
        if encoding != "UTF8":
            raise UnsupportedDatabaseError(
                f"The database was created with the encoding {encoding}, which cannot hold every text: run `CREATE "
                f"DATABASE {database} ENCODING 'UTF8' LOCALE 'C' TEMPLATE template0`, and name that one in "
                "DATABASE_URL.",
                encoding=encoding,
            )
        if not durable:
            _logger.warning(
                "synchronous_commit is off, so a crash of the server may lose what it acknowledged: "
                "run `ALTER ROLE %s SET synchronous_commit = on`.",
                role,
            )

    if engine.dialect.name == "postgresql":
        await _read(engine, "be examined", check)


async def require_current(engine: AsyncEngine) -> None:
    """Raise SchemaOutOfDateError, with the step to take, unless the database is at `head()`."""
    await check_server(engine)
    if (found := await current(engine)) != head():
        raise out_of_date(found)


def out_of_date(found: str | None) -> SchemaOutOfDateError:
    """Return what to raise for a database that is at `found` (None: none of our tables), with the step to take."""
    relation, step, expected = "behind", "run `gateway-store db upgrade`", head()
    if found is not None and not is_known(found):
        relation, step = "newer than", "upgrade agent-gateway-store"
    return SchemaOutOfDateError(
        f"The database schema ({found or 'none'}) is {relation} this package ({expected}): {step}.",
        current=found,
        expected=expected,
    )


def is_known(revision: str) -> bool:
    """True if this version of the package has the scripts for `revision`: if not, the database is newer."""
    return revision in _revisions()


async def upgrade(engine: AsyncEngine, revision: str = "head") -> None:
    """Bring the database to `revision`. Any number of processes may do so at once.

    It is one transaction, unless an index is built on a large table of PostgreSQL: see `create_index`.

    Raises:
        SchemaOutOfDateError: The database is newer than this package.
        StoreUnavailableError: The database is away, another process held the lock for a minute, or our role may not
            change the schema.
        UnsupportedDatabaseError: See `check_server`.
    """
    from alembic import command

    await check_server(engine)
    found = await current(engine)
    if found is not None and not is_known(found):
        raise out_of_date(found)
    async with _alone(engine) as connection:
        await connection.run_sync(lambda sync: command.upgrade(_config(sync), revision))


async def downgrade(engine: AsyncEngine, revision: str) -> None:
    """Take the database back to `revision` (`base`: drop our tables, with what they hold)."""
    from alembic import command

    async with _alone(engine) as connection:
        await connection.run_sync(lambda sync: command.downgrade(_config(sync), revision))


@asynccontextmanager
async def _alone(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Open the connection on which this database is migrated: no other thread or process migrates it meanwhile."""
    busy = "The database could not be migrated: another process migrates it"
    with translate_errors("be migrated"):
        async with _process_lock(), sqlite_lock(engine.url, ".lock", wait_s=_LOCK_TIMEOUT_S, busy=busy):
            if engine.dialect.name != "postgresql":
                async with engine.connect() as connection:
                    yield connection
                return
            # The lock has a transaction of its own, since that of the migration ends before an index is built
            # concurrently; a transaction, because PgBouncer gives nobody a session.
            async with detached(engine) as lock, _unlimited(engine) as connection:
                _lift_limits(lock)
                await _take_advisory_lock(lock)
                await _require_create(connection)
                try:
                    yield connection
                except DBAPIError as exc:
                    if sqlstate_of(exc) != _INSUFFICIENT_PRIVILEGE:
                        raise
                    raise StoreUnavailableError(
                        "The database could not be migrated: only the owner of our tables may change them. Run "
                        "`gateway-store db upgrade` with the role that owns them in DATABASE_URL."
                    ) from exc


@asynccontextmanager
async def _unlimited(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Open a connection without limits of time, which is closed afterwards."""
    async with read_committed(engine).connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        if engine.dialect.driver == "asyncpg" and driver is not None:
            # asyncpg takes the limit of a command with each command, or when it connects; Alembic gives none.
            driver._config = driver._config._replace(command_timeout=None)
        _lift_limits(connection)
        try:
            yield connection
        finally:
            await connection.invalidate()


def _lift_limits(connection: AsyncConnection) -> None:
    event.listen(connection.sync_connection, "begin", lambda sync: sync.exec_driver_sql(LIMITS))


async def _take_advisory_lock(connection: AsyncConnection) -> None:
    # Polled: who waits in a statement keeps a snapshot, and a concurrent build of the holder would wait for its end.
    deadline = anyio.current_time() + _LOCK_TIMEOUT_S
    while not (await connection.execute(text(f"SELECT pg_try_advisory_xact_lock({LOCK_KEY})"))).scalar():
        await connection.rollback()
        if anyio.current_time() >= deadline:
            raise StoreUnavailableError(
                "The database could not be migrated: another process has been migrating it for "
                f"{_LOCK_TIMEOUT_S:.0f} seconds. Wait until that one ends, then try again."
            )
        await anyio.sleep(_POLL_S)
    # A SELECT keeps its snapshot until the next statement.
    await connection.execute(text("SET LOCAL lock_timeout = 0"))


async def _require_create(connection: AsyncConnection) -> None:
    """Raise StoreUnavailableError, with the step to take, unless our role may create tables beside those we have."""
    role, schema, may_create, found = (
        await connection.execute(
            text(
                "SELECT quote_ident(current_user), quote_ident(current_schema()), "
                "has_schema_privilege(current_schema(), 'CREATE'), "
                "(SELECT relnamespace::regnamespace::text FROM pg_catalog.pg_class WHERE oid = to_regclass(:ours))"
            ),
            {"ours": VERSION_TABLE},
        )
    ).one()
    is_current = found is not None and await connection.run_sync(_revision) == head()
    await connection.rollback()
    if schema is None:
        raise StoreUnavailableError(
            "The database could not be migrated: no schema of the role's search_path exists, or it may use none. "
            f"Run `CREATE SCHEMA AUTHORIZATION {role}`, or set search_path for the role."
        )
    if found not in (None, schema) and not is_current:
        raise StoreUnavailableError(
            f"The database could not be migrated: its tables are in the schema {found}, and new ones would come into "
            f"{schema}, which is before it in the search_path. Run `ALTER ROLE {role} SET search_path = {found}`."
        )
    if not may_create:
        raise StoreUnavailableError(
            f"The database could not be migrated: the role {role} may not create tables in the schema {schema}. "
            f"Run `GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}` as its owner."
        )


@asynccontextmanager
async def _process_lock() -> AsyncIterator[None]:
    """Let one thread or task at a time run Alembic, which keeps what it works on in module globals."""
    # Polled, as the holder may be another thread's event loop, and a blocking wait would stop this one.
    while not _alembic.acquire(blocking=False):
        await anyio.sleep(0.01)
    try:
        yield
    finally:
        _alembic.release()


async def differences(engine: AsyncEngine) -> list[str]:
    """Return how the database differs from the models, a line each; empty if it does not."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from agent_gateway_store.models.tables import metadata

    def compare(connection: Connection) -> list[str]:
        if connection.dialect.name == "postgresql":
            # SQLAlchemy reads the texts of types and expressions, which would come in quotes.
            connection.execute(text("SET LOCAL quote_all_identifiers = off"))
            # Between two statements this compares, on a busy machine for longer than a server may let a session idle.
            connection.execute(text(LIMITS))
        context = MigrationContext.configure(
            connection,
            opts={"version_table": VERSION_TABLE, "compare_type": True, "include_object": include_object},
        )
        return [_describe(difference) for difference in compare_metadata(context, metadata)]

    return await _read(engine, "be compared", compare)


def _describe(difference: Any) -> str:
    """Return one difference as Alembic gives it in a line: what to do, and to what."""
    if isinstance(difference, list):
        return "; ".join(map(_describe, difference))
    what, *parts = difference
    if what.startswith("modify_"):
        _schema, table, column, _options, found, expected = parts
        return f"{what} {table}.{column}: {code_text(found)} should be {code_text(expected)}"
    names = [part if isinstance(part, str) else getattr(part, "name", None) for part in parts]
    table = getattr(parts[-1], "table", None)
    if what.endswith(("_index", "_constraint", "_fk")) and table is not None:
        names.insert(0, table.name)
    return f"{what} {'.'.join(name for name in names if name)}"


def include_object(_object: Any, name: str | None, kind: str, reflected: bool, _compared_to: Any) -> bool:
    """Leave the host's tables alone: only a table of ours can be missing or superfluous."""
    from agent_gateway_store.models.tables import metadata

    return not (kind == "table" and reflected and name not in metadata.tables)


def sql(url: str, revision: str = "head") -> str:
    """Return the statements that bring an empty database of this kind to `revision`, without connecting."""
    from alembic import command

    parsed, _ = parse_database_url(url)
    config = _config(dialect=parsed.get_backend_name())
    command.upgrade(config, revision, sql=True)
    output: Any = config.output_buffer
    return str(output.getvalue())
