"""Bulk writes, and events that are recorded in a transaction of the caller's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from contract_helpers import POSTGRES
from sqlalchemy import text

from agent_gateway_store import AuditEvent, GatewayStore, WriteOutcome
from builders import make_event
from proofs.harness import WatchedBackend, stored_events, stored_ids

STORED, DUPLICATE = WriteOutcome.STORED, WriteOutcome.DUPLICATE


class SourceFailedError(Exception):
    """What a source of events raises."""


def numbered(count: int, *, fail: bool = False) -> Iterator[AuditEvent]:
    """So many events with a number in `latency_ms`; then, perhaps, an error."""
    for number in range(count):
        yield make_event(latency_ms=number)
    if fail:
        raise SourceFailedError


async def numbered_async(count: int, *, fail: bool = False) -> AsyncIterator[AuditEvent]:
    for event in numbered(count, fail=fail):
        await asyncio.sleep(0)
        yield event


async def test_any_source_is_stored_in_its_order(store: GatewayStore) -> None:
    for source in (list(numbered(10)), numbered(2_121), numbered_async(10)):
        assert set(await store.audit.write_many(source)) == {STORED}

    assert [event.latency_ms for event in await stored_events(store)] == [*range(10), *range(2_121), *range(10)]
    assert store.audit.counters.stored == 2_141


@POSTGRES
@pytest.mark.parametrize(("make", "count"), [(numbered, 73), (numbered_async, 0), (numbered_async, 2_073)])
async def test_what_a_source_gave_before_it_raised_is_stored(store: GatewayStore, make: Any, count: int) -> None:
    source = make(count, fail=True)

    with pytest.raises(SourceFailedError):
        await store.audit.write_many(source)

    assert [event.latency_ms for event in await stored_events(store)] == list(range(count))


@POSTGRES
async def test_batches_begun_survive_a_cancelled_caller(store: GatewayStore) -> None:
    """The caller is cancelled while a batch is under way: that batch is stored whole."""
    backend = await WatchedBackend.within(store)
    backend.gate.clear()
    bulk = asyncio.create_task(store.audit.write_many(numbered(6_500)))
    while not backend.batches:
        await asyncio.sleep(0.001)

    bulk.cancel()
    await asyncio.sleep(0.01)
    backend.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await bulk

    assert len(await stored_ids(store)) == sum(backend.batches)


async def test_a_recorded_event_shares_the_fate_of_the_callers_work(own_database_url: str) -> None:
    """Of 40 transactions of the caller's half are rolled back at a random point: rows and work agree exactly."""
    rng, limit = random.Random(5), asyncio.Semaphore(10)
    plans = [rng.choice(("before", "between", "after")) if number % 2 else None for number in range(40)]
    insert = text("INSERT INTO work (name) VALUES (:name)")

    async with GatewayStore(own_database_url, redis_url="") as store:
        async with store.database.write() as connection:
            await connection.execute(text("CREATE TABLE work (name TEXT NOT NULL)"))

        async def transact(number: int, fail: str | None) -> None:
            event = make_event(request_id=f"r{number}")
            async with limit, store.database.sessions() as session, session.begin():
                if fail == "before":
                    raise SourceFailedError
                first, second = ("work", "event") if number % 4 < 2 else ("event", "work")
                for step in (first, second):
                    if step == "work":
                        await session.execute(insert, {"name": event.request_id})
                    else:
                        assert await store.audit.record(event, session=session) is STORED
                        assert await store.audit.record(event, session=session) is DUPLICATE
                    if fail == "between":
                        raise SourceFailedError
                if fail == "after":
                    raise SourceFailedError

        ended = await asyncio.gather(*(transact(*plan) for plan in enumerate(plans)), return_exceptions=True)
        async with store.database.read() as connection:
            work = set((await connection.execute(text("SELECT name FROM work"))).scalars())
        events = await stored_ids(store)

    committed = {f"r{number}" for number, fail in enumerate(plans) if fail is None}
    assert [type(result) for result in ended] == [SourceFailedError if fail else type(None) for fail in plans]
    assert work == committed
    assert events == dict.fromkeys(committed, 1)
