"""Tasks that share one piece of work, items that share one batch, tasks in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from agent_gateway_store._concurrency import BackgroundTasks, BatchQueue, SingleFlight, keep_cancellation

pytestmark = pytest.mark.unit


class Batches:
    """What a queue processes: each item comes to its text, once the gate is open.

    Attributes:
        seen: The batches, in order.
        tasks: The task that each was processed in.
    """

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.tasks: list[asyncio.Task[Any] | None] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def process(self, items: Sequence[int]) -> list[str | Exception]:
        self.seen.append(list(items))
        self.tasks.append(asyncio.current_task())
        await self.gate.wait()
        return [LookupError(item) if item < 0 else str(item) for item in items]


async def turns(number: int = 3) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def begin(queue: BatchQueue[int, str], *items: int) -> list[asyncio.Task[str]]:
    """Begin to run each item in a task of its own, one after the other."""
    tasks = []
    for item in items:
        tasks.append(asyncio.create_task(queue.run(item)))
        await turns()
    return tasks


async def test_flight_is_shared_and_its_error_too() -> None:
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


async def test_a_lone_item_is_processed_in_its_callers_task() -> None:
    batches = Batches()
    queue = BatchQueue(batches.process, max_items=10)

    assert [await queue.run(1), await queue.run(2)] == ["1", "2"]
    assert batches.tasks == [asyncio.current_task()] * 2


@pytest.mark.parametrize("by", ["run", "add"])
async def test_the_first_of_a_crowd_goes_with_the_others(by: str) -> None:
    """Whoever is ready in the same turn of the loop is in the first batch; who comes a turn later is in the next."""
    batches = Batches()
    queue = BatchQueue(batches.process, max_items=10)
    if by == "run":
        crowd = [asyncio.create_task(queue.run(item)) for item in range(5)]
    else:
        crowd = [queue.add(item) for item in range(5)]

    assert await asyncio.gather(*crowd) == [*map(str, range(5))]
    assert batches.seen == [[0, 1, 2, 3, 4]]


async def test_places_are_filled_one_after_the_other() -> None:
    """As many batches are under way as there are places; what comes then waits for the first place that is free."""
    batches = Batches()
    queue = BatchQueue(batches.process, max_items=10, places=2)
    batches.gate.clear()
    tasks = await begin(queue, *range(6))
    assert (batches.seen, len(queue)) == ([[0], [1]], 6)

    batches.gate.set()

    assert await asyncio.gather(*tasks) == [*map(str, range(6))]
    assert batches.seen == [[0], [1], [2, 3, 4, 5]]


@pytest.mark.parametrize(("count", "shares"), [(5, [5]), (6, [3, 3]), (7, [4, 3]), (25, [10, 10, 5])])
async def test_a_large_crowd_is_shared_out(count: int, shares: list[int]) -> None:
    batches = Batches()
    queue = BatchQueue(batches.process, max_items=10, places=2, min_share=3)

    batches.gate.clear()
    futures = [queue.add(item) for item in range(count)]
    await turns()
    batches.gate.set()
    await asyncio.gather(*futures)

    assert [len(batch) for batch in batches.seen] == shares


@pytest.mark.parametrize("hung", [0, 1])
async def test_join_waits_for_a_batch_that_later_ones_overtake(hung: int) -> None:
    gate, done = asyncio.Event(), list[int]()

    async def process(items: Sequence[int]) -> list[str | Exception]:
        if hung in items:
            await gate.wait()
        done.extend(items)
        return [str(item) for item in items]

    queue = BatchQueue(process, max_items=10, places=2)
    first = await begin(queue, 0, 1)
    joined = asyncio.create_task(queue.join())
    await turns()
    later = await begin(queue, 2, 3, 4)
    assert (len(done), joined.done()) == (4, False)

    gate.set()
    await asyncio.wait_for(joined, 5)

    assert hung in done
    assert await asyncio.gather(*first, *later) == ["0", "1", "2", "3", "4"]


async def test_batches_that_come_back_go_again_in_order() -> None:
    batches = Batches()
    queue = BatchQueue(batches.process, max_items=2, places=2)
    batches.gate.clear()
    futures = [queue.add(item) for item in range(6)]
    await turns()
    assert batches.seen == [[0, 1], [2, 3]]
    for task in sorted(asyncio.all_tasks() - {asyncio.current_task()}, key=batches.tasks.index, reverse=True):
        task.cancel()
        await turns()

    batches.gate.set()
    await asyncio.wait_for(queue.join(), 5)

    assert [future.result() for future in futures] == [*map(str, range(6))]
    assert [item for batch in batches.seen[-3:] for item in batch] == [*range(6)]


async def test_what_arrives_during_a_batch_goes_together_in_the_next_in_order() -> None:
    batches = Batches()
    queue = BatchQueue(batches.process, max_items=4, max_bytes=30, size=lambda item: item)
    batches.gate.clear()
    tasks = await begin(queue, *range(1, 10), 20, 25, 3)
    assert len(queue) == 12

    batches.gate.set()

    assert await asyncio.gather(*tasks) == [*map(str, range(1, 10)), "20", "25", "3"]
    assert batches.seen == [[1], [2, 3, 4, 5], [6, 7, 8, 9], [20, 25], [3]]
    assert len(queue) == 0


async def test_an_error_is_raised_to_the_caller_of_its_item_only() -> None:
    batches = Batches()
    queue = BatchQueue(batches.process, max_items=10)
    with pytest.raises(LookupError):
        await queue.run(-1)
    batches.gate.clear()
    tasks = await begin(queue, 1, -2, 3)

    batches.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert [results[0], type(results[1]), results[2]] == ["1", LookupError, "3"]


@pytest.mark.parametrize("limit", [{"max_queued": 4}, {"max_queued_bytes": 40}], ids=["items", "bytes"])
async def test_run_waits_for_room_and_add_does_not(limit: dict[str, int]) -> None:
    """While one batch is under way no more than the limit is queued; `join` waits for those without room, too."""
    batches = Batches()
    queue = BatchQueue(batches.process, max_items=3, size=lambda _: 10, **limit)
    batches.gate.clear()
    tasks = await begin(queue, *range(20))
    assert (len(queue), queue.is_full) == (1 + 4, True)
    added = queue.add(99)
    assert len(queue) == 6
    joined = asyncio.create_task(queue.join())
    await turns()
    assert not joined.done()

    batches.gate.set()
    await asyncio.wait_for(joined, 5)

    assert await asyncio.gather(*tasks, added) == [*map(str, range(20)), "99"]
    assert sorted(item for batch in batches.seen for item in batch) == [*range(20), 99]


async def test_a_cancelled_caller_withdraws_no_item() -> None:
    """Whether it is processed in the caller's own task, or in a batch, queued, or waiting for room."""
    batches = Batches()
    queue = BatchQueue(batches.process, max_items=2, max_queued=3)
    batches.gate.clear()
    tasks = await begin(queue, *range(8))
    for task in tasks:
        task.cancel()
    await turns()

    batches.gate.set()
    await asyncio.wait_for(queue.join(), 5)

    assert all(task.cancelled() for task in tasks)
    # The first was being processed in its caller's task, and is processed again.
    assert batches.seen[0] == [0]
    assert sorted(item for batch in batches.seen[1:] for item in batch) == list(range(8))


