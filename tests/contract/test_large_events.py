"""Large events are prepared in a thread: other tasks go on, and what is stored is the same."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from contract_helpers import POSTGRES, until
from sqlalchemy.ext.asyncio import AsyncSession

import agent_gateway_store.audit.writes as writes_module
from agent_gateway_store import AuditEvent, AuditLogger, GatewayStore, WriteOutcome
from agent_gateway_store.audit.record import encode_event, hash_of
from builders import make_event
from proofs.harness import stored_events

pytestmark = POSTGRES
STORED, LOST = WriteOutcome.STORED, WriteOutcome.LOST
LARGE: dict[str, dict[str, Any]] = {
    "text": {"llm_explanation": "\0\ud800\u00e9" * 40_000},
    "argument": {"sanitized_args": {"a": "\0\ud83d\ude00" * 40_000}},
    "items": {"sanitized_args": {"a": ["\0"] * 5_000}},
    "names": {"extra": {f"n{number}": "\0" for number in range(2_000)}},
    "labels": {"risk_labels": ["\0x"] * 2_000},
    "nested": {"sanitized_args": {"a": [{"b": ["\0"]} for _ in range(2_000)]}},
}


class Threads:
    """Notes what is encoded in a thread, and can hold it there.

    Attributes:
        events: The events, in order.
        gate: Cleared, none of them is encoded yet.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[AuditEvent] = []
        self.gate = asyncio.Event()
        self.gate.set()
        to_thread: Any = asyncio.to_thread

        async def noted(work: Any, *args: Any, **options: Any) -> Any:
            if work is encode_event:
                self.events += args
                await self.gate.wait()
            return await to_thread(work, *args, **options)

        monkeypatch.setattr(writes_module.asyncio, "to_thread", noted)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    return Threads(monkeypatch)


async def test_large_events_are_stored_as_any_other(store: GatewayStore, threads: Threads) -> None:
    """By `write`, in bulk, in a session and by the standalone logger; a small one needs no thread."""
    await store.audit.write(make_event(llm_explanation="\0"))
    assert threads.events == []
    for name, fields in LARGE.items():
        events = [make_event(**fields) for _ in range(4)]
        async with AsyncSession(store.database.engine) as session:
            outcomes = [await store.audit.write(events[0]), await store.audit.record(events[1], session=session)]
            await session.commit()
            outcomes += [*await store.audit.write_many([events[2]]), await AuditLogger(session).write(events[3])]
        stored = {event.request_id: event.content_hash for event in await stored_events(store)}

        assert (outcomes, threads.events[-4:]) == ([STORED] * 4, events), name
        assert [stored[event.request_id] for event in events] == [hash_of(encode_event(event)) for event in events]


async def test_other_writers_overtake_a_large_event(store: GatewayStore, threads: Threads) -> None:
    """While it is prepared they are stored; `flush` waits for it."""
    threads.gate.clear()
    large = asyncio.create_task(store.audit.write(make_event(**LARGE["text"])))
    await until(lambda: len(threads.events) == 1)
    flush = asyncio.create_task(store.audit.flush())
    assert await store.audit.write(make_event()) is STORED
    assert (large.done(), flush.done()) == (False, False)

    threads.gate.set()

    assert (await large, await flush) == (STORED, 0)


@pytest.mark.parametrize("cancelled", ["caller", "every task"])
async def test_a_cancelled_caller_takes_no_large_event_with_it(
    store: GatewayStore, threads: Threads, cancelled: str
) -> None:
    before = asyncio.all_tasks()
    threads.gate.clear()
    event = make_event(**LARGE["names"])
    caller = asyncio.create_task(store.audit.write(event))
    await until(lambda: len(threads.events) == 1)
    for task in [caller] if cancelled == "caller" else asyncio.all_tasks() - before:
        task.cancel()
    await asyncio.wait([caller])
    threads.gate.set()
    await store.close()
    await store.open()

    assert caller.cancelled()
    assert [each.request_id for each in await stored_events(store)] == [event.request_id]


async def test_values_edited_meanwhile_raise_nothing(store: GatewayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that meets a mapping whose size changes leaves the event to the loop."""

    async def meets(*_: object, **__: object) -> Any:
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(writes_module.asyncio, "to_thread", meets)

    assert await store.audit.write(make_event(**LARGE["names"])) is STORED
