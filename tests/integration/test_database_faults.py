"""Faults of a database become our errors, in a sentence that says what to do."""

from __future__ import annotations

import asyncio
import sqlite3
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import asyncpg
import database_helpers
import pytest
import uvloop
from database_helpers import opened, write
from sqlalchemy import text

import servers
from agent_gateway_store import GatewayStore, errors
from agent_gateway_store.storage import database as database_module
from agent_gateway_store.storage.errors import translate_errors
from builders import make_request
from proofs.harness import execute

PASSWORD = "s3cr3t-word"

url = database_helpers.url


async def failing(url: str, *statements: str) -> BaseException:
    """The error that `statements` end in, and check that it is one sentence without a password."""
    database = opened(url)
    with pytest.raises(errors.GatewayStoreError) as caught:
        await write(database, *(statements or ["SELECT 1"]))
    await database.close()
    assert "\n" not in str(caught.value)
    assert PASSWORD not in f"{caught.value}{caught.value!r}"
    assert caught.value.__cause__ is not None
    return caught.value


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_refused_port_is_an_outage(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        error = runner.run(failing(f"postgresql://user:{PASSWORD}@127.0.0.1:1/db"))

    assert type(error) is errors.StoreUnavailableError
    assert "check that it runs" in str(error)


async def test_a_missing_table_or_column_asks_for_a_migration(url: str) -> None:
    for statements in (["SELECT n FROM absent"], ["CREATE TABLE t (n INTEGER)", "SELECT m FROM t"]):
        error = await failing(url, *statements)

        assert isinstance(error, errors.SchemaOutOfDateError)
        assert "gateway-store db upgrade" in str(error)


async def test_what_exists_already_is_named(url: str) -> None:
    postgres = ["ALTER TABLE t ADD CONSTRAINT c CHECK (n > 0)"] * (not url.startswith("sqlite"))
    statements = ["CREATE TABLE t (n INTEGER)", "CREATE INDEX i ON t (n)", "ALTER TABLE t ADD m INTEGER", *postgres]
    said = [str(await failing(url, *statements[: count + 1], each)) for count, each in enumerate(statements)]

    assert all(" exists already: rename it if another application made it" in each for each in said), said
    assert "table t exists" in said[0] or 'relation "t" exists' in said[0]


async def test_a_transaction_that_the_server_ended_as_idle_says_so(postgres_database: Callable[[], str]) -> None:
    """Where the event loop was kept busy meanwhile; else only that the connection is closed."""
    url = postgres_database()
    gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE state = 'idle in transaction'"

    async def ended() -> None:
        async with servers.connected(url) as watcher:
            while not await watcher.fetchval(f"{gone} AND datname = current_database()"):
                await asyncio.sleep(0.01)

    async def idle() -> None:
        async with database.write() as connection:
            await connection.execute(text("SET idle_in_transaction_session_timeout = 50"))
            servers.run(ended())
            await connection.execute(text("SELECT 1"))

    database = opened(url)
    with pytest.raises(errors.StoreUnavailableError, match="idle_in_transaction_session_timeout ended it: raise it"):
        await idle()
    await database.close()


async def test_a_connection_that_the_server_ended_is_named(postgres_database: Callable[[], str]) -> None:
    """Whatever the driver calls it: no pooler, and no wrong URL, is to blame. A pooler is where it is."""
    url = postgres_database()

    async def end(*drivers: Any) -> None:
        async with servers.connected(url) as other:
            for driver in drivers:
                await other.execute("SELECT pg_terminate_backend($1)", driver.get_server_pid())
        while not all(driver.is_closed() for driver in drivers):
            await asyncio.sleep(0.01)

    async def between_statements() -> None:
        async with database.write() as connection:
            await connection.execute(text("SELECT 1"))
            await end((await connection.get_raw_connection()).driver_connection)
            await connection.execute(text("SELECT 1"))

    async def raw(access: Any, sql: str | None) -> None:
        async with database.connection(access) as connection:
            await end(connection.driver)  # type: ignore[union-attr]
            if sql is not None:
                await connection.driver.fetch(sql)  # type: ignore[union-attr]

    async def itself() -> None:
        async with database.connection("read") as connection:
            await connection.driver.fetch("SELECT pg_terminate_backend(pg_backend_pid())")  # type: ignore[union-attr]

    async def failing_with(error: Exception) -> None:
        with translate_errors("be read"):
            raise error

    database = opened(url)
    lost, pooler = "the server ended the connection: try again", "add pgbouncer=true"
    for use, said in (
        (between_statements(), lost),
        (raw("read", "SELECT 1"), lost),
        (raw("transaction", None), lost),
        (itself(), lost),
        (write(database, "SELECT pg_terminate_backend(pg_backend_pid())"), lost),
        (failing_with(asyncpg.InternalClientError("got result for unknown protocol state 3")), lost),
        (failing_with(asyncpg.InvalidCachedStatementError("the plan is invalid")), "changed meanwhile: try again"),
        (write(database, "DEALLOCATE none"), pooler),
        (write(database, "PREPARE one AS SELECT 1", "PREPARE one AS SELECT 1"), pooler),
    ):
        with pytest.raises(errors.StoreUnavailableError, match=said) as caught:
            await use
        assert ("pgbouncer" in str(caught.value)) == (said == pooler)
    await database.close()


def test_a_rollback_that_meets_the_end_of_a_copy_is_an_outage() -> None:
    """The server has said that it ends the connection, and the socket is still open: nobody shares the session."""
    error = asyncpg.InterfaceError("cannot perform operation: another operation is in progress")
    error.__context__ = asyncpg.AdminShutdownError("terminating connection due to administrator command")
    with (
        pytest.raises(errors.StoreUnavailableError, match="the server ended the connection"),
        translate_errors("be read"),
    ):
        raise error


@pytest.mark.parametrize("busy", ["the row's lock is held", "every connection is lent"])
async def test_a_lent_connection_that_is_not_answered_in_time_is_an_outage(
    postgres_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch, busy: str
) -> None:
    """Who waits for a lock, or for a connection, is told that the store is unavailable, and nothing else."""
    monkeypatch.setattr(database_module, "_COMMAND_TIMEOUT_S", 0.3)
    database = opened(postgres_database())
    async with database.write() as connection:
        await connection.execute(text("CREATE TABLE counter (n INTEGER)"))
    statement = "SELECT pg_sleep(5)" if busy.startswith("every") else "SELECT n FROM counter"

    async def use() -> None:
        async with database.connection("read") as runner:
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


async def test_a_locked_file_is_named(locked: str) -> None:
    """After the busy timeout, here a short one, the sentence says that another process holds the file."""
    database = opened(locked)
    async with database.read() as connection:
        await connection.exec_driver_sql("PRAGMA busy_timeout=50")
    with pytest.raises(errors.StoreUnavailableError, match="locked by another process"):
        await write(database, "CREATE TABLE t (n INTEGER)")
    await database.close()


async def test_a_killed_server_surfaces_only_as_unavailable() -> None:
    """In a query, in a transaction, idle in the pool or connecting: always our error; it is back when the server is."""
    with servers.PostgresServer() as server:
        database = opened(server.url)
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


async def test_what_others_forbid_in_our_tables_is_named(postgres_database: Callable[[], str]) -> None:
    """A check or a trigger of somebody else's: nothing exists already, and no value of the row is repeated."""
    url = postgres_database()
    raising = "BEGIN RAISE EXCEPTION 'no'; END"
    async with GatewayStore(url, redis_url="", auto_migrate=True) as store:
        uses: list[tuple[str, Callable[[], Awaitable[Any]]]] = [
            ("api_keys", lambda: store.keys.issue("dev-agent", role="developer", environment="dev")),
            ("approval_requests", lambda: store.approvals.issue_token(make_request())),
            ("audit_holds", lambda: store.retention.hold("case-1", reason="r", by="b")),
        ]
        for table, use in uses:
            await execute(url, f"ALTER TABLE {table} ADD COLUMN dept TEXT, ADD CHECK (dept IS NOT NULL)")
            with pytest.raises(
                errors.StoreUnavailableError, match=f"trigger on {table} that is not the store's"
            ) as caught:
                await use()
            shown = "".join(traceback.format_exception(caught.value))
            assert "Failing row" not in shown
            await execute(url, f"ALTER TABLE {table} DROP COLUMN dept")
            for body, said in ((raising, "a trigger that is not"), ("BEGIN RETURN NULL; END", "dropped the API key")):
                await execute(
                    url,
                    f"CREATE OR REPLACE FUNCTION theirs() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$",
                    f"CREATE OR REPLACE TRIGGER theirs BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION theirs()",
                )
                if body == raising or table == "api_keys":
                    with pytest.raises(errors.StoreUnavailableError, match=said):
                        await use()
            await execute(url, f"DROP TRIGGER theirs ON {table}")
            await use()
