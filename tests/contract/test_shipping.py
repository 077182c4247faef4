"""Shipping: every event reaches the sink at least once and in order, whatever the sink and other processes do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from contract_helpers import POSTGRES, until
from sqlalchemy import text

from agent_gateway_store import AuditEvent, GatewayStore, errors
from agent_gateway_store.audit.doors import renew_identity
from agent_gateway_store.shipping.shipper import MOVE, POSITION
from builders import make_event
from tampering import tamper

pytestmark = pytest.mark.usefixtures("no_plugins")
REFUSAL = "The receiver answered 400."


class Box:
    """A sink that keeps what it takes, and does what `act` does first."""

    name = "box"

    def __init__(self, act: Callable[[Sequence[AuditEvent]], Awaitable[object]] | None = None) -> None:
        self.act = act
        self.tried: list[list[str]] = []
        self.taken: list[list[str]] = []

    async def send(self, events: Sequence[AuditEvent]) -> None:
        ids = [event.request_id for event in events]
        self.tried.append(ids)
        if self.act is not None:
            await self.act(events)
        self.taken.append(ids)

    @property
    def ids(self) -> list[str]:
        return [each for batch in self.taken for each in batch]


def refusing(*bad: str) -> Callable[[Sequence[AuditEvent]], Awaitable[object]]:
    """An act that refuses every batch with one of these events for good."""

    async def act(events: Sequence[AuditEvent]) -> None:
        if {event.request_id for event in events} & {*bad}:
            raise errors.NotDeliveredError(REFUSAL, is_permanent=True)

    return act


async def away(_: Sequence[AuditEvent]) -> None:
    raise errors.NotDeliveredError("The receiver answered 429.", retry_after_s=3600)


def holding() -> tuple[Callable[[Sequence[AuditEvent]], Awaitable[object]], asyncio.Event, asyncio.Event]:
    """An act that sets the first event, and ends with the second one."""
    entered, leave, loop = asyncio.Event(), asyncio.Event(), asyncio.get_running_loop()

    async def act(_: Sequence[AuditEvent]) -> None:
        loop.call_soon_threadsafe(entered.set)
        while not leave.is_set():
            await asyncio.sleep(0.01)

    return act, entered, leave


async def fill(store: GatewayStore, count: int, *, begin: int = 0) -> list[str]:
    ids = [f"event-{n}" for n in range(begin, begin + count)]
    await store.audit.write_many(make_event(request_id=each) for each in ids)
    return ids


async def the_sink(store: GatewayStore) -> dict[str, Any]:
    (row,) = await store.sinks.list()
    return dict(row)


async def test_each_event_once_and_in_order(store: GatewayStore) -> None:
    """In batches, from the beginning; a second run goes on where the first ended, and says how many it sent."""
    first = await fill(store, 7)
    box = Box()
    sent = [await store.audit.ship(box, once=True, batch=3), await store.audit.ship(box, once=True)]
    second = await fill(store, 2, begin=7)
    sent.append(await store.audit.ship(box, once=True))

    assert (box.taken, sent) == ([first[:3], first[3:6], first[6:], second], [7, 0, 2])
    row = await the_sink(store)
    assert (row["sink"], row["org_id"], row["lag_s"], row["dead"], row["last_error"]) == ("box", "", 0, 0, None)


@POSTGRES
async def test_once_goes_on_to_the_end_of_the_log(store: GatewayStore) -> None:
    """Also from a cursor in the middle of a snapshot that is older than what was written since."""
    ids = await fill(store, 4)

    async def act(events: Sequence[AuditEvent]) -> None:
        if box.taken:
            await away(events)

    box = Box(act)
    with pytest.raises(errors.NotDeliveredError):
        await store.audit.ship(box, once=True, batch=3)
    ids += await fill(store, 4, begin=4)
    box.act = None
    await store.audit.ship(box, once=True)

    assert box.ids == ids


@POSTGRES
async def test_a_sink_can_begin_now(store: GatewayStore) -> None:
    """Once: the next run goes on from there, whatever it says; forgotten, it begins anew."""
    old = await fill(store, 2)
    box = Box()
    await store.audit.ship(box, once=True, start="now")
    new = await fill(store, 2, begin=2)
    await store.audit.ship(box, once=True, start="now")
    shipped, forgotten = box.ids, [await store.sinks.forget("box"), await store.sinks.forget("box")]
    await store.audit.ship(box, once=True)

    assert (shipped, forgotten, box.ids) == (new, [True, False], [*new, *old, *new])


@POSTGRES
async def test_following_sends_what_comes(store: GatewayStore) -> None:
    box = Box()
    shipping = asyncio.create_task(store.audit.ship(box, poll_s=0.02))
    ids = await fill(store, 3)
    await until(lambda: len(box.ids) == 3)
    ids += await fill(store, 3, begin=3)
    await until(lambda: len(box.ids) == 6)
    shipping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await shipping

    assert box.ids == ids


@POSTGRES
async def test_a_fault_that_passes_is_waited_out(store: GatewayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batch again, and none behind it before; `list` says why while it lasts."""
    asked: list[tuple[int, float | None]] = []
    monkeypatch.setattr("agent_gateway_store.shipping.shipper.wait_s", lambda *args: asked.append(args) or 0.05)
    faults: list[Exception] = [
        errors.NotDeliveredError("The receiver answered 503.", retry_after_s=7),
        ConnectionResetError("gone"),
    ]
    said = []

    async def act(_: Sequence[AuditEvent]) -> None:
        if faults:
            raise faults.pop(0)

    box = Box(act)
    ids = await fill(store, 4)
    shipping = asyncio.create_task(store.audit.ship(box, once=True, batch=2))
    async with asyncio.timeout(10):
        while not shipping.done():
            said += [row["last_error"] for row in await store.sinks.list()]
            await asyncio.sleep(0.005)

    assert await shipping == 4
    assert box.tried == [ids[:2], ids[:2], ids[:2], ids[2:]]
    assert asked == [(1, 7), (2, None)]
    assert "NotDeliveredError: The receiver answered 503." in said
    assert (await the_sink(store))["last_error"] is None


