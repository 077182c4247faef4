"""What tasks of one event loop share: one read for many of them, one commit for many items, tasks in the background.

And what keeps other event loops and processes away.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from agent_gateway_store.errors import StoreNotOpenError

T = TypeVar("T")
I = TypeVar("I")  # noqa: E741  # an item
R = TypeVar("R")


@contextmanager
def keep_cancellation() -> Iterator[None]:
    """Raise the cancellation of this task that came while the block ran, also if the block swallowed it.

    redis-py sends by `asyncio.wait_for`, which before Python 3.12 returns normally when the cancellation comes in the
    turn of the event loop in which it ends (https://github.com/python/cpython/issues/86296).
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


class BackgroundTasks:
    """Tasks that run beside the one that started them."""

    def __init__(self) -> None:
        # The event loop holds weak references only, so a task that nobody else holds could be collected while it runs.
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `work` in a task of its own."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def shielded(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end even if the caller is cancelled, and return what it returns."""
        return await asyncio.shield(self.start(work))

    async def join(self, timeout_s: float | None = None) -> None:
        """Wait for the tasks started so far, for `timeout_s` seconds at most; None: without end."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout_s)

    async def cancel(self) -> None:
        """Cancel every task and wait until each has ended."""
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


class SingleFlight(Generic[T]):
    """Several tasks that want the same answer at the same time share one piece of work.

    A task that is cancelled disturbs no other. When the last one is cancelled, so is the work, which has ended before
    the cancellation goes on. Where an answer that was begun before a change would be wrong, put a number that grows
    with each change into the key. (The name is that of Go's package singleflight.)

    Args:
        to_end: Work goes on to its end also when nobody waits for it any more, and can still be joined.
    """

    def __init__(self, *, to_end: bool = False) -> None:
        self._to_end = to_end
        self._flights: dict[Hashable, _Flight[T]] = {}

    async def run(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]], *, max_age_s: float = math.inf) -> T:
        """Join the work under way for `key`, or begin it; return or raise what comes of it.

        Work that began `max_age_s` seconds ago or earlier is not joined.
        """
        loop = asyncio.get_running_loop()
        flight = self._flights.get(key)
        if flight is None or loop.time() - flight.begun_at >= max_age_s:
            flight = self._flights[key] = _Flight(loop.create_task(work()), loop.time())
            flight.task.add_done_callback(lambda _: self._end(key, flight))
        flight.waiting += 1
        try:
            await asyncio.wait([flight.task])
        finally:
            flight.waiting -= 1
            # The last caller waits for the end of the work, so that nothing of it runs after its cancellation.
            if flight.waiting == 0 and not flight.task.done() and not self._to_end:
                self._forget(key, flight)
                flight.task.cancel()
                await asyncio.wait([flight.task])
        return flight.task.result()

    def _end(self, key: Hashable, flight: _Flight[T]) -> None:
        self._forget(key, flight)
        if not flight.task.cancelled():
            # Otherwise asyncio logs "exception was never retrieved" where every caller was cancelled.
            flight.task.exception()

    def _forget(self, key: Hashable, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


@dataclass(eq=False, slots=True)
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    begun_at: float
    waiting: int = 0


class _Entry(NamedTuple, Generic[I, R]):
    number: int
    item: I
    size: int
    came_at: float
    result: asyncio.Future[R]


class BatchQueue(Generic[I, R]):
    """Group commit: what arrives while every place is taken goes together in the next batch.

    A batch takes what is ready in the same turn of the event loop and waits for nothing else; a lone caller processes
    its item in its own task. Items are taken in the order in which they are queued; batches that are under way at the
    same time end in any order. Cancelling a caller does not withdraw its item.

    Args:
        process: Takes a batch and returns one result for each item, in order; raises nothing but a cancellation. An
            exception in the place of a result is raised to the caller of that item.
        max_items: Most items of a batch.
        places: How many batches may be under way at once.
        min_share: What waits is shared out to the free places if each gets so many items at least.
        max_bytes: A batch is closed once it holds so much.
        size: Bytes of an item, as `max_bytes` and `max_queued_bytes` count them.
        max_queued: From this number of waiting items on, `run` waits for room.
        max_queued_bytes: The same, in bytes.
        abandon: Gives the result of an item that is left when the queue's own task is cancelled, as by a host that
            cancels every task. None: the item stays and goes with the next batch, for which `join` waits.
    """

    def __init__(
        self,
        process: Callable[[Sequence[I]], Awaitable[Sequence[R | Exception]]],
        *,
        max_items: int,
        places: int = 1,
        min_share: int = sys.maxsize,
        max_bytes: int = sys.maxsize,
        size: Callable[[I], int] = lambda _: 0,
        max_queued: int = sys.maxsize,
        max_queued_bytes: int = sys.maxsize,
        abandon: Callable[[I], R] | None = None,
    ) -> None:
        self._process = process
        self._max_items, self._max_bytes, self._size = max_items, max_bytes, size
        self._max_queued, self._max_queued_bytes = max_queued, max_queued_bytes
        self._places, self._min_share = places, min_share
        self._abandon = abandon
        self._queue: deque[_Entry[I, R]] = deque()
        self._under_way: list[list[_Entry[I, R]]] = []
        self._queued_bytes = 0
        self._waiting_for_room = 0
        self._added = 0
        self._room, self._progress = asyncio.Event(), asyncio.Event()
        self._drainers: set[asyncio.Task[None]] = set()
        self._inline = 0
        # Takes its batch in the next turn of the loop; until then nobody else begins one.
        self._gathering: asyncio.Task[Any] | None = None

    def __len__(self) -> int:
        """How many items wait or are under way."""
        return len(self._queue) + sum(map(len, self._under_way))

    @property
    def age_s(self) -> float:
        """Seconds since the oldest item came that is not done; 0 if there is none. For any thread."""
        oldest = min((batch[0].came_at for batch in (*self._under_way, self._queue.copy()) if batch), default=None)
        return 0.0 if oldest is None else time.monotonic() - oldest

    @property
    def is_full(self) -> bool:
        """True if `run` waits for room."""
        return len(self._queue) >= self._max_queued or self._queued_bytes >= self._max_queued_bytes

    async def run(self, item: I) -> R:
        """Have `item` processed and return its result; while the queue is full this waits first."""
        if self.is_full:
            await self._wait_for_room(item)
        elif not self._queue and self._gathering is None and self._has_place:
            return await self._run_inline(item)
        return await self.add(item)

    def add(self, item: I) -> asyncio.Future[R]:
        """Queue `item`, full or not, and return the future of its result."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        size = self._size(item)
        self._queue.append(_Entry(self._added, item, size, time.monotonic(), future))
        self._queued_bytes += size
        self._added += 1
        self._start()
        return future

    async def join(self) -> None:
        """Wait until everything that has arrived so far is done."""
        until = self._added + self._waiting_for_room
        while self._oldest() < until:
            self._start()
            await self._progress.wait()

    async def close(self, timeout_s: float) -> int:
        """Wait for what has arrived, `timeout_s` seconds at most; return how many items are left.

        Those are abandoned; without `abandon` they stay, and nothing processes them unless another one is added.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.join()
        left = len(self)
        drainers = set(self._drainers)
        for drainer in drainers:
            drainer.cancel()
        if drainers:
            await asyncio.wait(drainers)
        return left

    async def _wait_for_room(self, item: I) -> None:
        self._waiting_for_room += 1
        try:
            while self.is_full:
                # The task that would have made room may have been cancelled.
                self._start()
                self._room.clear()
                await self._room.wait()
        except asyncio.CancelledError:
            # A cancelled caller does not withdraw its item, also where it was not queued yet.
            self.add(item).cancel()
            raise
        finally:
            self._waiting_for_room -= 1

    @property
    def _has_place(self) -> bool:
        return len(self._drainers) + self._inline < self._places

    async def _run_inline(self, item: I) -> R:
        # In another task each item would cost a lone caller two switches of tasks.
        self._inline += 1
        self._gathering = task = asyncio.current_task()
        future = self.add(item)
        try:
            # Every other task that is ready in this turn of the loop is in the queue after it.
            await asyncio.sleep(0)
            self._gathering = None
            if len(self._queue) == 1 and self._queue[0].result is future:
                await self._process_next()
        except asyncio.CancelledError:
            # The item may be half done, and its caller is gone: the queue's own task processes it again.
            future.cancel()
            raise
        finally:
            self._inline -= 1
            if self._gathering is task:
                self._gathering = None
            self._start()
        return await future

    def _start(self) -> None:
        if self._queue and self._gathering is None and self._has_place:
            self._gathering = drainer = asyncio.get_running_loop().create_task(self._drain())
            self._drainers.add(drainer)
            drainer.add_done_callback(self._stop)

    def _stop(self, drainer: asyncio.Task[None]) -> None:
        # In a callback, because a task that is cancelled before its first step runs nothing, not even a `finally`.
        self._drainers.discard(drainer)
        if self._gathering is drainer:
            self._gathering = None
        if not drainer.cancelled():
            # Items that came between its last step and this callback.
            self._start()
        elif self._abandon is not None:
            self._abandon_all(self._abandon)
        self._note_progress()

    async def _drain(self) -> None:
        self._gathering = None
        while self._queue:
            await self._process_next()

    async def _process_next(self) -> None:
        batch = self._next_batch()
        self._under_way.append(batch)
        # What it leaves in the queue.
        self._start()
        try:
            results = await self._process([entry.item for entry in batch])
        except asyncio.CancelledError:
            self._requeue(batch)
            raise
        finally:
            self._under_way.remove(batch)
        for entry, result in zip(batch, results, strict=True):
            if entry.result.done():
                continue
            if isinstance(result, Exception):
                entry.result.set_exception(result)
            else:
                entry.result.set_result(result)
        self._note_progress()

    def _next_batch(self) -> list[_Entry[I, R]]:
        batch: list[_Entry[I, R]] = []
        size = 0
        waiting, free = len(self._queue), max(1, self._places - len(self._under_way))
        share = math.ceil(waiting / free) if waiting // free >= self._min_share else waiting
        most = min(self._max_items, share)
        while self._queue and len(batch) < most and size < self._max_bytes:
            batch.append(self._queue.popleft())
            size += batch[-1].size
        self._queued_bytes -= size
        if not self.is_full:
            self._room.set()
        return batch

    def _requeue(self, batch: list[_Entry[I, R]]) -> None:
        # Sorted, because a batch that was taken later may have come back before.
        self._queue = deque(sorted([*batch, *self._queue], key=attrgetter("number")))
        self._queued_bytes += sum(entry.size for entry in batch)

    def _abandon_all(self, abandon: Callable[[I], R]) -> None:
        while self._queue:
            for entry in self._next_batch():
                result = abandon(entry.item)
                if not entry.result.done():
                    entry.result.set_result(result)

    def _oldest(self) -> int:
        """Return the number of the oldest item that is not done, or that of the next one to come."""
        numbers = [batch[0].number for batch in (*self._under_way, self._queue) if batch]
        return min(numbers, default=self._added)

    def _note_progress(self) -> None:
        # A new event each time: setting and clearing one would lose those that begin to wait in between.
        progress, self._progress = self._progress, asyncio.Event()
        progress.set()


# What tells, in each library that replaces parts of Python by its own, whether it has replaced one.
_PATCHERS = {"gevent": ("gevent.monkey", "is_module_patched"), "eventlet": ("eventlet.patcher", "is_monkey_patched")}
# The two libraries' names of what event loops, drivers and plugins run on.
_NATIVE = ("threading", "thread", "queue", "socket", "select")


def require_native_threads() -> None:
    """Raise StoreNotOpenError where gevent or eventlet runs as one thread what a store needs as several."""
    for library, (module, function) in _PATCHERS.items():
        is_patched = getattr(sys.modules.get(module), function, None)
        if is_patched is not None and any(map(is_patched, _NATIVE)):
            raise StoreNotOpenError(
                f"{library} has patched the threads, queues or sockets of this process, with which a store would hang: "
                "open it in a process that is not patched, such as a worker with native threads."
            )


Owner: TypeAlias = tuple[int, asyncio.AbstractEventLoop]


def owner_here() -> Owner:
    """Return this process and event loop; raise as `loop_here` does."""
    return os.getpid(), loop_here()


def loop_here() -> asyncio.AbstractEventLoop:
    """Return the event loop; raise StoreNotOpenError where none of asyncio runs."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise StoreNotOpenError(
            "No event loop of asyncio runs here, and a store needs one: use `asyncio.run`, or anyio with its backend "
            "asyncio, or SyncGatewayStore."
        ) from None


def require_owner(owner: Owner | None) -> None:
    """Raise StoreNotOpenError unless `owner` is this process and event loop."""
    if owner is None:
        raise StoreNotOpenError("The store is not open: use `async with GatewayStore() as store:` or `open()`.")
    pid, loop = owner
    if pid != os.getpid():
        raise StoreNotOpenError("The store was opened in another process: open one in each process, after forking.")
    if loop is not loop_here():
        raise StoreNotOpenError("The store was opened in another event loop: open one in each loop.")


class Claim:
    """Keeps a store from other event loops, whose threads could open it while this one does: `with claim:`.

    Entered in another loop, or process, than those that are in it, it raises StoreNotOpenError.

    Args:
        is_kept: Whether its last user keeps it, as for a store that is open then.
    """

    def __init__(self, is_kept: Callable[[], bool]) -> None:
        self._is_kept = is_kept
        self._owner: Owner | None = None
        self._count = 0
        self._lock = threading.Lock()

    @property
    def is_shared(self) -> bool:
        """Whether more than one is in it, or somebody keeps it."""
        return self._count > 1 or self._is_kept()

    def __enter__(self) -> None:
        with self._lock:
            if self._owner is not None:
                require_owner(self._owner)
            self._owner = owner_here()
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0 and not self._is_kept():
                self._owner = None
