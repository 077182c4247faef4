"""Transactions on real databases: who waits for whom, what stays, and whose clock it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import database_helpers
import pytest
from database_helpers import opened, write
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker

from agent_gateway_store import AuditEvent, clock
from agent_gateway_store.storage.database import Database, SessionTransactions, create_engine
from agent_gateway_store.storage.db_clock import db_now

url = database_helpers.url


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """A bound database with a table `counter` that holds one row, 0; it ends with no connection checked out."""
    made = Database(create_engine(url), owned=True, url=url)
    made.bind_to_loop()
    await write(
        made, "CREATE TABLE counter (id INTEGER PRIMARY KEY, n INTEGER NOT NULL)", "INSERT INTO counter VALUES (1, 0)"
    )
    yield made
    assert made.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    await made.close()


async def count(database: Database) -> int:
    async with database.read() as connection:
        return int((await connection.execute(text("SELECT n FROM counter"))).scalar_one())


async def test_sqlite_runs_as_documented(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/test.db")
    async with engine.connect() as first, engine.connect() as second:
        for connection in (first, second):
            found = {
                name: (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            }
            assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10_000}
            await connection.rollback()
    await engine.dispose()


async def test_read_then_write_never_fails_under_load(tmp_path: Path) -> None:
    """Thirty sessions over two engines read, then write what they read plus one: none fails, none is lost."""
    url = f"sqlite:///{tmp_path}/test.db"
    engines = [create_engine(url), create_engine(url)]
    async with engines[0].begin() as connection:
        await connection.execute(text("CREATE TABLE counter (n INTEGER NOT NULL)"))
        await connection.execute(text("INSERT INTO counter VALUES (0)"))

    async def add_one(number: int) -> None:
        async with async_sessionmaker(engines[number % 2], expire_on_commit=False)() as session:
            n = (await session.execute(text("SELECT n FROM counter"))).scalar_one()
            await asyncio.sleep(0)
            await session.execute(text("UPDATE counter SET n = :n"), {"n": n + 1})
            await session.commit()

    await asyncio.gather(*map(add_one, range(30)))
    async with engines[0].connect() as connection:
        assert (await connection.execute(text("SELECT n FROM counter"))).scalar_one() == 30
        await connection.rollback()
    for engine in engines:
        await engine.dispose()


async def test_reading_takes_no_write_lock(database: Database) -> None:
    """While readers have read and are still in their transactions, a write goes through at once."""
    async with database.read() as first, database.read() as second:
        for reader in (first, second):
            await reader.execute(text("SELECT n FROM counter"))
        async with asyncio.timeout(5), database.write() as writer:
            await writer.execute(text("UPDATE counter SET n = 7"))

    assert await count(database) == 7


async def test_a_reader_reads_beside_an_open_write(database: Database) -> None:
    async with database.write() as writer:
        await writer.execute(text("UPDATE counter SET n = 7"))
        async with asyncio.timeout(5):
            assert await count(database) == 0

    assert await count(database) == 7


async def test_a_failed_body_is_rolled_back(database: Database) -> None:
    with pytest.raises(AttributeError):
        await write(database, "UPDATE counter SET n = 7", error=AttributeError("a bug"))

    assert await count(database) == 0


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:m?mode=memory&uri=true"])
async def test_a_database_in_memory_serves_concurrent_tasks(url: str) -> None:
    database = opened(url)
    await write(database, "CREATE TABLE counter (n INTEGER)", "INSERT INTO counter VALUES (0)")

    async def add_one() -> None:
        async with database.write() as connection:
            n = (await connection.execute(text("SELECT n FROM counter"))).scalar_one()
            await connection.execute(text("UPDATE counter SET n = :n"), {"n": n + 1})

    await asyncio.gather(*(add_one() for _ in range(20)))

    assert await count(database) == 20
    assert list(Path().iterdir()) == []
    await database.close()


async def now(database: Database, plus: timedelta = timedelta()) -> datetime:
    async with database.read() as connection:
        found = (await connection.execute(select(db_now(plus=plus)))).scalar_one()
    assert isinstance(found, datetime)
    return found


async def test_the_database_clock_is_aware_and_moves_with_ours(database: Database) -> None:
    real = datetime.now(UTC)
    found = await now(database)
    assert found.tzinfo is UTC
    assert abs(found - real) < timedelta(seconds=5)
    for days in (400, -800):
        clock.move(timedelta(days=days))
        assert abs(await now(database) - clock.utc_now()) < timedelta(seconds=5)
    clock.reset()

    assert abs(await now(database, timedelta(hours=-3)) - (real - timedelta(hours=3))) < timedelta(seconds=10)
    assert abs(await now(database, timedelta(milliseconds=86_400_500)) - real - timedelta(days=1)) < timedelta(
        seconds=5
    )


async def test_the_database_clock_goes_on_inside_a_transaction(database: Database) -> None:
    async with database.write() as connection:
        first = (await connection.execute(select(db_now()))).scalar_one()
        await asyncio.sleep(0.01)
        second = (await connection.execute(select(db_now()))).scalar_one()

    assert second > first


async def test_integrity_errors_pass_unchanged(database: Database) -> None:
    with pytest.raises(IntegrityError):
        await write(database, "INSERT INTO counter VALUES (1, 1)")


async def test_a_session_of_the_caller_is_committed_or_rolled_back(database: Database) -> None:
    """`SessionTransactions.write` commits what its body did, or takes it back and leaves the session usable."""
    async with database.sessions() as session:
        work = SessionTransactions(session, AuditEvent)
        await write(work, "UPDATE counter SET n = 1")
        with pytest.raises(RuntimeError):
            await write(work, "UPDATE counter SET n = 2", error=RuntimeError())
        async with work.read() as executor:
            assert (await executor.execute(text("SELECT n FROM counter"))).scalar_one() == 1
