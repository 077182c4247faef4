"""What was acknowledged survives when the database or the writing process is killed under load, hangs or is full."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import event, make_url
from sqlalchemy.ext.asyncio import create_async_engine

import servers
from agent_gateway_store import GatewayStore, WriteOutcome
from agent_gateway_store.errors import StoreUnavailableError
from builders import make_event
from proofs.harness import (
    Load,
    Verdict,
    child,
    eventually,
    execute,
    migrated,
    spool_is_empty,
    spooled_ids,
    stored_ids,
)
from servers import PostgresServer

pytestmark = pytest.mark.system

STORED, DUPLICATE, SPOOLED, LOST = WriteOutcome
LONGEST_CALL_S = 10.0
BACK_WITHIN_S = 10.0

FORGETFUL = {
    "synchronous_commit": "off",
    "wal_writer_delay": "10s",
    "wal_writer_flush_after": "1GB",
    "wal_buffers": "64MB",
}
"""Settings under which a commit is acknowledged long before it is written."""

WRITING = """
import asyncio, os, sys
from agent_gateway_store import GatewayStore
from builders import make_event

async def main(url):
    async with GatewayStore(url, redis_url="") as store:
        async def write():
            while True:
                event = make_event()
                outcome = await store.audit.write(event)
                os.write(1, f"{event.request_id} {outcome}\\n".encode())

        os.write(1, b"open\\n")
        await asyncio.gather(*(write() for _ in range(16)))

asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A durable server of this file's own with few connections."""
    with PostgresServer(durable=True, settings={"max_connections": 20}) as started:
        yield started


@pytest.fixture
def url(server: PostgresServer) -> Iterator[str]:
    """The URL of a migrated database on it; the server runs again afterwards."""
    name = f"outage_{random.randrange(10**12)}"
    asyncio.run(execute(server.url, f"CREATE DATABASE {name} TEMPLATE template0"))
    yield migrated(make_url(server.url).set(database=name).render_as_string(hide_password=False))
    server.resume()
    with suppress(AssertionError):
        server.start()


@asynccontextmanager
async def under_load(url: str, *, writers: int = 16) -> AsyncIterator[Load]:
    """Give a store whose writers go on through the block; afterwards nothing was lost, doubled or raised."""
    async with GatewayStore(url, redis_url="") as store:
        load, stop = Load(store), asyncio.Event()

        def events() -> Iterator[object]:
            while not stop.is_set():
                yield make_event()

        running = asyncio.create_task(load.run(events(), writers=writers))
        try:
            await load.until(200)
            assert load.outcomes().keys() == {STORED}
            yield load
        finally:
            stop.set()
            await running
        await eventually(lambda: spool_is_empty(store), 30)
        assert await load.judge() == Verdict()
        assert load.outcomes().keys() <= {STORED, SPOOLED, DUPLICATE}
        assert load.slowest_s < LONGEST_CALL_S


async def spooled(load: Load) -> None:
    """Wait until writes go to the spool."""

    async def is_spooled() -> bool:
        return SPOOLED in load.outcomes()

    await eventually(is_spooled, 10)


async def back(load: Load) -> float:
    """Wait until writes go to the database again and return how many seconds that took."""

    async def is_stored() -> bool:
        return await load.write(make_event()) is STORED

    return await eventually(is_stored, 30)