@POSTGRES
async def test_once_gives_a_long_fault_up(store: GatewayStore) -> None:
    """A receiver that asks for more than a minute ends the run; nothing is skipped."""
    box = Box(away)
    ids = await fill(store, 2)
    with pytest.raises(errors.NotDeliveredError, match=r"'box' takes no events .*429.*ship again later"):
        await store.audit.ship(box, once=True)
    row = await the_sink(store)
    box.act = None
    await store.audit.ship(box, once=True)

    assert ("429" in row["last_error"], row["lag_s"] > 0, row["dead"]) == (True, True, 0)
    assert box.ids == ids


@POSTGRES
async def test_a_refused_event_blocks_no_other(store: GatewayStore) -> None:
    """The batch is divided until the event is alone, which becomes a dead letter; then batches grow again."""
    ids = await fill(store, 40)
    box = Box(refusing("event-5", "event-6", "event-39"))
    sent = await store.audit.ship(box, once=True, batch=16)

    good = [each for each in ids if each not in ("event-5", "event-6", "event-39")]
    assert (sent, box.ids) == (37, good)
    assert [len(batch) for batch in box.taken] == [4, 1, 2, 4, 8, 16, 2]
    letters = await store.sinks.dead_letters()
    assert [each["request_id"] for each in letters] == ["event-39", "event-6", "event-5"]
    assert {(each["is_due"], each["error"]) for each in letters} == {(False, f"NotDeliveredError: {REFUSAL}")}
    assert (await the_sink(store))["dead"] == 3


async def test_dead_letters_are_redriven(store: GatewayStore) -> None:
    """By whoever ships next, before new events; what is refused again stays dead, what was pruned says so."""
    await fill(store, 4)
    box = Box(refusing("event-0", "event-1", "event-2"))
    await store.audit.ship(box, once=True)
    await fill(store, 1, begin=4)
    before, box.taken = box.ids, []
    counts = [await store.sinks.redrive("other"), await store.sinks.redrive("box"), await store.sinks.redrive()]
    due = (await the_sink(store))["due"]
    await tamper(store.database.engine, "DELETE FROM audit_events WHERE request_id = 'event-2'")
    box.act = refusing("event-1")
    sent = await store.audit.ship(box, once=True)

    assert (before, counts, due) == (["event-3"], [0, 3, 0], 3)
    assert (sent, box.taken) == (2, [["event-0"], ["event-4"]])
    letters = await store.sinks.dead_letters("box")
    assert [(each["request_id"], each["is_due"]) for each in letters] == [(None, False), ("event-1", False)]
    assert "pruned" in letters[0]["error"]


async def test_one_process_at_a_time(store: GatewayStore, other: GatewayStore) -> None:
    """Another one with `once` is refused; one that follows waits, and takes over when the first ends."""
    act, entered, leave = holding()
    ids = await fill(store, 2)
    first, second = Box(act), Box()
    shipping = asyncio.create_task(store.audit.ship(first, poll_s=0.02))
    await entered.wait()
    with pytest.raises(errors.StoreUnavailableError, match="Another process ships to the sink 'box'"):
        await other.audit.ship(second, once=True)
    leave.set()
    await until(lambda: bool(first.taken))
    shipping.cancel()
    await asyncio.wait([shipping])
    ids += await fill(store, 1, begin=2)
    await other.audit.ship(second, once=True)

    assert (first.ids, second.ids) == (ids[:2], ids[2:])


@POSTGRES
async def test_cancelled_it_ends_after_the_batch_under_way(store: GatewayStore) -> None:
    """What the sink is just taking is finished and remembered, so that nothing comes twice."""
    act, entered, leave = holding()
    ids = await fill(store, 4)
    box = Box(act)
    shipping = asyncio.create_task(store.audit.ship(box, batch=2))
    await entered.wait()
    shipping.cancel()
    await asyncio.sleep(0.05)
    is_waiting = not shipping.done()
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await shipping
    await store.audit.ship(box, once=True)

    assert (is_waiting, box.taken) == (True, [ids[:2], ids[2:]])