async def test_a_cancelled_lone_caller_abandons_none_of_the_others() -> None:
    batches = Batches()
    queue = BatchQueue(batches.process, max_items=2, abandon=lambda _: "abandoned")
    batches.gate.clear()
    first, *rest = await begin(queue, 1, 2, 3)

    first.cancel()
    batches.gate.set()

    assert await asyncio.wait_for(asyncio.gather(*rest), 5) == ["2", "3"]


@pytest.mark.parametrize("turn", range(4))
async def test_cancelling_every_task_leaves_the_items_for_join(turn: int) -> None:
    """Also before the first step of the queue's own task; nothing is lost, whoever calls `join` next."""
    batches = Batches()
    queue = BatchQueue(batches.process, max_items=2)
    batches.gate.clear()
    futures = [queue.add(item) for item in range(5)]
    await turns(turn)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await turns()
    assert len(queue) == 5

    batches.gate.set()
    await asyncio.wait_for(queue.join(), 5)

    assert [future.result() for future in futures] == [*map(str, range(5))]


async def test_a_full_queue_whose_task_was_cancelled_lets_the_next_caller_in() -> None:
    batches = Batches()
    queue = BatchQueue(batches.process, max_items=2, max_queued=2)
    batches.gate.clear()
    for item in range(4):
        queue.add(item)
    await turns()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await turns()
    batches.gate.set()

    assert await asyncio.wait_for(queue.run(9), 5) == "9"
    assert batches.seen[-1] == [9]


