"""Streams that are still open when their store is closed."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
from contract_helpers import no_thread_left, until

from agent_gateway_store import GatewayStore, SyncGatewayStore, errors
from agent_gateway_store.storage.streaming import ended_with, require_open
from builders import make_event, make_request

# Seconds. A close that waits for what is under way takes five.
SOON_S = 3

STREAMS: dict[str, Callable[[Any], Any]] = {
    "audit.stream": lambda store: store.audit.stream(),
    "audit.follow": lambda store: store.audit.follow(start="beginning", poll_s=0.01),
    "approvals.stream": lambda store: store.approvals.stream(),
}


@pytest.fixture(autouse=True)
def quiet(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Check that asyncio reports nothing, and that no thread of a connection is left."""
    if "database_url" in request.fixturenames:
        # Emptying the database for the first time starts a thread of its own.
        request.getfixturevalue("database_url")
    with no_thread_left():
        yield
        gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def fill(store: GatewayStore) -> None:
    await store.audit.write_many(make_event() for _ in range(30))
    for _ in range(3):
        await store.approvals.issue_token(make_request())


def fill_blocking(store: SyncGatewayStore) -> None:
    store.audit.write_many(make_event() for _ in range(30))
    for _ in range(3):
        store.approvals.issue_token(make_request())


@pytest.mark.parametrize(("name", "reopens"), [("audit.stream", False), *((each, True) for each in STREAMS)])
async def test_closing_the_store_ends_a_stream_that_waits_for_its_consumer(
    database_url: str, name: str, reopens: bool
) -> None:
    """The close does not wait for it, its connection is given back, and the next step says what is wrong."""
    store = GatewayStore(database_url)
    async with store:
        await fill(store)
        stream = STREAMS[name](store)
        await anext(stream)
        pool, began = store.database.replica.engine.pool, time.monotonic()
    took = time.monotonic() - began
    if reopens:
        await store.open()

    assert took < SOON_S
    assert pool.checkedout() == 0  # type: ignore[attr-defined]
    if name == "audit.stream" or not reopens:
        with pytest.raises(errors.StoreNotOpenError):
            await anext(stream)
    else:
        # They hold no connection between two steps, and know where they are.
        assert await anext(stream)
    await stream.aclose()
    await store.close()


async def test_a_stream_in_memory_ends_with_its_store() -> None:
    async with GatewayStore("sqlite://") as store:
        await fill(store)
        stream = store.audit.stream()
        await anext(stream)

    with pytest.raises(errors.StoreNotOpenError, match="begin a new one"):
        await anext(stream)


async def test_a_step_that_runs_is_waited_for(database_url: str) -> None:
    store = GatewayStore(database_url)
    await store.open()
    database, gate, ended = store.database, asyncio.Event(), []

    async def batches() -> AsyncGenerator[list[int]]:
        async with database.raw_connection():
            try:
                await gate.wait()
                yield [1, 2]
            finally:
                ended.append(True)

    async def items() -> AsyncGenerator[int]:
        async with ended_with(database, batches()) as stream:
            async for batch in stream:
                for item in batch:
                    yield item
                    require_open(database, stream)

    stream = items()
    step = asyncio.create_task(anext(stream))
    await until(lambda: len(database.streams) == 1)
    closing = asyncio.create_task(store.close())
    await until(lambda: not database.is_owner)
    await asyncio.sleep(0.05)
    assert (ended, closing.done()) == ([], False)
    gate.set()

    assert await step == 1
    await closing
    assert ended == [True]
    with pytest.raises(errors.StoreNotOpenError, match="begin a new one"):
        await anext(stream)


@pytest.mark.parametrize("name", STREAMS)
def test_an_error_in_the_loop_of_a_blocking_stream_arrives_at_once(database_url: str, name: str) -> None:
    """The iterator lives on in the traceback; the store is closed all the same, and the iterator with it."""

    def use() -> None:
        with SyncGatewayStore(database_url) as store:
            fill_blocking(store)
            stream = STREAMS[name](store)
            for _ in stream:
                raised.append(time.monotonic())
                raise ValueError("my own")

    raised: list[float] = []
    with pytest.raises(ValueError, match="my own") as caught:
        use()

    assert time.monotonic() - raised[0] < SOON_S
    assert caught.value.__context__ is None


@pytest.mark.parametrize("name", STREAMS)
def test_a_blocking_stream_of_before_does_not_end_as_if_it_were_over(database_url: str, name: str) -> None:
    """A store that is closed and opened again has ended its iterators: what they did not yield is not missed."""
    store = SyncGatewayStore(database_url)
    with store:
        fill_blocking(store)
        before, closed = STREAMS[name](store), STREAMS[name](store)
        next(before)
        next(closed)
    with pytest.raises(errors.StoreNotOpenError):
        next(closed)
    with store, pytest.raises(errors.StoreNotOpenError, match="begin a new one"):
        next(before)
