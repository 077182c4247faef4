"""Engines and sessions on real servers: locking, clocks, lifetimes, and errors that say what to do."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uvloop
from sqlalchemy import make_url, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker

import servers
from agent_gateway_store import clock, errors
from agent_gateway_store.storage import database as database_module
from agent_gateway_store.storage.database import Database, SessionWork, close_db, create_engine, db_now, get_db

pytestmark = pytest.mark.integration

PASSWORD = "s3cr3t-word"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    made: str = request.getfixturevalue("postgres_database")()
    return made


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """A bound database with a table `counter` that holds one row, 0; it ends with no connection checked out."""
    made = Database(create_engine(url), owned=True, url=url)
    made.bind()
    await write(
        made, "CREATE TABLE counter (id INTEGER PRIMARY KEY, n INTEGER NOT NULL)", "INSERT INTO counter VALUES (1, 0)"
    )
    yield made
    assert made.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    await made.close()


async def write(work: Database | SessionWork, *statements: str, error: Exception | None = None) -> None:
    async with work.write() as executor:
        for statement in statements:
            await executor.execute(text(statement))
        if error is not None:
            raise error


async def count(database: Database) -> int:
    async with database.read() as connection:
        return int((await connection.execute(text("SELECT n FROM counter"))).scalar_one())


async def test_sqlite_runs_as_documented(tmp_path: Path) -> None:
    """Every connection has WAL, full sync, foreign keys and a busy timeout."""
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
    """And sees what was there before."""
    async with database.write() as writer:
        await writer.execute(text("UPDATE counter SET n = 7"))
        async with asyncio.timeout(5):
            assert await count(database) == 0

    assert await count(database) == 7


async def test_a_failed_body_is_rolled_back(database: Database) -> None:
    """The error of the body passes unchanged, and nothing of it stays."""
    with pytest.raises(AttributeError):
        await write(database, "UPDATE counter SET n = 7", error=AttributeError("a bug"))

    assert await count(database) == 0


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:m?mode=memory&uri=true"])
async def test_a_database_in_memory_serves_concurrent_tasks(url: str) -> None:
    """All tasks see the one database, in turn, and it stays while the engine does."""
    database = Database(create_engine(url), owned=True)
    database.bind()
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
    """`db_now` is the server's time in UTC, moved by the test clock and by `plus`."""
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
    """It is the time of the statement, not of the transaction's start."""
    async with database.write() as connection:
        first = (await connection.execute(select(db_now()))).scalar_one()
        await asyncio.sleep(0.01)
        second = (await connection.execute(select(db_now()))).scalar_one()

    assert second > first


async def test_get_db_yields_a_session_and_closes_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was committed stays, what was not is gone, and the connection goes back."""
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


@pytest.mark.parametrize("error", [FileNotFoundError("mine"), TimeoutError("mine"), EOFError("mine"), KeyError("mine")])
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
    command = [sys.executable, "-W", "ignore", "-c", script]
    environment = {**os.environ, "DATABASE_URL": f"sqlite:///{tmp_path}/test.db"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    threads, files = map(int, ended.stdout.split())

    assert (ended.returncode, ended.stderr) == (0, "")
    assert threads <= 2
    assert files < 20
    with closing(sqlite3.connect(tmp_path / "test.db")) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (20,)


def test_a_forked_child_is_told_to_open_its_own(tmp_path: Path) -> None:
    """After a fork every use raises StoreNotOpenError, and the parent goes on."""
    script = """
import asyncio, os, sys
from agent_gateway_store.errors import StoreNotOpenError
from agent_gateway_store.storage.database import Database, create_engine

async def main():
    database = Database(create_engine("sqlite:///test.db"), owned=True)
    database.bind()
    database.check_home()
    if (child := os.fork()) == 0:
        try:
            database.check_home()
        except StoreNotOpenError as exc:
            os._exit(42 if "another process" in str(exc) else 1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    database.check_home()
    await database.close()
    sys.exit(status)

asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, timeout=30)

    assert ended.returncode == 42


