"""Automatic pipelining: what is asked at the same time goes together, and every task gets its own replies."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest

from agent_gateway_store.storage.pipelining import AutoPipeline


class Server:
    """Replies to each command with itself in capitals, once its gate is open."""

    def __init__(self) -> None:
        self.packets: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.answers = True

    async def send(self, commands: Sequence[str]) -> list[Any] | None:
        self.packets.append(list(commands))
        await self.gate.wait()
        return [command.upper() for command in commands] if self.answers else None


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def pipeline(server: Server) -> AutoPipeline[str]:
    return AutoPipeline(server.send)


async def hold(server: Server, pipeline: AutoPipeline[str]) -> asyncio.Task[Any]:
    """Return a task whose command is under way until the gate opens."""
    server.gate.clear()
    task = asyncio.create_task(pipeline.ask(["first"], 5))
    await asyncio.sleep(0)
    return task


async def test_a_lone_task_sends_by_itself(server: Server, pipeline: AutoPipeline[str]) -> None:
    """Nothing is handed to another task, so nothing waits for one."""
    before = len(asyncio.all_tasks())
    server.gate.clear()
    coroutine = pipeline.ask(["a", "b"], 2)
    waiting = coroutine.send(None)

    assert server.packets == [["a", "b"]]
    assert len(asyncio.all_tasks()) == before
    assert waiting is not None
    coroutine.close()


async def test_what_comes_meanwhile_goes_together_in_order(server: Server, pipeline: AutoPipeline[str]) -> None:
    """One packet for all, and each task gets the replies to its own commands."""
    first = await hold(server, pipeline)
    others = [asyncio.create_task(pipeline.ask([f"a{n}", f"b{n}"], 4)) for n in range(3)]
    await asyncio.sleep(0)
    server.gate.set()

    assert await first == ["FIRST"]
    assert await asyncio.gather(*others) == [["A0", "B0"], ["A1", "B1"], ["A2", "B2"]]
    assert server.packets == [["first"], ["a0", "b0", "a1", "b1", "a2", "b2"]]
    assert await pipeline.ask(["later"], 5) == ["LATER"]


async def test_what_is_large_goes_by_itself(server: Server, pipeline: AutoPipeline[str]) -> None:
    """It holds up no packet of small ones before it."""
    first = await hold(server, pipeline)
    others = [asyncio.create_task(pipeline.ask([name], size)) for name, size in (("a", 9), ("b", 70_000), ("c", 9))]
    await asyncio.sleep(0)
    server.gate.set()
    await asyncio.gather(first, *others)

    assert server.packets == [["first"], ["a"], ["b"], ["c"]]


async def test_no_answer_is_none_for_all(server: Server, pipeline: AutoPipeline[str]) -> None:
    """A packet that met a fault is answered to nobody, and the next one is tried."""
    first = await hold(server, pipeline)
    others = [asyncio.create_task(pipeline.ask([f"a{n}"], 2)) for n in range(3)]
    await asyncio.sleep(0)
    server.answers = False
    server.gate.set()

    assert await asyncio.gather(first, *others) == [None] * 4
    server.answers = True
    assert await pipeline.ask(["later"], 5) == ["LATER"]


async def test_a_cancelled_task_takes_nothing_from_others(server: Server, pipeline: AutoPipeline[str]) -> None:
    """Who is cancelled before the packet goes out is left out of it; who is cancelled later loses his reply alone."""
    first = await hold(server, pipeline)
    early, late, kept = [asyncio.create_task(pipeline.ask([name], 5)) for name in ("early", "late", "kept")]
    await asyncio.sleep(0)
    early.cancel()
    first.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert server.packets == [["first"], ["late", "kept"]]
    late.cancel()
    server.gate.set()

    assert await kept == ["KEPT"]
    assert first.cancelled()
    assert early.cancelled()
    assert late.cancelled()
    await pipeline.close()
    assert len(asyncio.all_tasks()) == 1


async def test_a_loop_that_ends_leaves_nobody_waiting(server: Server, pipeline: AutoPipeline[str]) -> None:
    """Where the task that sends is cancelled with all others, those who wait for it are not left behind."""
    first = await hold(server, pipeline)
    second = asyncio.create_task(pipeline.ask(["second"], 6))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    third = asyncio.create_task(pipeline.ask(["third"], 5))
    await asyncio.sleep(0)
    (sending,) = asyncio.all_tasks() - {asyncio.current_task(), second, third}
    sending.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait({second, third})

    assert second.cancelled()
    assert third.cancelled()
    server.gate.set()
    assert await pipeline.ask(["later"], 5) == ["LATER"]


async def test_ten_thousand_questions_with_cancellations_get_their_own_answers() -> None:
    """Under random pauses and cancellations nobody gets the reply to what another one asked."""
    rng = random.Random(7)
    answered = 0

    async def send(commands: Sequence[str]) -> list[Any] | None:
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
        return [command.upper() for command in commands] if rng.random() > 0.01 else None

    pipeline = AutoPipeline(send)

    async def ask(number: int) -> None:
        nonlocal answered
        commands = [f"n{number}-{part}" for part in range(rng.randrange(1, 4))]
        replies = await pipeline.ask(commands, rng.choice([10, 10, 70_000]))
        assert replies in (None, [command.upper() for command in commands])
        answered += replies is not None

    for start in range(0, 10_000, 100):
        tasks = [asyncio.create_task(ask(start + number)) for number in range(100)]
        await asyncio.sleep(0)
        for task in rng.sample(tasks, 20):
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}

    assert answered > 5_000
    assert pipeline._waiting == type(pipeline._waiting)()
    assert await pipeline.ask(["later"], 5) in (None, ["LATER"])
