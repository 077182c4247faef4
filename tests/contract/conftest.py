"""One suite over every backend: `sqlite` and `postgres`, and with Redis where a test asks for it.

PostgreSQL tests share one migrated database, emptied by DELETE before each test; SQLite tests copy a migrated file.
`AGS_TEST_DATABASE_OPTIONS` (such as `listen=false`) is added to the URL of PostgreSQL, and with `AGS_TEST_READ_ADDRESS`
(host:port of a standby) the stores read there.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
import redis.asyncio
from contract_helpers import idle
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

import servers
from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.models.tables import metadata
from agent_gateway_store.storage import migrate
from agent_gateway_store.storage.cache import create_redis
from agent_gateway_store.storage.database import create_engine
from tampering import LOCAL_OFF

EMPTIED = "; ".join(
    [
        LOCAL_OFF,
        *(f"DELETE FROM {each.name}" for each in reversed(metadata.sorted_tables) if each.name != "database_identity"),
        "UPDATE database_identity SET history_id = NULL",
    ]
)
SCHEMA = """\
SELECT string_agg(one, E'\\n' ORDER BY one) FROM (
    SELECT concat_ws(' ', oid, relname, relkind, relpersistence, relrowsecurity) FROM pg_class
    WHERE relnamespace = 'public'::regnamespace
    UNION ALL SELECT concat_ws(' ', attrelid, attname, atttypid, attnotnull) FROM pg_attribute
    WHERE attrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace)
    UNION ALL SELECT concat_ws(' ', tgrelid, tgname, tgenabled) FROM pg_trigger
    UNION ALL SELECT concat_ws(' ', ev_class, rulename) FROM pg_rewrite
    UNION ALL SELECT concat_ws(' ', oid, proname, prosrc, proconfig) FROM pg_proc
    WHERE pronamespace = 'public'::regnamespace
) AS schema (one)
"""
"""Every table, index, column, trigger, rule and function."""


@pytest.fixture(scope="session")
def sqlite_template() -> Iterator[Path]:
    """A migrated, empty SQLite file to copy."""
    with tempfile.TemporaryDirectory(prefix="ags-sqlite-") as folder:
        path = Path(folder) / "template.db"
        servers.run(_migrate(f"sqlite:///{path}"))
        yield path


@pytest.fixture(scope="session")
def contract_postgres(postgres_url: str) -> Iterator[str]:
    """A migrated PostgreSQL database that the whole session shares."""
    name = f"contract_{uuid4().hex}"
    admin = make_url(postgres_url).set(drivername="postgresql")
    servers.run(_execute(admin.render_as_string(hide_password=False), f"CREATE DATABASE {name} TEMPLATE template0"))
    url = admin.set(database=name).render_as_string(hide_password=False)
    servers.run(_migrate(url))
    yield url
    servers.run(_execute(admin.render_as_string(hide_password=False), f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="session")
def run_on_postgres(contract_postgres: str) -> Iterator[Callable[[str], str | None]]:
    """Run SQL in that database, by one connection for the session: to connect costs more than most statements."""
    runner = asyncio.Runner()
    connection: asyncpg.Connection | None = None

    async def run(statements: str) -> str | None:
        nonlocal connection
        if connection is None or connection.is_closed():
            connection = await asyncpg.connect(contract_postgres, statement_cache_size=0)
        if statements.startswith("SELECT"):
            # A transaction, in which PgBouncer changes no connection.
            async with connection.transaction():
                return str(await connection.fetchval(statements))
        await connection.execute(statements)
        return None

    async def close() -> None:
        if connection is not None:
            await connection.close()

    # In a thread: the one that asks may run a loop of its own.
    with ThreadPoolExecutor(1) as pool:
        yield lambda statements: pool.submit(runner.run, run(statements)).result()
        pool.submit(runner.run, close()).result()
        pool.submit(runner.close).result()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a migrated, empty database."""
    if request.param == "sqlite":
        path = tmp_path / "gateway.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    run = request.getfixturevalue("run_on_postgres")
    run(EMPTIED)
    before = run(SCHEMA)
    yield _as_the_environment_says(request.getfixturevalue("contract_postgres"), monkeypatch)
    assert run(SCHEMA) == before, "The test changed the tables that all tests share: use own_database_url."


@pytest.fixture
def empty_database(request: pytest.FixtureRequest, database_url: str) -> Callable[[], None]:
    """Empty the database when called, for a test that needs many of them."""
    if make_url(database_url).get_backend_name() == "sqlite":
        template = request.getfixturevalue("sqlite_template")
        return lambda: shutil.copy(template, make_url(database_url).database or "")
    run = request.getfixturevalue("run_on_postgres")
    return lambda: run(EMPTIED)


@pytest.fixture
def own_database_url(request: pytest.FixtureRequest, database_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same for a test that changes the schema: the database is its own."""
    if make_url(database_url).get_backend_name() == "sqlite":
        return database_url
    return _as_the_environment_says(request.getfixturevalue("migrated_postgres_database")(), monkeypatch)


def _as_the_environment_says(database_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL with the options for the run; the stores of the test read on its standby."""
    url = make_url(database_url)
    if address := os.environ.get("AGS_TEST_READ_ADDRESS"):
        host, _, port = address.partition(":")
        replica = url.set(host=host, port=int(port))
        monkeypatch.setenv("DATABASE_READ_URL", replica.render_as_string(hide_password=False))
    url = url.update_query_string(os.environ.get("AGS_TEST_DATABASE_OPTIONS", ""))
    return url.render_as_string(hide_password=False)


@pytest.fixture
def redis_setting(request: pytest.FixtureRequest) -> str:
    """A Redis URL where a test asks for one (`BOTH`, `WITH_REDIS`), else "" for none."""
    return request.getfixturevalue("fresh_redis_url") if getattr(request, "param", "") == "redis" else ""


@pytest.fixture
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """No installed plugin, not even the bundled ones: no statement but those of the test."""
    monkeypatch.setenv("AGENT_GATEWAY_STORE_LOAD_PLUGINS", "")


@pytest.fixture
async def client(redis_setting: str) -> AsyncIterator[redis.asyncio.Redis | None]:
    """A client of somebody else's on the store's Redis; None without."""
    if not redis_setting:
        yield None
        return
    async with create_redis(redis_setting, timeout_s=5) as connected:
        yield connected


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine of the gateway's."""
    engine = create_engine(database_url)
    yield engine
    await engine.dispose()


@pytest.fixture
async def session(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    """A session of the gateway's."""
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session


@pytest.fixture
async def store(database_url: str, redis_setting: str) -> AsyncIterator[GatewayStore]:
    """An open store; it ends with no connection checked out."""
    async with _store(database_url, redis_setting) as opened:
        yield opened
        # What runs in the background (LISTEN that connects, a late notice) may hold one for a moment.
        await idle(opened)


@pytest.fixture
async def other(store: GatewayStore, database_url: str, redis_setting: str) -> AsyncIterator[GatewayStore]:
    """A second store on the same database and Redis: what another process would be."""
    async with _store(database_url, redis_setting) as opened:
        yield opened


def _store(database_url: str, redis_url: str) -> GatewayStore:
    # On a busy machine the default of a fifth of a second would at times be a fault of Redis.
    return GatewayStore(database_url, redis_url=redis_url, settings=StoreSettings(redis_timeout_seconds=5))


async def _migrate(url: str) -> None:
    engine = create_engine(url)
    await migrate.upgrade(engine)
    await engine.dispose()


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