@POSTGRES
async def test_a_cursor_that_another_moved_stays(store: GatewayStore) -> None:
    ids = await fill(store, 3)

    async def act(_: Sequence[AuditEvent]) -> None:
        box.act = None
        # Another process, after this one lost its lock.
        async with asyncio.timeout(5):
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(take_over(), loop))

    async def take_over() -> None:
        page = await store.audit.changes("beginning", limit=2)
        async with store.database.connection("autocommit") as connection:
            values = {"p_sink": "box", "p_org_id": "", "p_cursor": page.next_cursor, "p_now": page[0].timestamp}
            kept = await POSITION.first(connection, values) or {}
            await MOVE.rows(connection, {**values, "p_before": kept["cursor"]})

    loop = asyncio.get_running_loop()
    box = Box(act)
    with pytest.raises(errors.StoreUnavailableError, match="has moved the cursor of the sink 'box'"):
        await store.audit.ship(box, once=True)
    tried = len(box.tried)
    await store.audit.ship(box, once=True)

    assert (tried, box.tried[1:]) == (1, [ids[2:]])


@POSTGRES
async def test_a_lost_lock_is_noticed_before_more_is_sent(store: GatewayStore) -> None:
    """The connection that holds the lock dies between two batches: the second one is not sent by this run."""
    await fill(store, 4)

    async def act(_: Sequence[AuditEvent]) -> None:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(kill(), loop))

    async def kill() -> None:
        async with store.database.write() as connection:
            await connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted "
                    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                )
            )

    loop = asyncio.get_running_loop()
    box = Box(act)
    with pytest.raises(errors.StoreUnavailableError):
        await store.audit.ship(box, once=True, batch=2)

    assert len(box.tried) == 1


@POSTGRES
async def test_unknown_sinks_are_named(store: GatewayStore) -> None:
    """One sentence with the next step; and an object that is no sink is refused."""
    with pytest.raises(
        errors.SinkNotFoundError, match="No sink is named 'siem', no sink is set up: see `gateway-store"
    ):
        await store.audit.ship("siem", once=True)
    with pytest.raises(TypeError, match="object has no name"):
        await store.audit.ship(object(), once=True)  # type: ignore[arg-type]
    for wrong in ({"batch": 0}, {"start": "then"}, {"poll_s": 0}):
        with pytest.raises(ValueError, match="must be"):
            await store.audit.ship(Box(), once=True, **wrong)  # type: ignore[arg-type]


@POSTGRES
@pytest.mark.parametrize("shipped", [0, 2])
async def test_behind_a_prune_it_names_the_archive(store: GatewayStore, tmp_path: Path, shipped: int) -> None:
    """Also where nothing was shipped before the prune, as to a sink that has been away from the first day on."""
    left = [shipped]

    async def act(events: Sequence[AuditEvent]) -> None:
        left[0] -= len(events)
        if left[0] < 0:
            await away(events)

    old = datetime(2020, 1, 1, tzinfo=UTC)
    await store.audit.write_many(make_event(timestamp=old) for _ in range(6))
    await store.audit.write(make_event())
    box = Box(act)
    with pytest.raises(errors.NotDeliveredError):
        await store.audit.ship(box, once=True, batch=2)
    await store.retention.prune(old + timedelta(days=1), by="ops", archive=tmp_path / "a", below_floor=True)
    box.act = None
    with pytest.raises(errors.EventsPrunedError, match="archive") as raised:
        await store.audit.ship(box, once=True)

    assert raised.value.archive == str(tmp_path / "a")
    assert len(box.ids) == shipped


@POSTGRES
async def test_behind_a_restore_it_says_so(store: GatewayStore) -> None:
    """It ends with the error that followers get, and `list` shows it."""
    await fill(store, 4)
    box = Box()
    await store.audit.ship(box, once=True)
    await renew_identity(store.database.engine, by="ann", environment="test")
    with pytest.raises(errors.InvalidCursorError, match="restored"):
        await store.audit.ship(box, once=True)
    row = await the_sink(store)

    assert (row["lag_s"], "restored" in row["last_error"]) == (None, True)


async def test_sinks_of_an_organisation_are_apart(store: GatewayStore) -> None:
    """A bound store ships its own events, under a cursor of its own, and sees no other."""
    for org in ("a", "b"):
        await store.audit.write(make_event(request_id=f"of-{org}", org_id=org))
    box, everything = Box(refusing("of-a")), Box()
    await store.for_org("a").audit.ship(box, once=True)
    await store.audit.ship(everything, once=True)

    assert (box.ids, everything.ids) == ([], ["of-a", "of-b"])
    assert [row["org_id"] for row in await store.sinks.list()] == ["", "a"]
    assert [row["org_id"] for row in await store.for_org("a").sinks.list()] == ["a"]
    assert not await store.for_org("b").sinks.dead_letters()
    assert await store.for_org("b").sinks.redrive() == 0
    assert not await store.for_org("b").sinks.forget("box")