async def test_another_loop_and_a_closed_store_are_told_so(tmp_path: Path) -> None:
    """Each loop opens its own; before `bind` and after `close` nothing works."""
    database = Database(create_engine(f"sqlite:///{tmp_path}/test.db"), owned=True)
    with pytest.raises(errors.StoreNotOpenError, match="not open"):
        database.check_home()
    database.bind()

    await write(database)
    with pytest.raises(errors.StoreNotOpenError, match="another event loop"):
        await asyncio.to_thread(asyncio.run, write(database))
    await database.close()
    with pytest.raises(errors.StoreNotOpenError, match="not open"):
        await write(database)


async def failing(url: str, *statements: str) -> BaseException:
    """The error that `statements` end in, and check that it is one sentence without a password."""
    database = Database(create_engine(url), owned=True)
    database.bind()
    with pytest.raises(errors.GatewayStoreError) as caught:
        await write(database, *(statements or ["SELECT 1"]))
    await database.close()
    assert "\n" not in str(caught.value)
    assert PASSWORD not in f"{caught.value}{caught.value!r}"
    assert caught.value.__cause__ is not None
    return caught.value


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_refused_port_is_an_outage(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Nobody listens there, whichever event loop says so."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        error = runner.run(failing(f"postgresql://user:{PASSWORD}@127.0.0.1:1/db"))

    assert type(error) is errors.StoreUnavailableError
    assert "check that it runs" in str(error)


async def test_an_unknown_host_is_an_outage() -> None:
    """No such name."""
    assert type(await failing(f"postgresql://user:{PASSWORD}@no-such-host.invalid/db")) is errors.StoreUnavailableError


async def test_unknown_role_and_database_are_named(postgres_database: Callable[[], str]) -> None:
    """The hint says which part of the URL to check."""
    url = make_url(postgres_database())
    shown = {"hide_password": False}
    role = await failing(url.set(username="nobody_of_that_name", password=PASSWORD).render_as_string(**shown))
    missing = await failing(url.set(database="no_such_database").render_as_string(**shown))

    assert {type(role), type(missing)} == {errors.StoreUnavailableError}
    assert "refuses the" in str(role)
    assert "does not exist" in str(missing)


async def test_a_missing_table_or_column_asks_for_a_migration(url: str) -> None:
    """The next step is `db upgrade`."""
    for statements in (["SELECT n FROM absent"], ["CREATE TABLE t (n INTEGER)", "SELECT m FROM t"]):
        error = await failing(url, *statements)

        assert isinstance(error, errors.SchemaOutOfDateError)
        assert "gateway-store db upgrade" in str(error)


async def test_a_statement_timeout_is_an_outage(postgres_database: Callable[[], str]) -> None:
    """The server's own limit counts as "cannot answer now"."""
    error = await failing(postgres_database(), "SET statement_timeout = 50", "SELECT pg_sleep(5)")

    assert type(error) is errors.StoreUnavailableError


@pytest.mark.parametrize("busy", ["the row's lock is held", "every connection is lent"])
async def test_a_lent_connection_that_is_not_answered_in_time_is_an_outage(
    postgres_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch, busy: str
) -> None:
    """Who waits for a lock, or for a connection, is told that the store is unavailable, and nothing else."""
    monkeypatch.setattr(database_module, "_COMMAND_TIMEOUT_S", 0.3)
    database = Database(create_engine(postgres_database()), owned=True)
    database.bind()
    async with database.write() as connection:
        await connection.execute(text("CREATE TABLE counter (n INTEGER)"))
    statement = "SELECT pg_sleep(5)" if busy.startswith("every") else "SELECT n FROM counter"

    async def use() -> None:
        async with database.lend("read") as runner:
            await runner.driver.fetch(statement)  # type: ignore[union-attr]

    async with database.write() as holder:
        await holder.execute(text("LOCK TABLE counter IN ACCESS EXCLUSIVE MODE"))
        told = await asyncio.gather(*(use() for _ in range(40)), return_exceptions=True)
    await database.close()

    assert {type(each) for each in told} == {errors.StoreUnavailableError}


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[str]:
    with closing(sqlite3.connect(tmp_path / "locked.db", isolation_level=None)) as holder:
        holder.execute("PRAGMA journal_mode=WAL")
        holder.execute("BEGIN IMMEDIATE")
        yield f"sqlite:///{tmp_path}/locked.db"


async def test_faults_of_a_sqlite_file_are_named(tmp_path: Path) -> None:
    """A missing folder, a file of another kind, and a read-only file."""
    (tmp_path / "text.db").write_text("this is no database, but long enough to have a header of its own" * 20)
    with closing(sqlite3.connect(tmp_path / "read.db")) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE t (n INTEGER)")
    folder = await failing(f"sqlite:///{tmp_path}/none/test.db")
    kind = await failing(f"sqlite:///{tmp_path}/text.db")
    read_only = await failing(f"sqlite:///file:{tmp_path}/read.db?mode=ro&uri=true", "INSERT INTO t VALUES (1)")

    assert {type(error) for error in (folder, kind, read_only)} == {errors.StoreUnavailableError}
    assert "folder exists" in str(folder)
    assert "not a SQLite database" in str(kind)
    assert "read-only" in str(read_only)


async def test_a_locked_file_is_named(locked: str) -> None:
    """After the busy timeout, here a short one, the sentence says that another process holds the file."""
    database = Database(create_engine(locked), owned=True)
    database.bind()
    async with database.read() as connection:
        await connection.exec_driver_sql("PRAGMA busy_timeout=50")
    with pytest.raises(errors.StoreUnavailableError, match="locked by another process"):
        await write(database, "CREATE TABLE t (n INTEGER)")
    await database.close()


async def test_integrity_errors_pass_unchanged(database: Database) -> None:
    """They are the row's fault, and the services settle them."""
    with pytest.raises(IntegrityError):
        await write(database, "INSERT INTO counter VALUES (1, 1)")


async def test_a_session_of_the_caller_is_committed_or_rolled_back(database: Database) -> None:
    """`SessionWork.write` commits what its body did, or takes it back and leaves the session usable."""
    async with database.sessions() as session:
        work = SessionWork(session)
        await write(work, "UPDATE counter SET n = 1")
        with pytest.raises(RuntimeError):
            await write(work, "UPDATE counter SET n = 2", error=RuntimeError())
        async with work.read() as executor:
            assert (await executor.execute(text("SELECT n FROM counter"))).scalar_one() == 1


async def test_a_killed_server_surfaces_only_as_unavailable() -> None:
    """In a query, in a transaction, idle in the pool or connecting: always our error; it is back when the server is."""
    with servers.PostgresServer() as server:
        database = Database(create_engine(server.url), owned=True)
        database.bind()
        inside = asyncio.Event()

        async def use(statement: str, *, wait: bool = False) -> Any:
            async with database.write() as connection:
                await connection.execute(text("SELECT 1"))
                inside.set()
                if wait:
                    await gone.wait()
                return (await connection.execute(text(statement))).scalar_one()

        gone = asyncio.Event()
        await asyncio.gather(*(use("SELECT pg_sleep(0.05)") for _ in range(5)))
        tasks = [asyncio.create_task(use("SELECT pg_sleep(60)")) for _ in range(3)]
        tasks += [asyncio.create_task(use("SELECT 2", wait=True)) for _ in range(3)]
        await inside.wait()
        await asyncio.sleep(0.3)
        await asyncio.to_thread(server.kill)
        gone.set()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        ended += await asyncio.gather(*(use("SELECT 3") for _ in range(5)), return_exceptions=True)
        await asyncio.to_thread(server.start)
        after = [await use("SELECT 4") for _ in range(3)]
        with suppress(errors.StoreUnavailableError):
            await database.close()

    assert {type(error) for error in ended} == {errors.StoreUnavailableError}
    assert after == [4, 4, 4]
