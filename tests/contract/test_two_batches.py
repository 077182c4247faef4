"""PostgreSQL commits two batches at a time: what holds for one of them holds for both together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from contract_helpers import until
from sqlalchemy import make_url

from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings, WriteOutcome
from agent_gateway_store.audit.backends import PostgresBackend
from agent_gateway_store.errors import AuditUnavailableError
from builders import make_event
from proofs.harness import WatchedBackend, execute, spooled_ids, stored_events, stored_ids

STORED, DUPLICATE, SPOOLED = WriteOutcome.STORED, WriteOutcome.DUPLICATE, WriteOutcome.SPOOLED

# A row of the tool `slow` waits until nobody else holds the lock 1; one of `sleepy` takes a twentieth of a second.
HOLDING = """
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.tool_name = 'slow' THEN PERFORM pg_advisory_xact_lock_shared(1); END IF;
    IF NEW.tool_name = 'sleepy' THEN PERFORM pg_sleep(0.05); END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER hold BEFORE INSERT ON audit_events FOR EACH ROW EXECUTE FUNCTION hold()
"""


@pytest.fixture
async def url(migrated_postgres_database: Callable[[], str]) -> str:
    """A database of this test's own where rows can be held up."""
    url = migrated_postgres_database()
    await execute(url, HOLDING)
    return url


