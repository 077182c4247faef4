"""Several tasks that want the same answer at the same time share one piece of work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

__all__ = ["NextFlight", "SingleFlight"]

T = TypeVar("T")

_PATIENCE_S = 1.0


class SingleFlight(Generic[T]):
    """Work that is under way, by what it is about.

    A task that is cancelled disturbs no other; when the last one leaves, the work is cancelled, and over before the
    cancellation goes on.
    """

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight[T]] = {}

    async def run(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Join the work under way for `key`, or begin it; return or raise what comes of it."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.get_running_loop().create_task(work()))
            flight.task.add_done_callback(lambda _: self._land(key, flight))
        flight.waiting += 1
        try:
            await asyncio.wait([flight.task])
        finally:
            flight.waiting -= 1
            if flight.waiting == 0 and not flight.task.done():
                self._forget(key, flight)
                flight.task.cancel()
                await asyncio.wait([flight.task])
        return flight.task.result()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._flights

    def _land(self, key: Hashable, flight: _Flight[T]) -> None:
        self._forget(key, flight)
        if not flight.task.cancelled():
            flight.task.exception()  # seen, also where nobody is left to hear of it

    def _forget(self, key: Hashable, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


class _Flight(Generic[T]):
    __slots__ = ("task", "waiting")

    def __init__(self, task: asyncio.Task[T]) -> None:
        self.task = task
        self.waiting = 0


class NextFlight(Generic[T]):
    """Like `SingleFlight`, but nobody is given what was begun before they came.

    Whoever comes while work is under way shares the next piece of it, which begins when this one ends, or after a
    second. So there is one at a time, unless one hangs, and every answer is as new as if its asker had been alone.
    """

    def __init__(self) -> None:
        self._under_way: dict[Hashable, asyncio.Future[None]] = {}
        self._next: SingleFlight[T] = SingleFlight()

    async def run(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Work for `key`, alone or shared with others who came meanwhile; return or raise what comes of it."""
        current = self._under_way.get(key)
        if current is not None:
            return await self._next.run((key, current), lambda: self._after(current, key, work))
        return await self._work(key, work)

    async def _after(
        self, current: asyncio.Future[None], key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]
    ) -> T:
        try:
            await asyncio.wait([current], timeout=_PATIENCE_S)
        except asyncio.CancelledError:
            if current.done():
                self._leave(key, current)
            raise
        return await self._work(key, work)

    async def _work(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        mine = self._under_way[key] = asyncio.get_running_loop().create_future()
        try:
            return await work()
        finally:
            mine.set_result(None)
            self._leave(key, mine)

    def _leave(self, key: Hashable, mine: asyncio.Future[None]) -> None:
        # Where others wait for this end, the first of them puts their own work in its place.
        if self._under_way.get(key) is mine and (key, mine) not in self._next:
            del self._under_way[key]
