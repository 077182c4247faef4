"""Group commit: what arrives during commits goes together in the next, and nothing given to it is forgotten."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from contract_helpers import POSTGRES, until
from sqlalchemy import text

import agent_gateway_store.audit.writer as writer_module
from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings, WriteOutcome
from agent_gateway_store.errors import AuditUnavailableError, StoreNotOpenError
from builders import make_event
from proofs.harness import TRIGGERS, WatchedBackend, spooled_ids, stored_events, stored_ids

STORED, DUPLICATE, SPOOLED = WriteOutcome.STORED, WriteOutcome.DUPLICATE, WriteOutcome.SPOOLED


@pytest.fixture
async def refusing_url(own_database_url: str) -> str:
    """The URL of a database of this test's own that refuses every event of the tool `poison`."""
    async with GatewayStore(own_database_url, redis_url="") as store, store.database.write() as connection:
        for statement in TRIGGERS[store.database.dialect].split("; CREATE TRIGGER"):
            whole = statement if statement.startswith("CREATE") else f"CREATE TRIGGER{statement}"
            await connection.execute(text(whole))
    return own_database_url


async def started(tasks: list[asyncio.Task[WriteOutcome]]) -> list[asyncio.Task[WriteOutcome]]:
    await asyncio.sleep(0)
    return tasks


async def begin_writes(
    store: GatewayStore, number: int, make: Callable[..., AuditEvent] = make_event
) -> list[asyncio.Task[WriteOutcome]]:
    return await started([asyncio.create_task(store.audit.write(make())) for _ in range(number)])


async def test_a_lone_write_is_committed_when_it_returns(store: GatewayStore, database_url: str) -> None:
    """Another store sees the event as soon as its writer was told STORED, and it went in a batch of its own."""
    backend, event = await WatchedBackend.within(store), make_event()

    outcome = await store.audit.write(event)
    async with GatewayStore(database_url, redis_url="") as other:
        found = await other.audit.get_by_request_id(event.request_id)

    assert outcome is STORED
    assert found is not None
    assert backend.batches == [1]
    assert store.audit.counters.stored == 1


@pytest.fixture
def unshared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no crowd shared out, so that a batch holds everything that waited."""
    monkeypatch.setattr(writer_module, "MIN_SHARE_ROWS", 10_000)


async def held_writes(store: GatewayStore, backend: WatchedBackend) -> list[asyncio.Task[WriteOutcome]]:
    """Begin a write for each batch that the backend takes at once, and hold them there."""
    backend.gate.clear()
    tasks = []
    for number in range(backend.places):
        tasks += await begin_writes(store, 1)
        await asyncio.sleep(0)
        assert backend.batches == [1] * (number + 1)
    return tasks


@pytest.mark.usefixtures("unshared")
async def test_what_arrives_during_commits_goes_together_in_the_next(store: GatewayStore) -> None:
    """The first writes start at once; those that come while they are under way form one batch, in their order."""
    backend = await WatchedBackend.within(store)
    first = await held_writes(store, backend)

    numbers = iter(range(150))
    rest = await begin_writes(store, 150, lambda: make_event(latency_ms=next(numbers), tool_name="rest"))
    assert store.audit.counters.queue_depth == len(first) + 150
    backend.gate.set()
    await asyncio.gather(*first, *rest)

    assert backend.batches == [*[1] * len(first), 150]
    stored = [event.latency_ms for event in await stored_events(store) if event.tool_name == "rest"]
    assert stored == list(range(150))


@pytest.mark.parametrize("size", [2, 31, 64])
async def test_a_crowd_is_taken_from_the_first_on(store: GatewayStore, size: int) -> None:
    """Nobody goes alone; a large crowd is shared out to the connections, of which SQLite has one."""
    backend = await WatchedBackend.within(store)

    assert await asyncio.gather(*await begin_writes(store, size)) == [STORED] * size

    assert backend.batches == ([32, 32] if size == 64 and backend.places == 2 else [size])


@POSTGRES
async def test_a_cancelled_caller_takes_no_event_with_it(store: GatewayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers cancelled at random points, also while they wait for room: everything begun is stored, once."""
    monkeypatch.setattr(writer_module, "MAX_QUEUED_ROWS", 6)
    monkeypatch.setattr(writer_module, "MAX_BATCH_ROWS", 4)
    await store.close()
    await store.open()
    rng, begun = random.Random(3), list[str]()

    async def write() -> None:
        event = make_event()
        begun.append(event.request_id)
        await store.audit.write(event)

    tasks = [asyncio.create_task(write()) for _ in range(300)]
    await asyncio.sleep(0)
    for task in rng.sample(tasks, 250):
        task.cancel()
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    await store.audit.flush()

    assert len(begun) == 300
    # How many were cancelled before their commit depends on how fast the disk is.
    assert any(task.cancelled() for task in tasks)
    assert await stored_ids(store) == dict.fromkeys(begun, 1)
    counters = store.audit.counters
    # One that was cancelled in mid-commit goes again, and may find itself there.
    assert (counters.stored + counters.duplicate, counters.queue_depth) == (300, 0)


