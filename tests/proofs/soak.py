"""What a gateway holds that works for a long time: `python -m tests.proofs.soak SECONDS` prints by how much it grew.

One open store on PostgreSQL and Redis writes, reads, asks, decides, waits and uses, and five reads a second are
cancelled. What it holds (memory, descriptors, tasks, threads) must not grow.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

sys.path.insert(0, str(Path(__file__).parent.parent))

import servers
from agent_gateway_store import ApprovalRequest, GatewayStore, StoreSettings, ToolCall
from builders import make_event

CALL = ToolCall(server="files", tool="delete_file", arguments={"path": "/tmp/report.txt"})
CANCELLED_A_SECOND = 5
# Of a few samples, all could be taken while a call waits.
SAMPLES_A_SECOND = 4
Sample = dict[str, float]


def ask() -> ApprovalRequest:
    return ApprovalRequest(request_id=uuid4().hex, caller_id="dev-agent", tool_call=CALL, risk_explanation="deletes")


def held() -> Sample:
    """Count what this process holds."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_mb": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "tasks": len(asyncio.all_tasks()),
        "threads": threading.active_count(),
    }


async def call(store: GatewayStore, plaintext: str) -> None:
    """One call as a gateway makes it, with an approval."""
    await store.keys.verify(plaintext)
    request = ask()
    token = await store.approvals.issue_token(request)
    # In a group, so that a cancelled call leaves none waiting.
    async with asyncio.TaskGroup() as group:
        group.create_task(store.approvals.wait_for_decision(token, timeout_s=30))
        await store.approvals.approve(token, "anna")
    await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    await store.audit.write(make_event(request_id=request.request_id))


async def cancelled(store: GatewayStore, token: str, rng: random.Random) -> None:
    """Begin a read, and cancel it before, while or after it is answered."""
    reads: Sequence[Callable[[], Awaitable[Any]]] = (
        lambda: store.audit.search(limit=200),
        lambda: store.audit.stats(["tool_name"]),
        lambda: store.audit.to_arrow(caller_id="dev-agent", since="10s"),
        lambda: store.approvals.check_token(token, fresh=True),
        lambda: store.approvals.wait_for_decision(token, timeout_s=30),
        lambda: store.approvals.list_requests("PENDING"),
    )
    task = asyncio.ensure_future(rng.choice(reads)())
    try:
        await asyncio.sleep(rng.choice((0, 0.001, 0.005, 0.02)))
    finally:
        # Also at the end of the run, so that no read outlives the store.
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.gather(asyncio.sleep(seconds), work())


async def soak(url: str, redis_url: str, seconds: int) -> list[Sample]:
    """Work for so long; return the samples."""
    rng, samples = random.Random(7), list[Sample]()
    # Longer than a busy machine holds a process up, so that a warning of the store is about the store.
    settings = StoreSettings(redis_timeout_seconds=10)
    async with GatewayStore(url, redis_url=redis_url, settings=settings, auto_migrate=True) as store:
        issued = await store.keys.issue("dev-agent", role="developer")
        token = await store.approvals.issue_token(ask())
        # What it loads the first time is no growth.
        await store.audit.to_arrow()
        working = [
            asyncio.create_task(every(0.05, lambda: call(store, issued.plaintext))),
            asyncio.create_task(every(1 / CANCELLED_A_SECOND, lambda: cancelled(store, token, rng))),
        ]
        for _ in range(seconds * SAMPLES_A_SECOND):
            await asyncio.wait(working, timeout=1 / SAMPLES_A_SECOND, return_when=asyncio.FIRST_EXCEPTION)
            for task in working:
                if task.done():
                    task.result()
            samples.append(held())
        for task in working:
            task.cancel()
        await asyncio.wait(working)
    return samples


def growth(samples: Sequence[Sample]) -> Sample:
    """By how much the least of the last third is above the most of the second: what comes and goes does not count."""
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[-third:]
    return {name: min(each[name] for each in last) - max(each[name] for each in middle) for name in samples[0]}


def main(seconds: int) -> None:
    with servers.PostgresServer() as database, servers.RedisServer() as redis:
        samples = asyncio.run(soak(database.url, redis.url, seconds))
    print(json.dumps({"growth": growth(samples), "first": samples[0], "last": samples[-1]}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
