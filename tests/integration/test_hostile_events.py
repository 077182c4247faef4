"""No event escapes the audit: hostile ones, and random sequences of writes, repeats, reuses, outages and restarts."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import ClassVar

import pytest
from sqlalchemy import select

import agent_gateway_store.audit.writer as writer_module
from agent_gateway_store import AuditEvent, GatewayStore, WriteOutcome
from agent_gateway_store.audit.backends import backend_for
from agent_gateway_store.audit.document import COLUMNS
from agent_gateway_store.audit.record import REUSED_LABEL, encode_event, from_values, key_of
from builders import make_event, rehash
from proofs.harness import (
    WatchedBackend,
    eventually,
    migrated,
    spool_is_empty,
    spooled_ids,
    stored_events,
)
from proofs.hostile import Hostile
from tampering import tamper

pytestmark = pytest.mark.system

STORED, DUPLICATE, SPOOLED, LOST = WriteOutcome


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return migrated(f"sqlite:///{tmp_path}/gateway.db")
    return request.getfixturevalue("migrated_postgres_database")()


async def as_stored(store: GatewayStore) -> dict[tuple[str, str], AuditEvent]:
    """Everything in the database by its key, each compared with its own content_hash."""
    found = {(event.request_id, event.org_id): event for event in await stored_events(store)}
    assert all(event.content_hash == rehash(event) for event in found.values())
    return found


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)], ids=["short", "long"])
async def test_every_hostile_event_is_stored_as_scrubbed(url: str, count: int) -> None:
    """Single and bulk writes: all STORED, all read back with exactly the scrubbed values and a valid hash."""
    hostile, start, flagged = Hostile(seed=count), time.monotonic(), 0
    async with GatewayStore(url, redis_url="") as store:
        for first in range(0, count, 500):
            events = [hostile.event() for _ in range(first, min(first + 500, count))]
            half = len(events) // 2
            singles = Counter(await asyncio.gather(*map(store.audit.write, events[:half])))
            assert singles + await store.audit.write_many(events[half:]) == {STORED: len(events)}

            sent = {key_of(record): record for record in map(encode_event, events)}
            table = AuditEvent.__table__
            newest = select(table).order_by(table.c.id.desc()).limit(len(events))
            async with store.database.read() as connection:
                rows = (await connection.execute(newest)).mappings().all()
            for row in rows:
                read = AuditEvent.from_row(row)
                assert from_values(row) == sent.pop((read.request_id, read.org_id))
                assert read.content_hash == rehash(read)
                flagged += any(flag.reason == "UNSTORABLE" for flag in read.redaction_flags)
            assert not sent
        assert store.audit.counters.stored == count
    print(f"{count:,} hostile events (seed {count}) in {time.monotonic() - start:.1f} s, {flagged:,} with replacements")


async def test_every_hostile_event_survives_the_spool(url: str) -> None:
    """What was spooled comes to the database with exactly the values that it would have had without the detour."""
    hostile = Hostile(seed=3)
    events = [hostile.event() for _ in range(300)]
    async with GatewayStore(url, redis_url="") as store:
        backend = await WatchedBackend.within(store)
        backend.fault = "away"
        assert set(await asyncio.gather(*map(store.audit.write, events[:150]))) == {SPOOLED}
        assert await store.audit.write_many(events[150:]) == {SPOOLED: 150}
        backend.fault = None
        await eventually(lambda: spool_is_empty(store))

        found = await as_stored(store)
        table = AuditEvent.__table__
        async with store.database.read() as connection:
            rows = (await connection.execute(select(table))).mappings().all()

    assert sorted(map(from_values, rows), key=key_of) == sorted(map(encode_event, events), key=key_of)
    assert len(found) == 300


@pytest.mark.parametrize("value", [2**70, object()], ids=["too large", "no value"])
async def test_a_row_that_cannot_be_sent_costs_no_other(url: str, value: object) -> None:
    """The driver refuses it before the database does: it is no outage, and has its own result."""
    rows = [encode_event(make_event()) for _ in range(3)]
    place = COLUMNS.index("latency_ms")
    rows[1] = (*rows[1][:place], value, *rows[1][place + 1 :])
    async with GatewayStore(url, redis_url="") as store:
        backend = backend_for(store.database.engine)
        results = await backend.store(rows)
        await backend.close()

    assert [isinstance(result, Exception) for result in results] == [False, True, False]


class Walk:
    """A random walk of two stores over one database and one spool, and a model of what must be there at its end.

    The model knows only which events were written: each must be in the database once, and of those that share a
    request id one has it and the others have derived ones.
    """

    def __init__(self, url: str, spool: Path, seed: int) -> None:
        self._url = url
        self._spool = spool
        self._rng = random.Random(seed)
        self._stores: list[GatewayStore] = []
        self._backends: list[WatchedBackend] = []
        self.written: dict[int, AuditEvent] = {}
        self.by_id: defaultdict[str, set[int]] = defaultdict(set)
        self.steps: Counter[str] = Counter()
        self.outcomes: Counter[WriteOutcome] = Counter()

    async def run(self, steps: int) -> None:
        """Take so many random steps, heal everything, and compare database and model."""
        for _ in range(2):
            await self._open()
        try:
            await self._write()
            for number in range(steps):
                name = self._rng.choices(list(self._RULES), list(self._RULES.values()))[0]
                self.steps[name] += 1
                await getattr(self, f"_{name}")()
                if number % 10 == 9:
                    await self._check(complete=False)
            for backend in self._backends:
                backend.fault = None
            for store in self._stores:
                await eventually(lambda store=store: spool_is_empty(store))
            await self._check(complete=True)
        finally:
            for store in self._stores:
                await store.close()

    _RULES: ClassVar = {
        "write": 8,
        "repeat": 4,
        "reuse": 4,
        "mixture": 4,
        "fail": 4,
        "heal": 4,
        "flush": 2,
        "restart": 1,
    }

    async def _open(self) -> None:
        store = GatewayStore(self._url, redis_url="")
        self._stores.append(store)
        self._backends.append(await WatchedBackend.within(store))

    def _new(self, request_id: str | None = None) -> AuditEvent:
        number = len(self.written)
        event = make_event(request_id=request_id or f"id {number}", latency_ms=number)
        self.written[number] = event
        self.by_id[event.request_id].add(number)
        return event

    def _old(self) -> AuditEvent:
        return self._rng.choice(list(self.written.values()))

    async def _send(self, events: list[AuditEvent]) -> None:
        store = self._rng.choice(self._stores)
        if self._rng.random() < 0.3:
            outcomes = await store.audit.write_many(events)
        else:
            outcomes = Counter(await asyncio.gather(*map(store.audit.write, events)))
        assert LOST not in outcomes
        assert outcomes.total() == len(events)
        self.outcomes += outcomes

    async def _write(self) -> None:
        await self._send([self._new() for _ in range(self._rng.choice((1, 1, 5, 30)))])

    async def _repeat(self) -> None:
        await self._send([self._old() for _ in range(self._rng.choice((1, 3)))])

    async def _reuse(self) -> None:
        await self._send([self._new(self._old().request_id) for _ in range(self._rng.choice((1, 3)))])

    async def _mixture(self) -> None:
        makers = (self._new, self._old, lambda: self._new(self._old().request_id))
        await self._send([self._rng.choice(makers)() for _ in range(20)])

    async def _fail(self) -> None:
        self._rng.choice(self._backends).fault = self._rng.choice(("away", "cut off"))

    async def _heal(self) -> None:
        for backend in self._backends:
            backend.fault = None
        await asyncio.sleep(self._rng.choice((0, 0.03)))

    async def _flush(self) -> None:
        await self._rng.choice(self._stores).audit.flush()

    async def _restart(self) -> None:
        await self._stores.pop(0).close()
        self._backends.pop(0)
        await self._open()

    async def _check(self, *, complete: bool) -> None:
        waiting = spooled_ids(self._spool)  # first, because from there they go to the database
        found = list((await as_stored(self._stores[0])).values())
        numbers = Counter(event.latency_ms for event in found)
        assert set(numbers.values()) <= {1}
        assert spooled_ids(self._spool, poisoned=True) == []
        missing = self.written.keys() - numbers.keys()
        assert {self.written[number].request_id for number in missing} <= set(waiting)
        for event in found:
            derived = event.request_id != self.written[event.latency_ms].request_id
            assert derived == (REUSED_LABEL in event.risk_labels)
        if complete:
            assert not missing
            assert not waiting
            plain = Counter(event.request_id for event in found if REUSED_LABEL not in event.risk_labels)
            assert plain == dict.fromkeys(self.by_id, 1)


@pytest.mark.parametrize(
    ("walks", "steps"), [(3, 80), pytest.param(50, 150, marks=pytest.mark.slow)], ids=["short", "long"]
)
async def test_any_sequence_ends_with_every_event_once(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walks: int, steps: int
) -> None:
    """Random writes, repeats, reuses, outages before and after the commit, replays and restarts against a model."""
    monkeypatch.setattr(writer_module, "RETRY_AFTER_S", 0.01)
    taken, outcomes, start = Counter[str](), Counter[WriteOutcome](), time.monotonic()
    for seed in range(walks):
        walk = Walk(url, tmp_path / "spool.db", seed)
        await cleared(url)
        await walk.run(steps)
        taken += walk.steps
        outcomes += walk.outcomes
    print(f"{walks} walks (seeds 0 to {walks - 1}), {time.monotonic() - start:.1f} s: {dict(taken)}; {dict(outcomes)}")

    assert outcomes.keys() == {STORED, DUPLICATE, SPOOLED}


async def cleared(url: str) -> None:
    async with GatewayStore(url, redis_url="") as store:
        await tamper(store.database.engine, "DELETE FROM audit_events")