@pytest.mark.parametrize("lone", [True, False], ids=["lone", "many"])
async def test_cancelling_every_task_loses_nothing(database_url: str, lone: bool) -> None:
    """As a signal handler may: the store's own tasks are cancelled in mid-commit, and `close` still stores it all."""
    store = await GatewayStore(database_url, redis_url="").open()
    backend = await WatchedBackend.within(store)
    backend.gate.clear()
    before = asyncio.all_tasks()
    await begin_writes(store, 1 if lone else 50)
    for _ in range(3):
        await asyncio.sleep(0)
    assert backend.batches

    for _ in range(2):
        for task in asyncio.all_tasks() - before:
            task.cancel()
        await asyncio.sleep(0)
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - before - {closing}:
        task.cancel()
    backend.gate.set()
    await asyncio.wait_for(closing, 10)

    async with GatewayStore(database_url, redis_url="") as again:
        found = await stored_ids(again)
    assert len(found) == found.total() == (1 if lone else 50)


@POSTGRES
@pytest.mark.parametrize("limit", ["rows", "bytes"])
async def test_a_full_queue_holds_writers_back(
    store: GatewayStore, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """No more than the limit is kept in memory; the others wait, and get through when there is room."""
    if limit == "rows":
        monkeypatch.setattr(writer_module, "MAX_QUEUED_ROWS", 10)
    else:
        monkeypatch.setattr(writer_module, "MAX_QUEUED_BYTES", 5 * 100_000)
        monkeypatch.setattr(writer_module, "MAX_BATCH_BYTES", 2 * 100_000)
    monkeypatch.setattr(writer_module, "MAX_BATCH_ROWS", 5)
    backend = await WatchedBackend.within(store)
    backend.gate.clear()
    big = {"llm_explanation": "x" * 60_000, "risk_labels": ["x" * 40_000]}
    tasks = await begin_writes(store, 100, lambda: make_event(**(big if limit == "bytes" else {})))
    for _ in range(5):
        await asyncio.sleep(0)

    kept = store.audit.counters.queue_depth
    backend.gate.set()
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks), 30)

    assert kept <= 10 + 5 * backend.places
    assert outcomes == [STORED] * 100
    assert max(backend.batches) <= 5


@pytest.mark.usefixtures("unshared")
@pytest.mark.parametrize("mode", ["spool", "strict"])
async def test_one_bad_row_fails_nobody_else(refusing_url: str, mode: str) -> None:
    """What a trigger refuses is set aside, or raises for its own caller; the rest of its batch is stored."""
    settings = StoreSettings(audit_mode=mode)
    async with GatewayStore(refusing_url, redis_url="", settings=settings) as store:
        backend = await WatchedBackend.within(store)
        first = await held_writes(store, backend)
        before = await begin_writes(store, 30)
        poison = await begin_writes(store, 1, lambda: make_event(tool_name="poison"))
        after = await begin_writes(store, 30)
        backend.gate.set()

        assert await asyncio.gather(*first, *before, *after) == [STORED] * (60 + backend.places)
        if mode == "strict":
            with pytest.raises(AuditUnavailableError):
                await poison[0]
        else:
            assert await poison[0] is SPOOLED
        assert backend.batches == [*[1] * backend.places, 61]
        assert await store.audit.write(make_event()) is STORED
        assert await store.audit.flush() == 0
        assert len(await stored_ids(store)) == 61 + backend.places
        if mode == "spool":
            assert len(spooled_ids(settings.audit_spool_path, poisoned=True)) == 1
            assert spooled_ids(settings.audit_spool_path) == []


@POSTGRES
async def test_flush_waits_for_what_was_written_before(store: GatewayStore) -> None:
    backend = await WatchedBackend.within(store)
    backend.gate.clear()
    tasks = await begin_writes(store, 20)
    flush = asyncio.create_task(store.audit.flush())
    for _ in range(20):  # turns enough to end, if nothing held it
        await asyncio.sleep(0)
    assert not flush.done()

    backend.gate.set()

    assert await flush == 0
    await asyncio.sleep(0)
    assert all(task.done() for task in tasks)


@POSTGRES
async def test_flush_ends_while_others_keep_writing(store: GatewayStore) -> None:
    stop = asyncio.Event()

    async def keep_writing() -> None:
        while not stop.is_set():
            await store.audit.write(make_event())

    writers = [asyncio.create_task(keep_writing()) for _ in range(8)]
    await until(lambda: store.audit.counters.stored > 8)
    try:
        assert await asyncio.wait_for(store.audit.flush(), 5) == 0
    finally:
        stop.set()
        await asyncio.gather(*writers)


async def test_close_drains(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is queued, what waits for room and the bulk batch under way are stored; later batches are told."""
    monkeypatch.setattr(writer_module, "MAX_QUEUED_ROWS", 20)
    monkeypatch.setattr(writer_module, "MAX_BATCH_ROWS", 10)
    store = await GatewayStore(database_url, redis_url="").open()
    backend = await WatchedBackend.within(store)
    backend.gate.clear()
    events = (make_event() for _ in range(4_500))
    bulk = asyncio.create_task(store.audit.write_many(events))
    while not backend.batches:
        await asyncio.sleep(0)
    tasks = await begin_writes(store, 100)
    closing = asyncio.create_task(store.close())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not closing.done()

    backend.gate.set()
    await closing

    assert await asyncio.gather(*tasks) == [STORED] * 100
    with pytest.raises(StoreNotOpenError):
        await bulk
    async with GatewayStore(database_url, redis_url="") as again:
        found = await stored_ids(again)
    assert len(found) == found.total() == 100 + sum(number for number in backend.batches if number >= 2_000)
