"""Tasks that share one piece of work."""

from __future__ import annotations

import asyncio

import pytest

from agent_gateway_store._concurrency import SingleFlight


async def test_flight_is_shared_and_its_error_too() -> None:
    """Ten tasks get what one piece of work raises; the next one begins anew."""
    begun = 0

    async def work() -> int:
        nonlocal begun
        begun += 1
        await asyncio.sleep(0)
        if begun == 1:
            raise LookupError
        return begun

    flights: SingleFlight[int] = SingleFlight()
    answers = await asyncio.gather(*(flights.run("key", work) for _ in range(10)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {LookupError}
    assert await flights.run("key", work) == 2


async def test_work_ends_with_the_last_who_wanted_it() -> None:
    """The cancellation of the last one waits until the work has cleaned up."""
    cleaned = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    flights: SingleFlight[None] = SingleFlight()
    tasks = [asyncio.create_task(flights.run("key", work)) for _ in range(2)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    assert not cleaned.is_set()
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    assert cleaned.is_set()
