"""Tasks that want the same answer at the same time share work, and are never given what was begun before they came."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from contextlib import suppress

import pytest

from agent_gateway_store import _concurrency
from agent_gateway_store._concurrency import NextFlight

pytestmark = pytest.mark.unit


class Source:
    """Work that takes a few turns of the loop; its answer is the moment at which it began."""

    def __init__(self, moments: Iterator[int]) -> None:
        self.moments = moments
        self.begun = self.at_once = self.most_at_once = 0
        self.gate: asyncio.Event | None = None

    async def work(self) -> int:
        self.begun += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        moment = next(self.moments)
        try:
            if self.gate is not None:
                await self.gate.wait()
            for _ in range(5):
                await asyncio.sleep(0)
        finally:
            self.at_once -= 1
        return moment


@pytest.fixture
def source() -> Source:
    return Source(itertools.count())


async def test_a_thousand_at_once_cost_two_pieces_of_work(source: Source) -> None:
    """The first works at once; the others, who came while it worked, share the next."""
    flights: NextFlight[int] = NextFlight()
    answers = await asyncio.gather(*(flights.run("key", source.work) for _ in range(1_000)))

    assert answers == [0] + [1] * 999
    assert (source.begun, source.most_at_once) == (2, 1)
    assert flights._under_way == {}


async def test_nobody_is_given_what_was_begun_before_they_came(source: Source) -> None:
    """Tasks come and are cancelled at every moment; each answer was begun after its asker came, one work at a time."""
    rng, flights = random.Random(11), NextFlight[int]()

    async def one() -> None:
        for _ in range(rng.randrange(200)):
            await asyncio.sleep(0)
        came = next(source.moments)
        task = asyncio.ensure_future(flights.run("key", source.work))
        if rng.random() < 0.4:
            for _ in range(rng.randrange(12)):
                await asyncio.sleep(0)
            task.cancel()
        with suppress(asyncio.CancelledError):
            assert await task > came

    await asyncio.gather(*(one() for _ in range(2_000)))

    assert source.most_at_once == 1
    assert source.begun < 300
    assert flights._under_way == {}
    assert flights._next._flights == {}


async def test_cancelling_whoever_works_disturbs_nobody(source: Source) -> None:
    """The first is cancelled while it works, then the one that works for the rest: the others are answered."""
    flights: NextFlight[int] = NextFlight()
    source.gate = asyncio.Event()
    tasks = [asyncio.ensure_future(flights.run("key", source.work)) for _ in range(4)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.sleep(0.01)
    tasks[1].cancel()
    await asyncio.sleep(0.01)
    source.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, True, False, False]
    assert results[2:] == [1, 1]
    assert flights._under_way == {}


async def test_work_that_hangs_does_not_hold_up_what_comes_after_it(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who came while it hung goes on alone after a while."""
    monkeypatch.setattr(_concurrency, "_PATIENCE_S", 0.02)
    flights: NextFlight[int] = NextFlight()
    source.gate = asyncio.Event()
    hung = asyncio.ensure_future(flights.run("key", source.work))
    await asyncio.sleep(0)
    source.gate = None
    async with asyncio.timeout(5):
        assert await asyncio.gather(*(flights.run("key", source.work) for _ in range(3))) == [1, 1, 1]
    hung.cancel()
    await asyncio.wait([hung])

    assert flights._under_way == {}


async def test_a_failure_is_told_to_those_who_share_it_and_ends_there() -> None:
    """Who comes after it works again."""
    flights: NextFlight[int] = NextFlight()

    async def fail() -> int:
        await asyncio.sleep(0)
        raise LookupError

    results = await asyncio.gather(*(flights.run("key", fail) for _ in range(3)), return_exceptions=True)

    assert [type(result) for result in results] == [LookupError] * 3
    assert flights._under_way == {}
    assert await flights.run("key", Source(itertools.count(7)).work) == 7
