"""Plugins hear of events after their commit, in the background, without holding anybody up."""

from __future__ import annotations

import asyncio
import threading

import pytest
from audit_helpers import SHORT_S, Listener, open_with

from agent_gateway_store import WriteOutcome, hookimpl
from agent_gateway_store.audit import hooks
from builders import make_event
from proofs.harness import WatchedBackend

pytestmark = pytest.mark.unit


async def test_events_are_told_once_in_order_after_the_commit() -> None:
    """What was stored, by whichever way; a duplicate is not told again, and two plugins share nothing."""
    done = threading.Event()

    class Spoiler:
        @hookimpl
        async def gateway_store_audit_written(self, events: list[object]) -> None:
            await asyncio.sleep(0.01)
            events.clear()
            done.set()

    listener = Listener()
    events = [make_event(request_id=f"r-{index}") for index in range(1200)]
    async with open_with(Spoiler(), listener) as store:
        await store.audit.write(events[0])
        await store.audit.write_many(events[1:])
        await store.audit.write(events[0])

    assert done.is_set()
    assert listener.heard == [event.request_id for event in events]
    assert max(map(len, listener.batches)) <= 500
    assert listener.batches[0][0].content_hash


async def test_a_failing_plugin_is_counted_and_the_others_hear(caplog: pytest.LogCaptureFixture) -> None:
    broken, listener = Listener("broken", lambda: 1 / 0), Listener()
    async with open_with(broken, listener) as store:
        outcomes = [await store.audit.write(make_event()) for _ in range(3)]
        async with asyncio.timeout(5):
            while store.audit.counters.unnotified < 3:
                await asyncio.sleep(0.01)

    assert set(outcomes) == {WriteOutcome.STORED}
    assert len(listener.heard) == 3
    assert "Plugin broken failed when it was notified of" in caplog.text


async def test_a_slow_plugin_loses_events_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What does not fit into its queue is dropped and counted; every event is accounted for."""
    monkeypatch.setattr(hooks, "MAX_QUEUED_EVENTS", 10)
    gate = threading.Event()
    slow = Listener("slow", lambda: gate.wait(10))
    async with open_with(slow) as store:
        for index in range(40):
            assert await store.audit.write(make_event(request_id=f"r-{index}")) is WriteOutcome.STORED
            await asyncio.sleep(0.002)
        unnotified = store.audit.counters.unnotified
        gate.set()

    assert unnotified >= 20
    assert len(slow.heard) + unnotified == 40
    assert "too slow to be notified of every audit event" in caplog.text


async def test_closing_waits_a_bounded_time_for_a_hung_plugin(caplog: pytest.LogCaptureFixture) -> None:
    """The store closes; what the plugin was not notified of is counted."""
    async with open_with(Listener("hung", lambda: asyncio.sleep(60)), timeout_s=SHORT_S) as store:
        await store.audit.write(make_event())
        async with asyncio.timeout(5):
            await store.close()

    # By the end of its time or by the end of the store, whichever comes first.
    assert "notified of 1 audit events" in caplog.text


async def test_events_from_the_spool_are_told_when_they_are_brought_in() -> None:
    """Not while they wait: they are no part of the record yet."""
    listener = Listener()
    async with open_with(listener) as store:
        backend = await WatchedBackend.within(store)
        backend.fault = "away"
        assert await store.audit.write(make_event(request_id="r-1")) is WriteOutcome.SPOOLED
        assert listener.heard == []
        backend.fault = None
        assert await store.audit.flush() == 0

    assert listener.heard == ["r-1"]
