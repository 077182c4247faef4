"""Whose an engine is and when it ends: `get_db`, and processes that exit or fork."""

from __future__ import annotations

import os
import sqlite3
from contextlib import aclosing, asynccontextmanager, closing
from pathlib import Path

import asyncpg
import database_helpers
import pytest
from sqlalchemy import text
from sqlalchemy.exc import NoResultFound, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from agent_gateway_store import errors
from agent_gateway_store.storage.database import close_db, create_engine, get_db
from forks import forks

url = database_helpers.url


async def test_get_db_yields_a_session_and_closes_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    for statement, commit in (("CREATE TABLE t (n INTEGER)", True), ("INSERT INTO t VALUES (1)", False)):
        async with aclosing(get_db()) as sessions:
            session = await anext(sessions)
            await session.execute(text(statement))
            if commit:
                await session.commit()
    async for session in get_db():
        assert (await session.execute(text("SELECT count(*) FROM t"))).scalar_one() == 0
        pool = session.get_bind().pool
    assert pool.checkedout() == 0
    await close_db()
    await close_db()

    assert pool.checkedin() == 0


async def test_get_db_follows_the_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another DATABASE_URL is another engine, and the connections of the one before are closed."""
    pools = []
    for name in ("one", "two"):
        monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/{name}.db")
        async for session in get_db():
            await session.execute(text("CREATE TABLE t (n INTEGER)"))
            await session.commit()
            pools.append(session.get_bind().engine.pool)
    assert pools[0] is not pools[1]
    assert [pool.checkedin() for pool in pools] == [0, 1]
    await close_db()

    assert not [link for link in Path("/proc/self/fd").iterdir() if "two.db" in os.path.realpath(link)]


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("mine"),
        TimeoutError("mine"),
        KeyError("mine"),
        NoResultFound("mine"),
        PoolTimeoutError("mine"),
        OperationalError("mine", {}, Exception()),
        asyncpg.PostgresConnectionError("mine"),
    ],
)
async def test_errors_of_the_handler_are_not_taken_for_the_databases(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A request handler that loses a file of its own sees that, not "the database could not be used"."""
    monkeypatch.setenv("DATABASE_URL", "sqlite://")
    sessions = get_db()
    session = await anext(sessions)
    await session.execute(text("SELECT 1"))

    with pytest.raises(type(error), match="mine"):
        await sessions.athrow(error)
    await close_db()


FAULTS_OF_THE_HANDLER = {
    "no row": "SELECT 1 WHERE 1 = 2",
    "two rows": "SELECT 1 UNION SELECT 2",
    "a wrong statement": "SELEKT 1",
    "an unknown function": "SELECT no_such_function(1)",
    "a constraint": "INSERT INTO t VALUES (1), (1)",
    "a value": "SELECT CAST('x' AS INTEGER) / n FROM t",
}


@pytest.mark.parametrize("fault", FAULTS_OF_THE_HANDLER)
async def test_a_fault_of_the_handlers_statement_is_not_an_outage(
    url: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """What SQLAlchemy raises for it passes unchanged: the database answers, and no setting is wrong."""
    monkeypatch.setenv("DATABASE_URL", url)
    statement = FAULTS_OF_THE_HANDLER[fault]
    if fault == "a value" and url.startswith("sqlite"):
        statement = "SELECT abs(-9223372036854775808)"
    async with asynccontextmanager(get_db)() as session:
        await session.execute(text("CREATE TABLE t (n INTEGER PRIMARY KEY)"))
        await session.commit()
    with pytest.raises(SQLAlchemyError):
        async with asynccontextmanager(get_db)() as session:
            (await session.execute(text(statement))).scalar_one()
    await close_db()


async def test_only_its_own_database_that_is_away_is_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one that the handler uses meanwhile fails as it does elsewhere: DATABASE_URL is not its address."""
    away = "postgresql+asyncpg://user@127.0.0.1:1/db"
    other = create_async_engine(away)
    monkeypatch.setenv("DATABASE_URL", "sqlite://")

    async def handle() -> None:
        async with asynccontextmanager(get_db)() as session, AsyncSession(other) as own:
            await session.execute(text("SELECT 1"))
            await own.execute(text("SELECT 1"))

    with pytest.raises(ConnectionRefusedError):
        await handle()
    monkeypatch.setenv("DATABASE_URL", away)
    with pytest.raises(errors.StoreUnavailableError, match="check that it runs"):
        async with asynccontextmanager(get_db)() as session:
            await session.execute(text("SELECT 1"))
    await close_db()


async def test_a_missing_table_in_a_session_asks_for_a_migration(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(errors.SchemaOutOfDateError, match="db upgrade"):
        async with asynccontextmanager(get_db)() as session:
            await session.execute(text("SELECT * FROM audit_events"))
    await close_db()


@pytest.mark.system
@pytest.mark.parametrize("closing_line", ["", "await close_db()"])
def test_a_process_that_used_get_db_ends_promptly(tmp_path: Path, closing_line: str) -> None:
    """Twenty event loops one after another leave no thread, no file, and nothing that holds the process back."""
    script = f"""
import asyncio, os, threading
from sqlalchemy import text
from agent_gateway_store.storage.database import close_db, get_db

async def use():
    async for session in get_db():
        await session.execute(text("CREATE TABLE IF NOT EXISTS t (n INTEGER)"))
        await session.execute(text("INSERT INTO t VALUES (1)"))
        await session.commit()
    {closing_line}

for _ in range(20):
    asyncio.run(use())
print(threading.active_count(), len(os.listdir("/proc/self/fd")))
"""
    environment = {**os.environ, "DATABASE_URL": f"sqlite:///{tmp_path}/test.db"}
    ended = forks().run(["-W", "ignore", "-c", script], cwd=tmp_path, env=environment, timeout=120)
    threads, files = map(int, ended.stdout.split())

    assert (ended.returncode, ended.stderr) == (0, "")
    assert threads <= 2
    assert files < 20
    with closing(sqlite3.connect(tmp_path / "test.db")) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (20,)


@pytest.mark.parametrize("close", [True, False])
async def test_an_engine_is_disposed_of_where_nobody_can_wait(tmp_path: Path, close: bool) -> None:
    engine = create_engine(f"sqlite+aiosqlite:///{tmp_path / 'gateway.db'}")
    async with engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection

    engine.sync_engine.dispose(close=close)

    async with engine.connect() as connection:
        assert (await connection.exec_driver_sql("SELECT 1")).scalar() == 1
    await engine.dispose()
    assert driver is not None
    await driver.close()