@pytest.mark.parametrize("turn", range(12))
async def test_cancelling_every_task_abandons_where_that_is_wanted(turn: int) -> None:
    batches = Batches()
    queue = BatchQueue(batches.process, max_items=2, abandon=lambda item: f"without {item}")
    batches.gate.clear()
    futures = [queue.add(item) for item in range(5)]
    await turns(turn)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()

    assert await asyncio.wait_for(asyncio.gather(*futures), 5) == [f"without {item}" for item in range(5)]
    batches.gate.set()
    assert await asyncio.wait_for(queue.run(7), 5) == "7"


@pytest.mark.parametrize("is_first", [True, False])
async def test_the_last_item_needs_none_behind_it(is_first: bool) -> None:
    """It comes on any turn of the event loop after the one before it, also on that on which the queue's task ends."""

    async def process(items: Sequence[int]) -> list[str | Exception]:
        await turns()
        return [str(item) for item in items]

    async def come(queue: BatchQueue[int, str], turn: int, item: int) -> str:
        await turns(turn)
        return await queue.add(item)

    async def pair(late: int, queue: BatchQueue[int, str]) -> list[str]:
        first, second = (0, late) if is_first else (late, 0)
        return await asyncio.gather(come(queue, first, 1), come(queue, second, 2))

    shared = BatchQueue(process, max_items=50)
    async with asyncio.timeout(10):
        apart = await asyncio.gather(*(pair(late, BatchQueue(process, max_items=50)) for late in range(40)))
        together = await asyncio.gather(*(pair(late % 20 + late * 30, shared) for late in range(40)))

    assert apart == together == [["1", "2"]] * 40


async def test_close_abandons_what_takes_too_long() -> None:
    batches = Batches()
    queue = BatchQueue(batches.process, max_items=2, abandon=lambda _: "abandoned")
    assert await queue.run(1) == "1"
    assert await queue.close(60) == 0
    batches.gate.clear()
    futures = [queue.add(item) for item in range(5)]

    assert await queue.close(0.01) == 5
    assert [future.result() for future in futures] == ["abandoned"] * 5


async def test_background_work_ends_without_its_caller() -> None:
    tasks, gate, done = BackgroundTasks(), asyncio.Event(), list[int]()

    async def work(number: int) -> int:
        await gate.wait()
        done.append(number)
        return number

    caller = asyncio.create_task(tasks.shielded(work(1)))
    await turns()
    caller.cancel()
    await turns()
    await tasks.join(timeout_s=0.01)
    assert (caller.cancelled(), len(tasks), done) == (True, 1, [])

    gate.set()
    await tasks.join()
    gate.clear()
    left = tasks.start(work(2))
    await tasks.cancel()

    assert (done, left.cancelled(), len(tasks)) == ([1], True, 0)


async def test_a_swallowed_cancellation_is_raised_at_the_end_of_the_block() -> None:
    reached = []

    async def work(error: Exception | None) -> None:
        with keep_cancellation():
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if error is not None:
                    raise error from None
        reached.append(error)

    for error in (None, ValueError("of the block")):
        task = asyncio.create_task(work(error))
        await turns()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
    assert reached == []


async def test_a_cancellation_that_came_before_the_block_is_not_raised_in_it() -> None:
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            with keep_cancellation():
                await asyncio.sleep(0)
            cleaned.append(True)

    task = asyncio.create_task(work())
    await turns()
    task.cancel()
    await asyncio.wait([task])

    assert cleaned == [True]
    assert task.cancelled()
