"""The pages of the console beside the calls of the API that they stand on, for twenty people at once."""

from __future__ import annotations

import asyncio
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import httpx

from agent_gateway_store import GatewayStore, StoreSettings
from benchmarks.approvals import ask_many
from benchmarks.filling import database, fill
from benchmarks.report import Figure

_PEOPLE = 20
_PENDING = 1_000
# What the template, the server and the browser's side of HTTP may add to three times the call.
_PAGE_MS = 15.0
_SEARCH = {"caller_id": "agent-7", "decision": "DENY"}


async def measure(url: str, *, repeat: int, rows: int, scale: float) -> list[Figure]:
    """Measure `gateway-store console` on a database of our own with so many events, in a process of its own."""
    count = max(2, int(10 * scale))
    figures = [
        Figure(name, "ms", "3 x the call of the API + 15 ms, median", 1.0, more_is_better=False)
        for name in (f"console: inbox, {_PENDING:,} pending", f"console: audit search, {rows:,} events")
    ]
    settings = StoreSettings(audit_seal_seconds=0)
    async with database(url) as made:
        await fill(made, 1, rows)
        async with GatewayStore(made, redis_url="", settings=settings) as store:
            for request in ask_many(_PENDING):
                await store.approvals.issue_token(request)
            key = (await store.keys.issue("alice", role="approver")).plaintext.get_secret_value()
            with _served(made) as address:
                async with httpx.AsyncClient(base_url=address, timeout=60) as client:
                    signed_in = await client.post("/login", data={"key": key})
                    assert signed_in.status_code == 303, signed_in.text
                    for _ in range(repeat):
                        await _turn(figures[0], client, "/approvals", _inbox(store), count)
                        path = "/audit?" + "&".join(f"{name}={value}" for name, value in _SEARCH.items())
                        await _turn(figures[1], client, path, _search(store), count)
    return figures


def _inbox(store: GatewayStore) -> Callable[[], Awaitable[object]]:
    return lambda: store.approvals.search(status="PENDING", limit=50)


def _search(store: GatewayStore) -> Callable[[], Awaitable[object]]:
    return lambda: store.audit.search(limit=50, caller_id="agent-7", decision="DENY")


async def _turn(
    figure: Figure, client: httpx.AsyncClient, path: str, call: Callable[[], Awaitable[object]], count: int
) -> None:
    async def page() -> None:
        answer = await client.get(path)
        assert answer.status_code == 200, answer.text

    api, ours = await _median_ms(call, count), await _median_ms(page, count)
    figure.limit.append(3 * api + _PAGE_MS)
    figure.ours.append(ours)
    figure.facts = {"people": _PEOPLE, "call of the API, ms": api}


async def _median_ms(work: Callable[[], Awaitable[object]], count: int) -> float:
    """Return the median of the times that twenty tasks measure, each of which goes on when it has its answer."""
    taken: list[float] = []

    async def person() -> None:
        for _ in range(count):
            start = time.perf_counter()
            await work()
            taken.append((time.perf_counter() - start) * 1000)

    await work()
    await asyncio.gather(*(person() for _ in range(_PEOPLE)))
    return statistics.median(taken)


@contextmanager
def _served(url: str) -> Iterator[str]:
    command = [sys.executable, "-m", "agent_gateway_store.cli", "console", "--port", "18765"]
    environment = os.environ | {"DATABASE_URL": url, "REDIS_URL": "", "AUDIT_SEAL_SECONDS": "0"}
    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    found = None
    while found is None:
        found = re.search(r"http://[0-9.:]+", server.stderr.readline())
    address, end = found[0], time.monotonic() + 30
    while True:
        try:
            httpx.get(f"{address}/healthz")
            break
        except httpx.TransportError:
            assert time.monotonic() < end, "the console did not start"
            time.sleep(0.1)
    try:
        yield address
    finally:
        server.terminate()
        server.communicate()
