"""A replayed request id hides nothing: the same event is stored once, another one under a used id is kept beside it."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest
from contract_helpers import WAYS, counted_statements, write_by
from sqlalchemy import text

from agent_gateway_store import AuditEvent, AuditLogger, GatewayStore, WriteOutcome
from agent_gateway_store.audit.backends import backend_for
from agent_gateway_store.audit.record import REUSED_LABEL, encode_event, hash_of, key_of, with_derived_id
from agent_gateway_store.audit.spool import Spool
from agent_gateway_store.audit.writer import AuditWriter
from builders import make_event, rehash
from proofs.harness import TRIGGERS, WatchedBackend, stored_events

STORED, DUPLICATE, SPOOLED = WriteOutcome.STORED, WriteOutcome.DUPLICATE, WriteOutcome.SPOOLED


def derived_id(event: AuditEvent) -> str:
    """The id under which an event is kept when its own is taken."""
    return key_of(with_derived_id(encode_event(event)))[0]


async def in_one_batch(store: GatewayStore, events: list[AuditEvent]) -> list[WriteOutcome]:
    """Write events as one batch; give their outcomes, in order."""
    backend = WatchedBackend(backend_for(store.database.engine))
    writer = AuditWriter(backend, Spool(Path("none.db"), store.database.engine.url))
    outcomes = await writer.write_batch([encode_event(event) for event in events])
    await writer.close()
    assert backend.batches[0] == len({event.request_id for event in events})
    return outcomes


async def test_the_same_event_in_later_batches_is_a_duplicate(store: GatewayStore) -> None:
    event = make_event()

    assert await store.audit.write(event) is STORED
    assert await store.audit.write(event.model_copy()) is DUPLICATE
    assert await in_one_batch(store, [make_event(), event, make_event()]) == [STORED, DUPLICATE, STORED]
    assert await store.audit.write_many([event, make_event(), event]) == {STORED: 1, DUPLICATE: 2}
    assert len(await stored_events(store)) == 4


async def written(store: GatewayStore, events: list[AuditEvent], together: bool) -> list[WriteOutcome]:
    return await in_one_batch(store, events) if together else [await store.audit.write(event) for event in events]


@pytest.mark.parametrize("together", [True, False], ids=["one-batch", "one-by-one"])
async def test_another_event_under_a_used_id_is_kept_beside_it(store: GatewayStore, together: bool) -> None:
    """It is STORED under an id of its own, labelled, with a hash that anyone can recompute; repeated, a DUPLICATE."""
    first = make_event(request_id="used", tool_name="read_file")
    second = make_event(request_id="used", tool_name="delete_file", risk_labels=["destructive"])
    third = make_event(request_id="used", tool_name="send_mail")
    events = [first, second, third, second, third, first]

    outcomes = await written(store, events, together)
    found = {event.tool_name: event for event in await stored_events(store) if "used" in event.request_id}

    assert outcomes == [STORED] * 3 + [DUPLICATE] * 3
    assert len(found) == 3
    assert (found["read_file"].request_id, found["read_file"].risk_labels) == ("used", [])
    assert found["delete_file"].request_id == derived_id(second) == f"used~{hash_of(encode_event(second))}"
    assert found["delete_file"].risk_labels == ["destructive", REUSED_LABEL]
    assert found["send_mail"].risk_labels == [REUSED_LABEL]
    assert all(event.content_hash == rehash(event) for event in found.values())


@pytest.mark.parametrize("way", [*WAYS, "AuditLogger"])
async def test_a_used_id_in_another_organisation_is_free(store: GatewayStore, way: str) -> None:
    """The id is unique in its organisation only, whichever way an event comes; repeated there, it is a DUPLICATE."""

    async def store_by(event: AuditEvent) -> WriteOutcome:
        if way in WAYS:
            return await write_by(way, store, event)
        async with store.database.sessions() as session:
            return await AuditLogger(session).write(event)

    ours, theirs = (make_event(request_id="used", org_id=org_id) for org_id in ("a", "b"))
    another = make_event(request_id="used", org_id="a", tool_name="other")
    outcomes = [await store_by(event) for event in (ours, theirs, another, ours, theirs, another)]
    found = await stored_events(store)

    assert outcomes == [STORED] * 3 + [DUPLICATE] * 3
    assert [(event.org_id, event.request_id) for event in found[:2]] == [("a", "used"), ("b", "used")]
    assert (found[2].org_id, found[2].request_id) == ("a", derived_id(another))
    assert len(found) == 3


@pytest.mark.parametrize("together", [True, False], ids=["one-batch", "one-by-one"])
async def test_an_attacker_who_takes_the_derived_id_hides_nothing(store: GatewayStore, together: bool) -> None:
    """Whoever knows an event to come can take its derived ids beforehand: it is still kept, with a valid hash."""
    victim = make_event(request_id="used", tool_name="exfiltrate")
    once = with_derived_id(encode_event(victim))
    taken = ["used", key_of(once)[0], key_of(with_derived_id(once))[0]]
    events = [*(make_event(request_id=request_id, tool_name="decoy") for request_id in taken), victim, victim]

    outcomes = await written(store, events, together)
    found = [event for event in await stored_events(store) if event.tool_name == "exfiltrate"]

    assert outcomes == [STORED] * 4 + [DUPLICATE]
    assert len(found) == 1
    assert found[0].request_id.startswith("used~")
    assert found[0].request_id not in taken
    assert found[0].risk_labels == [REUSED_LABEL]
    assert found[0].content_hash == rehash(found[0])


async def test_long_used_ids_stay_apart(store: GatewayStore) -> None:
    ids = ["x" * 512, "x" * 5_000, "\u20ac" * 170, "\0" * 300, "\ud800" * 170]
    events = [make_event(request_id=request_id, tool_name=tool) for request_id in ids for tool in ("a", "b", "c")]

    assert await store.audit.write_many(events) == {STORED: 15}
    assert await store.audit.write_many(events) == {DUPLICATE: 15}

    found = await stored_events(store)
    assert len({event.request_id for event in found}) == 15
    assert max(len(event.request_id.encode()) for event in found) <= 512
    assert all(event.content_hash == rehash(event) for event in found)


async def test_many_writers_of_few_ids_lose_nothing(store: GatewayStore, database_url: str) -> None:
    """Two stores and the standalone logger write 100 events under 10 ids, each twice: every one is there once."""
    rng = random.Random(11)
    events = [make_event(request_id=f"id {rng.randrange(10)}", latency_ms=number) for number in range(100)]
    work = [*events, *events]
    rng.shuffle(work)
    async with GatewayStore(database_url, redis_url="") as other:

        async def standalone(event: AuditEvent) -> WriteOutcome:
            async with other.database.sessions() as session:
                return await AuditLogger(session).write(event)

        ways = (store.audit.write, other.audit.write, standalone)
        limit = asyncio.Semaphore(40)

        async def write(event: AuditEvent, way: int) -> WriteOutcome:
            async with limit:
                return await ways[way](event)

        outcomes = Counter(await asyncio.gather(*(write(event, number % 3) for number, event in enumerate(work))))

    found = await stored_events(store)
    assert outcomes == {STORED: 100, DUPLICATE: 100}
    assert sorted(event.latency_ms for event in found) == list(range(100))
    assert sum("~" not in event.request_id for event in found) == len({event.request_id for event in events})
    assert all((REUSED_LABEL in event.risk_labels) == ("~" in event.request_id) for event in found)
    assert all(event.content_hash == rehash(event) for event in found)


async def test_known_and_reused_ids_of_a_batch_are_looked_up_together(store: GatewayStore) -> None:
    known = [make_event(request_id=f"id {number}") for number in range(60)]
    others = [make_event(request_id=f"id {number}", tool_name="other") for number in range(0, 60, 3)]
    new = [make_event() for _ in range(30)]
    mixed = [*known[:30], *new, *known[30:]]
    await store.audit.write_many(known)

    with counted_statements(store, "INSERT INTO audit_events") as inserts:
        outcomes = [await store.audit.write_many(some) for some in (mixed, others, [*others, *mixed])]

    assert inserts == []
    assert outcomes == [{STORED: 30, DUPLICATE: 60}, {STORED: 20}, {DUPLICATE: 110}]
    found = await stored_events(store)
    assert len(found) == 110
    assert sum(each.risk_labels == [REUSED_LABEL] for each in found) == 20
    assert all(each.content_hash == rehash(each) for each in found)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_refused_row_among_known_ones_fails_only_itself(store: GatewayStore) -> None:
    """Known events stay duplicates, reused ids and new events are stored, and the refused one is set aside."""
    known = [make_event(request_id=f"id {number}") for number in range(5)]
    await store.audit.write_many(known)
    async with store.database.write() as connection:
        await connection.execute(text(TRIGGERS["sqlite"]))
    reused, poison = make_event(request_id="id 1", tool_name="other"), make_event(tool_name="poison")

    outcomes = await store.audit.write_many([*known, reused, make_event(), poison])

    assert outcomes == {STORED: 2, DUPLICATE: 5, SPOOLED: 1}
    assert len(await stored_events(store)) == 7