@pytest.fixture
async def lock(url: str) -> Any:
    """A connection that holds the rows of the tool `slow` up until it unlocks."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    await connection.execute("SELECT pg_advisory_lock(1)")
    yield connection
    await connection.close()


async def held(lock: asyncpg.Connection, count: int = 1) -> None:
    """Wait until so many rows wait for the lock."""
    # Of this database alone: tests of other workers may use the same server.
    waiting = (
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )

    async def is_held() -> bool:
        return bool(await lock.fetchval(waiting) == count)

    async with asyncio.timeout(20):
        while not await is_held():
            await asyncio.sleep(0.005)


def slow(**fields: Any) -> AuditEvent:
    return make_event(tool_name="slow", **fields)


def write(store: GatewayStore, *events: AuditEvent) -> list[asyncio.Task[WriteOutcome]]:
    """Begin to write the events as one crowd."""
    return [asyncio.create_task(store.audit.write(event)) for event in events]


async def test_one_batch_is_committed_while_the_other_one_waits(url: str, lock: asyncpg.Connection) -> None:
    """A second connection takes what comes meanwhile; a third batch waits; `flush` and `close` wait for both."""
    async with GatewayStore(url, redis_url="") as store:
        first = write(store, slow(), slow())
        await held(lock)
        assert await asyncio.gather(*write(store, make_event(), make_event())) == [STORED] * 2
        second = write(store, slow(), slow())
        await held(lock, 2)
        third = write(store, make_event())
        flush = asyncio.create_task(store.audit.flush())
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in (*first, *second, *third, flush))

        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        await lock.execute("SELECT pg_advisory_unlock(1)")
        await closing

        assert await asyncio.gather(*first, *second, *third) == [STORED] * 5
        assert flush.done()


async def test_a_follower_misses_no_batch_that_was_overtaken(url: str, lock: asyncpg.Connection) -> None:
    """The batch that began later, with higher ids, is committed and read first; the other one comes once, later."""
    async with GatewayStore(url, redis_url="") as store:
        start = await store.audit.changes()
        early = write(store, slow(request_id="early-1"), slow(request_id="early-2"))
        await held(lock)
        await asyncio.gather(*write(store, make_event(request_id="late-1"), make_event(request_id="late-2")))
        first = await store.audit.changes(start.next_cursor)
        await lock.execute("SELECT pg_advisory_unlock(1)")
        await asyncio.gather(*early)
        second = await store.audit.changes(first.next_cursor)
        third = await store.audit.changes(second.next_cursor)
        ids = {event.request_id: event.id or 0 for event in await stored_events(store)}

    pages = [[event.request_id for event in page] for page in (first, second, third)]
    assert pages == [["late-1", "late-2"], ["early-1", "early-2"], []]
    assert ids["early-1"] < ids["late-1"]


async def test_the_same_events_in_both_batches_are_stored_once(url: str) -> None:
    """In the other order, which two transactions could only answer by a deadlock: one is STORED, one DUPLICATE."""
    # Longer than a write may take: a deadlock would end in the spool.
    await execute(url, f"ALTER DATABASE {make_url(url).database} SET deadlock_timeout = '30s'")
    events = [make_event(tool_name="sleepy") for _ in range(3)]
    reused = [make_event(tool_name="sleepy", request_id="reused", latency_ms=number) for number in (1, 2)]
    async with GatewayStore(url, redis_url="") as store:
        backend = await WatchedBackend.within(store)
        backend.gate.clear()
        first = write(store, *events, reused[0])
        await until(lambda: len(backend.batches) == 1)
        second = write(store, reused[1], *reversed(events))
        await until(lambda: len(backend.batches) == 2)
        backend.gate.set()
        outcomes = [await asyncio.gather(*tasks) for tasks in (first, second)]
        labels = Counter(bool(event.risk_labels) for event in await stored_events(store))
        ids = await stored_ids(store)

    # Which of the two is first is the server's affair.
    assert sorted(Counter(each).most_common() for each in outcomes) == [
        [(DUPLICATE, 3), (STORED, 1)],
        [(STORED, 4)],
    ]
    assert (len(ids), ids.total(), labels[True]) == (5, 5, 1)


@pytest.mark.parametrize("mode", ["spool", "strict"])
async def test_one_batch_fails_and_the_other_is_stored(url: str, lock: asyncpg.Connection, mode: str) -> None:
    """What comes afterwards goes behind the rows that wait in the spool, though the other connection works."""
    settings = StoreSettings(audit_mode=mode)
    async with GatewayStore(url, redis_url="", settings=settings) as store:
        kept = write(store, slow(request_id="kept-1"), slow(request_id="kept-2"))
        await held(lock)
        # Cut off, also where it is tried again: `gone` is raised before anything is sent.
        failing = await cut_off(store, write(store, make_event(request_id="cut-1"), make_event(request_id="cut-2")))
        await lock.execute("SELECT pg_advisory_unlock(1)")
        assert await asyncio.gather(*kept) == [STORED] * 2
        if mode == "strict":
            assert [type(each) for each in failing] == [AuditUnavailableError] * 2
            assert await store.audit.write(make_event(request_id="after")) is STORED
            return
        assert failing == [SPOOLED] * 2
        assert await store.audit.write(make_event(request_id="after")) is SPOOLED
        assert spooled_ids(settings.audit_spool_path) == ["cut-1", "cut-2", "after"]
        assert await store.audit.flush() == 0
        assert await store.audit.write(make_event(request_id="last")) is STORED
        found = [event.request_id for event in await stored_events(store)]

    assert found == ["kept-1", "kept-2", "cut-1", "cut-2", "after", "last"]


async def cut_off(store: GatewayStore, tasks: list[asyncio.Task[WriteOutcome]]) -> list[Any]:
    """Have the writes meet an outage; return what comes of them."""

    async def gone(*_: object) -> Any:
        raise ConnectionResetError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PostgresBackend, "_copy", gone)
        return await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_outage_that_both_batches_meet_at_once_loses_nothing(url: str) -> None:
    async with GatewayStore(url, redis_url="") as store:
        backend = await WatchedBackend.within(store)
        backend.fault = "away"
        backend.gate.clear()
        tasks = write(store, *(make_event() for _ in range(64)))
        await until(lambda: len(backend.batches) == 2)
        backend.gate.set()
        outcomes = await asyncio.gather(*tasks)
        assert (backend.batches, Counter(outcomes)) == ([32, 32], {SPOOLED: 64})

        backend.fault = None
        assert await store.audit.flush() == 0
        assert len(await stored_ids(store)) == 64


async def test_connections_that_died_idle_are_both_replaced(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    execute_sql = asyncpg.Connection.execute
    met = list[asyncpg.Connection]()

    async def dead(self: asyncpg.Connection, sql: str, *values: Any, **options: Any) -> str:
        if sql.startswith("INSERT"):
            met.append(self)
            if len(met) <= 2:
                raise ConnectionResetError
        return await execute_sql(self, sql, *values, **options)

    async with GatewayStore(url, redis_url="") as store:
        await asyncio.gather(*write(store, *(make_event() for _ in range(64))))
        monkeypatch.setattr(asyncpg.Connection, "execute", dead)
        assert await store.audit.write(make_event()) is STORED

    assert len({*met}) == len(met) == 3


async def test_what_a_caller_writes_one_after_the_other_stays_in_order(url: str) -> None:
    async with GatewayStore(url, redis_url="") as store:
        start = await store.audit.changes()

        async def caller(name: str) -> None:
            for number in range(10):
                assert await store.audit.write(make_event(caller_id=name, latency_ms=number)) is STORED

        await asyncio.gather(*(caller(f"caller-{number}") for number in range(40)))
        by_id = await stored_events(store)
        followed = await store.audit.changes(start.next_cursor, limit=1_000)

    for events in (by_id, followed):
        found: dict[str, list[int]] = {}
        for event in events:
            found.setdefault(event.caller_id, []).append(event.latency_ms)
        assert list(found.values()) == [list(range(10))] * 40