async def kill_the_server(
    server: PostgresServer, url: str, *, events: int, kills: int, seed: int
) -> tuple[Verdict, Load]:
    """Kill every process of a server so many times under 64 writers, and judge what is there at the end."""
    rng = random.Random(seed)
    async with asyncio.timeout(60 + events / 500), GatewayStore(url, redis_url="") as store:
        load = Load(store)
        source = (make_event() for _ in range(events))
        running = asyncio.create_task(load.run(source))
        for number in range(1, kills + 1):
            await load.until(events * number // (kills + 1))
            await asyncio.sleep(rng.random() * 0.02)
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(rng.random() * 0.1)
            await asyncio.to_thread(server.start)
            await back(load)
        await running
        await eventually(lambda: spool_is_empty(store), 60)
        return await load.judge(), load


async def all_ids(url: str) -> list[str]:
    """Every request id in the database, read without the store."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""), ssl=False)
    try:
        return [row[0] for row in await connection.fetch("SELECT request_id FROM audit_events")]
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("events", "kills"), [(10_000, 2), pytest.param(100_000, 5, marks=pytest.mark.slow)], ids=["short", "long"]
)
async def test_a_killed_server_loses_and_doubles_nothing(
    server: PostgresServer, url: str, tmp_path: Path, events: int, kills: int
) -> None:
    """kill -9 of all of PostgreSQL under 64 writers: 0 acknowledged events lost, 0 doubled, 0 exceptions."""
    start = time.monotonic()
    verdict, load = await kill_the_server(server, url, events=events, kills=kills, seed=events)
    print(f"{kills} kills of the server in {time.monotonic() - start:.1f} s: {load}: {verdict}")

    assert verdict == Verdict()
    assert len(load.acknowledged) > events
    assert LOST not in load.outcomes()
    assert load.slowest_s < LONGEST_CALL_S
    assert spooled_ids(tmp_path / "spool.db") == []


async def test_the_proof_catches_a_server_that_forgets() -> None:
    """The same where synchronous_commit=off is left alone finds lost events, so the proof above can fail."""
    with PostgresServer(durable=True, settings=FORGETFUL) as forgetful:
        url = migrated(forgetful.url)
        await execute(url, "CHECKPOINT")  # of the tables, lest it forget those
        # Through a pooler we set nothing for the session.
        through = f"{url}?pgbouncer=true"
        verdict, load = await kill_the_server(forgetful, through, events=10_000, kills=2, seed=1)
    print(f"2 kills of a server with synchronous_commit=off: {load}: {verdict}")

    assert verdict.lost > 0
    assert verdict.errors == 0


async def test_our_connections_make_a_server_remember_that_forgets() -> None:
    """synchronous_commit=off in its settings: 0 acknowledged events lost all the same."""
    with PostgresServer(durable=True, settings=FORGETFUL) as forgetful:
        url = migrated(forgetful.url)
        verdict, load = await kill_the_server(forgetful, url, events=5_000, kills=2, seed=2)
    print(f"2 kills of a server with synchronous_commit=off: {load}: {verdict}")

    assert verdict == Verdict()


@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=pytest.mark.slow)], ids=["short", "long"])
async def test_a_killed_writer_leaves_everything_it_acknowledged(
    server: PostgresServer, url: str, tmp_path: Path, rounds: int
) -> None:
    """kill -9 of the writing process at random moments, in each second round with the database away: each event that
    it acknowledged is in the database or in the spool, once."""
    rng, acknowledged = random.Random(rounds), set[str]()
    for number in range(rounds):
        async with child(WRITING, url) as process:
            reading = asyncio.create_task(process.stdout.read())
            await asyncio.sleep(rng.random() * 0.3)
            if number % 2:
                await asyncio.to_thread(server.kill)
                await asyncio.sleep(rng.random() * 0.3)
            process.send_signal(signal.SIGKILL)
            lines = [line.split() for line in (await reading).decode().splitlines(keepends=True) if line.endswith("\n")]
            await process.wait()
        if number % 2:
            await asyncio.to_thread(server.start)
        assert {outcome for _, outcome in lines} <= {STORED, SPOOLED, DUPLICATE}
        acknowledged |= {request_id for request_id, _ in lines}
        assert acknowledged <= {*await all_ids(url), *spooled_ids(tmp_path / "spool.db")}

    async with GatewayStore(url, redis_url="") as store:
        await eventually(lambda: spool_is_empty(store), 30)
        found = await stored_ids(store)
    print(f"{rounds} kills of the writer: {len(acknowledged):,} acknowledged, {found.total():,} rows")

    assert len(acknowledged) > rounds
    assert acknowledged <= found.keys()
    assert found.total() == len(found)


async def test_a_server_that_hangs_holds_nobody_up(server: PostgresServer, url: str) -> None:
    """SIGSTOP: single, bulk and flushing callers end within their bound, writes go to the spool, and to the database
    soon after SIGCONT."""
    big = [make_event(sanitized_args={"text": "x" * 20_000}) for _ in range(1_000)]
    async with under_load(url) as load:
        server.pause()
        start = time.monotonic()
        bulk = await load.store.audit.write_many(big)
        took = time.monotonic() - start
        await spooled(load)
        waiting = await load.store.audit.flush()
        flushed = time.monotonic() - start - took
        server.resume()
        recovered = await back(load)
        load.acknowledged |= {event.request_id: SPOOLED for event in big}
    print(f"SIGSTOP: {load}; bulk {took:.2f} s, flush {flushed:.2f} s, back in the database {recovered:.2f} s later")

    assert bulk == {SPOOLED: 1_000}
    assert took < 2 * LONGEST_CALL_S
    assert waiting >= 1_000
    assert flushed < 4.5  # a probe of a second, not a commit of five
    assert recovered < BACK_WITHIN_S


@pytest.mark.parametrize("is_long", [False, True], ids=["transaction", "long read"])
async def test_a_server_that_hangs_in_a_transaction_costs_one_timeout(
    server: PostgresServer, url: str, tmp_path: Path, is_long: bool
) -> None:
    """Nobody waits for the answer to a ROLLBACK as well. The engine is the host's, whose commands may take a second."""
    engine = create_async_engine(
        make_url(url).set(drivername="postgresql+asyncpg"), connect_args={"command_timeout": 1}
    )
    async with GatewayStore(engine=engine, redis_url="") as store:
        await store.audit.write(make_event())
        await store.keys.list()

        @event.listens_for(engine.sync_engine, "before_cursor_execute")
        def stop(*_: object) -> None:
            server.pause()

        if is_long:
            event.remove(engine.sync_engine, "before_cursor_execute", stop)
            server.pause()
        start = time.monotonic()
        try:
            with pytest.raises(StoreUnavailableError):
                await (store.audit.export(tmp_path / "x.jsonl") if is_long else store.keys.list())
            took = time.monotonic() - start
        finally:
            server.resume()
    await engine.dispose()
    # The command's second, and at most two in which the driver closes the connection.
    assert took < 3.9


async def test_a_statement_that_took_too_long_is_stopped_on_the_server(url: str) -> None:
    """Otherwise it would wait on, and keep the locks that its transaction has."""
    engine = create_async_engine(
        make_url(url).set(drivername="postgresql+asyncpg"), connect_args={"command_timeout": 1}
    )
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with (
        GatewayStore(engine=engine, redis_url="") as store,
        servers.connected(url) as driver,
        driver.transaction(),
    ):
        await driver.execute("LOCK TABLE api_keys")
        with pytest.raises(StoreUnavailableError):
            await store.keys.list()
        assert await driver.fetchval(waiting) == 0
    await engine.dispose()


async def test_a_server_without_connections_is_an_outage(server: PostgresServer, url: str) -> None:
    """Somebody takes every connection: writes are spooled, and stored when there is one again."""
    taken: list[asyncpg.Connection] = []
    plain = server.url.replace("+asyncpg", "")
    async with under_load(url) as load:
        admin = await asyncpg.connect(plain, ssl=False)
        taken.append(admin)
        while SPOOLED not in load.outcomes():
            with suppress(asyncpg.TooManyConnectionsError):
                taken.append(await asyncpg.connect(plain, ssl=False))
            database = make_url(url).database
            await admin.fetch("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", database)
        for connection in taken:
            await connection.close()

        assert await back(load) < BACK_WITHIN_S


async def test_a_read_only_server_is_an_outage(server: PostgresServer, url: str) -> None:
    """After a failover to a replica, say: writes are spooled, and stored when the server takes them again."""
    database = make_url(url).database
    async with under_load(url) as load:
        await execute(server.url, f"ALTER DATABASE {database} SET default_transaction_read_only = on")
        cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
        await execute(server.url, cut)
        await spooled(load)
        await execute(server.url, f"ALTER DATABASE {database} RESET default_transaction_read_only")

        assert await back(load) < BACK_WITHIN_S


@pytest.fixture
def small_disk(server: PostgresServer) -> Iterator[Path]:
    """A folder of the server's user on a file system of 24 MiB."""
    folder = Path(tempfile.mkdtemp(prefix="ags-disk-", dir="/tmp"))
    folder.chmod(0o755)
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=777", "none", str(folder)]
    try:
        subprocess.run(mount, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        folder.rmdir()
        pytest.skip(f"cannot mount a small disk: {exc}")
    try:
        table = folder / "table"
        table.mkdir()
        shutil.chown(table, "nobody")
        yield table
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


@pytest.fixture
def small_url(server: PostgresServer, small_disk: Path) -> Iterator[str]:
    """The URL of a migrated database whose tables are on the small disk."""
    asyncio.run(execute(server.url, f"CREATE TABLESPACE small LOCATION '{small_disk}'"))
    asyncio.run(execute(server.url, "CREATE DATABASE full_disk TABLESPACE small"))
    yield migrated(make_url(server.url).set(database="full_disk").render_as_string(hide_password=False))
    asyncio.run(execute(server.url, "DROP DATABASE full_disk WITH (FORCE)"))
    asyncio.run(execute(server.url, "DROP TABLESPACE small"))


@pytest.fixture
def ballast(small_disk: Path) -> Path:
    """A file on the small disk, to be grown until nothing is left."""
    return small_disk.with_name("ballast")


def fill(ballast: Path) -> None:
    """Leave not a byte of the disk."""
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while file.write(b"x" * 4_096):
            pass


async def test_a_full_disk_is_an_outage(small_url: str, ballast: Path) -> None:
    """The table's disk is full: writes are spooled, and stored when there is room again."""
    async with under_load(small_url, writers=8) as load:
        fill(ballast)
        await spooled(load)
        assert load.store.audit.counters.lost == 0
        ballast.unlink()

        assert await back(load) < BACK_WITHIN_S


async def test_pruning_makes_room_on_a_full_disk(small_url: str, ballast: Path, tmp_path: Path) -> None:
    """With 256 KiB left the old events move to an archive elsewhere, and what was spooled meanwhile comes in."""
    async with GatewayStore(small_url, redis_url="") as store:
        long_ago = datetime(2020, 1, 1, tzinfo=UTC)
        old = [make_event(timestamp=long_ago + timedelta(seconds=number)) for number in range(6_000)]
        assert set(await store.audit.write_many(old)) == {STORED}
        await store.evidence.seal()
        fill(ballast)
        load = Load(store)
        while load.outcomes()[SPOOLED] < 20:
            await load.write(make_event())
        os.truncate(ballast, ballast.stat().st_size - 2**18)

        pruned = await store.retention.prune("365d", by="operator", archive=tmp_path / "archive")
        await execute(small_url, "VACUUM audit_events", "VACUUM audit_leaves")

        assert pruned.events >= 5_999
        await eventually(lambda: spool_is_empty(store), 30)
        assert load.acknowledged.keys() <= (await stored_ids(store)).keys()
        assert load.outcomes().keys() <= {STORED, SPOOLED}
        assert (await store.evidence.verify()).ok
