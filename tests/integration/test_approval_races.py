"""Very many at once, over processes: one decision and one use for each approval."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from agent_gateway_store import GatewayStore, StoreSettings, errors
from builders import CALL, make_request
from proofs.harness import child

pytestmark = [pytest.mark.usefixtures("no_plugins"), pytest.mark.system]

# A Redis that is too slow on a busy machine would be done without, and a reader may then see an old status for a while.
PATIENT = StoreSettings(redis_timeout_seconds=30)
WORKERS = 4
SIZES = [(5, 100), pytest.param(100, 1_000, marks=pytest.mark.slow)]
"""Tokens, and how many decide and then use each of them."""

SERVING = """
import asyncio, sys
from integration.test_approval_races import serve

asyncio.run(serve(*sys.argv[1:3]))
"""

Tally = list[list[Any]]
"""How often each answer was given: kind, status, who decided, count."""


async def told(answer: Awaitable[Any]) -> tuple[str, str | None, str | None]:
    """Return the kind of an answer, and the status and the approver that it names."""
    try:
        result = await answer
    except errors.GatewayStoreError as exc:
        return type(exc).__name__, getattr(exc, "status", None), getattr(exc, "approver_id", None)
    return "won", str(result.status), result.approver_id


async def crowd(store: GatewayStore, step: str, token: str, worker: int, number: int) -> Tally:
    """Let `number` tasks do one step with one token at once."""

    def one(index: int) -> Awaitable[Any]:
        if step == "consume":
            return store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
        # Who comes first often wins, and that is not the same voice for every token.
        decide = store.approvals.approve if (index + ord(token[0])) % 4 else store.approvals.deny
        return decide(token, f"approver-{worker}-{index}")

    answers = Counter(await asyncio.gather(*(told(one(index)) for index in range(number))))
    return [[*answer, count] for answer, count in answers.items()]


async def serve(database_url: str, redis_url: str) -> None:
    """Do what the lines of the input say, as one of several processes."""
    async with GatewayStore(database_url, redis_url=redis_url, settings=PATIENT) as store:
        print("open", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await crowd(store, *json.loads(line))), flush=True)


def judge(deciding: list[Tally], using: list[Tally], *, number: int) -> str:
    """Return the status that won; fail unless there was one winner of each step, and all others were told of it."""
    decided = merged(deciding)
    ((_, status, winner),) = [answer for answer in decided if answer[0] == "won"]
    assert decided == {("won", status, winner): 1, ("ApprovalAlreadyDecidedError", status, winner): number - 1}
    used = merged(using)
    if status == "APPROVED":
        assert used == {("won", "USED", winner): 1, ("ApprovalAlreadyUsedError", "USED", winner): number - 1}
    else:
        assert used == {("ApprovalNotApprovedError", status, winner): number}
    return str(status)


def merged(tallies: list[Tally]) -> Counter[tuple[Any, ...]]:
    total: Counter[tuple[Any, ...]] = Counter()
    for *answer, count in (line for tally in tallies for line in tally):
        total[tuple(answer)] += count
    return total


def report(what: str, statuses: list[str], number: int, start: float) -> None:
    seconds = time.monotonic() - start
    print(f"{what}: {len(statuses)} tokens x {number}, {dict(Counter(statuses))}, {seconds:.1f} s")
    assert len(statuses) < 100 or {"APPROVED", "DENIED"} == set(statuses)


@pytest.mark.parametrize(("tokens", "number"), SIZES)
async def test_one_of_many_processes_wins(
    migrated_postgres_database: Callable[[], str], fresh_redis_url: str, tokens: int, number: int
) -> None:
    """Four processes on one PostgreSQL and one Redis decide and then use the same approvals at the same moment."""
    url, start, statuses = migrated_postgres_database(), time.monotonic(), []
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(GatewayStore(url, redis_url=fresh_redis_url, settings=PATIENT))
        workers = [await stack.enter_async_context(child(SERVING, url, fresh_redis_url)) for _ in range(WORKERS)]

        async def everywhere(step: str, token: str) -> list[Tally]:
            for index, process in enumerate(workers):
                process.stdin.write(f"{json.dumps([step, token, index, number // WORKERS])}\n".encode())
            return [json.loads(await process.stdout.readline()) for process in workers]

        for _ in range(tokens):
            token = await store.approvals.issue_token(make_request())
            deciding = await everywhere("decide", token)
            statuses.append(judge(deciding, await everywhere("consume", token), number=number))
            final = {"APPROVED": "USED"}.get(statuses[-1], statuses[-1])
            assert (await store.approvals.check_token(token)).status == final
            assert (await store.approvals.check_token(token, fresh=True)).status == final
    report("processes", statuses, number, start)
