"""`approvals.acquire` by very many callers at once, over processes and over threads: one of them runs."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from random import Random
from typing import Any
from uuid import uuid4

import pytest

from agent_gateway_store import ApprovalRequest, ApprovalResult, GatewayStore, ToolCall
from proofs.harness import child

pytestmark = [pytest.mark.usefixtures("no_plugins"), pytest.mark.system]

WORKERS = 4
SIZES = [(3, 10), pytest.param(100, 50, marks=pytest.mark.slow)]
"""Approvals, and how many callers of each process want to use each of them."""

SERVING = """
import asyncio, sys
from integration.test_acquire_crowds import serve

asyncio.run(serve(sys.argv[1]))
"""


def wanted(number: int, caller_id: str = "dev-agent") -> ApprovalRequest:
    call = ToolCall(server="files", tool="delete_file", arguments={"number": number})
    return ApprovalRequest(request_id=uuid4().hex, caller_id=caller_id, tool_call=call, risk_explanation="deletes")


async def crowd(store: GatewayStore, number: int, callers: int) -> list[str]:
    """Let so many tasks acquire one call at once."""
    results = await asyncio.gather(*(store.approvals.acquire(wanted(number)) for _ in range(callers)))
    return [f"{result.status} {result.approval_id}" for result in results]


async def serve(url: str) -> None:
    """Do what the lines of the input say, as one of several processes."""
    async with GatewayStore(url, redis_url="") as store:
        print("open", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await crowd(store, *json.loads(line))), flush=True)


def judge(asked: ApprovalResult, answers: list[str]) -> None:
    """Fail unless one caller runs, by the approval that was given, and all others share the next question."""
    counted = Counter(answers)
    assert counted.pop(f"USED {asked.approval_id}") == 1
    ((pending, count),) = counted.items()
    assert (pending.split()[0], count) == ("PENDING", len(answers) - 1)


async def ask_and_approve(store: GatewayStore, number: int) -> ApprovalResult:
    asked = await store.approvals.acquire(wanted(number))
    return await store.approvals.approve(approval_id=asked.approval_id, approver_id="approver-1")


@pytest.mark.parametrize("rounds", [20, pytest.param(1_000, marks=pytest.mark.slow)])
async def test_no_release_goes_to_the_wrong_agent(migrated_postgres_database: Callable[[], str], rounds: int) -> None:
    """Two agents ask for the same call and for different ones, in every order, while a human decides about some."""
    order = Random(16)
    async with GatewayStore(migrated_postgres_database(), redis_url="") as store:
        for number in range(rounds):
            agents = [f"agent-{number}-{each}" for each in "ab"]
            # Numbers 0 and 1 are wanted by both, 2 and 3 by one each.
            wants = [(agents[0], 0), (agents[0], 1), (agents[0], 2), (agents[1], 0), (agents[1], 1), (agents[1], 3)]
            asked = {want: await store.approvals.acquire(wanted(want[1], want[0])) for want in wants}
            approved = {want for want in wants if order.random() < 0.5}

            async def decide(want: tuple[str, int], asked: dict[Any, ApprovalResult] = asked) -> None:
                await store.approvals.approve(approval_id=asked[want].approval_id, approver_id="alice")

            async def run(want: tuple[str, int]) -> tuple[tuple[str, int], ApprovalResult]:
                return want, await store.approvals.acquire(wanted(want[1], want[0]))

            steps: list[Any] = [decide(want) for want in approved] + [run(want) for want in wants * 2]
            order.shuffle(steps)
            answers = [each for each in await asyncio.gather(*steps) if each is not None]
            answers += [await run(want) for want in wants]
            released = [(want, result.approval_id) for want, result in answers if result.status == "USED"]
            assert sorted(released) == sorted((want, asked[want].approval_id) for want in approved)


@pytest.mark.parametrize(("approvals", "callers"), SIZES)
async def test_one_of_many_processes_runs(
    migrated_postgres_database: Callable[[], str], approvals: int, callers: int
) -> None:
    url = migrated_postgres_database()
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(GatewayStore(url, redis_url=""))
        workers = [await stack.enter_async_context(child(SERVING, url)) for _ in range(WORKERS)]
        for number in range(approvals):
            asked = await ask_and_approve(store, number)
            for process in workers:
                process.stdin.write(f"{json.dumps([number, callers])}\n".encode())
            judge(asked, [answer for process in workers for answer in json.loads(await process.stdout.readline())])
