"""Verifying API keys: known ones, new ones, and good ones among many wrong ones."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections import Counter
from collections.abc import Awaitable

import bcrypt
from sqlalchemy import insert, text

from agent_gateway_store import GatewayStore, IssuedKey, StoreSettings, errors
from agent_gateway_store.clock import utc_now
from agent_gateway_store.keys.format import digest, new_key, new_key_id
from agent_gateway_store.models.keys import ApiKey, TrustLevel
from benchmarks.report import Figure

STORED = 10_000
WRONG_PER_S = 200
LONGEST_STALL_MS = 20
_keys = ApiKey.__table__


async def fill(store: GatewayStore) -> list[str]:
    """Store 10,000 keys, which share one cheap hash, and return their ids."""
    shared = bcrypt.hashpw(b"nobody", bcrypt.gensalt(4)).decode()
    common = {
        "org_id": "default",
        "key_hash": shared,
        "role": "developer",
        "trust_level": TrustLevel.LOW,
        "environment": "bench",
        "is_active": True,
        "created_at": utc_now(),
    }
    ids = [new_key_id() for _ in range(STORED)]
    async with store.database.write() as connection:
        await connection.execute(text("DELETE FROM api_keys"))
        await connection.execute(
            insert(_keys), [{**common, "key_id": key_id, "caller_id": f"stored-{key_id}"} for key_id in ids]
        )
    return ids


async def measure(url: str, *, repeat: int, scale: float) -> list[Figure]:
    """Measure on PostgreSQL without Redis, with 10,000 keys stored and the default cost of bcrypt."""
    warm = Figure("verify, warm, one core", "verifications/s", "20,000 a second", 1)
    cold = Figure("verify, cold, median", "ms", "one bcrypt of the same cost", 1.1, more_is_better=False)
    stall = Figure("longest stall under 200 wrong keys/s", "ms", "20 ms", 1, more_is_better=False)
    good = Figure("known keys under 200 wrong keys/s, slowest", "ms", "20 ms", 1, more_is_better=False)
    settings = StoreSettings(bcrypt_rounds=10)
    async with GatewayStore(url, redis_url="", settings=settings, auto_migrate=True) as store:
        ids = await fill(store)
        issued = await store.keys.issue("bench-agent", role="developer")
        for number in range(repeat):
            await _warm(store, issued, warm, int(200_000 * scale))
            await _cold(store, issued, cold, max(5, int(40 * scale)))
            await _flood(store, f"flood-{number}", ids, issued, stall, good, max(2.0, 5 * scale))
    for figure in (warm, cold, stall, good):
        figure.facts["keys stored"] = STORED
    return [warm, cold, stall, good]


async def _warm(store: GatewayStore, issued: IssuedKey, figure: Figure, count: int) -> None:
    verify, key = store.keys.verify, issued.plaintext.get_secret_value()
    await verify(key)
    start = time.process_time(), time.perf_counter()
    for _ in range(count):
        await verify(key)
    figure.ours.append(count / (time.perf_counter() - start[1]))
    figure.limit.append(20_000)
    figure.facts = {"verifications": count, "cpu seconds": time.process_time() - start[0]}


async def _timed(work: Awaitable[object]) -> float:
    start = time.perf_counter()
    await work
    return (time.perf_counter() - start) * 1000


async def _stall() -> tuple[float, float]:
    """Return by how many ms a timer is late, and how much of it this thread worked; the rest is the machine's."""
    cpu = time.thread_time()
    late = await _timed(asyncio.sleep(0.001)) - 1
    return late, (time.thread_time() - cpu) * 1000


async def _cold(store: GatewayStore, issued: IssuedKey, figure: Figure, count: int) -> None:
    key = issued.plaintext.get_secret_value()
    hashed, secret = issued.api_key.key_hash.encode(), digest(key)
    await store.keys.verify(key)  # its use is noted, as it is once a minute
    ours, limit = [], []
    for _ in range(count):
        forget(store)
        ours.append(await _timed(store.keys.verify(key)))
        limit.append(await _timed(asyncio.to_thread(bcrypt.checkpw, secret, hashed)))
    figure.ours.append(statistics.median(ours))
    figure.limit.append(statistics.median(limit))
    figure.facts = {"verifications": count}


def forget(store: GatewayStore) -> None:
    """Make a store as it was before it saw any key."""
    cache = store._core.key_cache
    cache.drop_all()
    for known in (cache.verifier._matched, cache.verifier._refused, cache.verifier._limits):
        known.clear()


async def _flood(
    store: GatewayStore, name: str, ids: list[str], issued: IssuedKey, stall: Figure, good: Figure, seconds: float
) -> None:
    """Send wrong keys of the measured key's id and of the others in turn, known keys, and new ones, for some time."""
    told: Counter[str] = Counter()
    known_ms: list[float] = []
    stalls: list[tuple[float, float]] = []
    key = issued.plaintext.get_secret_value()
    new = [await store.keys.issue(f"{name}-{number}", role="developer") for number in range(int(seconds))]
    forget(store)
    await store.keys.verify(key)
    # A full collection of what stands since the start (modules, the rows just stored) takes 80 ms and is nobody's here.
    gc.collect()
    gc.freeze()
    end = time.perf_counter() + seconds
    idle = 0.0
    while time.perf_counter() < end:
        idle = max(idle, (await _stall())[0])
    end = time.perf_counter() + seconds

    async def send(kind: str, plaintext: str) -> None:
        try:
            await store.keys.verify(plaintext)
            told[f"{kind}: good"] += 1
        except errors.InvalidApiKeyError:
            told[f"{kind}: invalid"] += 1
        except errors.StoreUnavailableError:
            told[f"{kind}: busy"] += 1

    async def attack(tasks: asyncio.TaskGroup) -> None:
        start, sent = time.perf_counter(), 0
        while time.perf_counter() < end:
            while sent < (time.perf_counter() - start) * WRONG_PER_S:
                key_id = issued.api_key.key_id if sent % 2 else ids[sent % len(ids)]
                tasks.create_task(send("wrong", new_key(key_id)))
                sent += 1
            await asyncio.sleep(0.002)

    async def work() -> None:
        while time.perf_counter() < end:
            known_ms.append(await _timed(send("known", key)))
            await asyncio.sleep(0.001)

    async def newcomers() -> None:
        for issued_now in new:
            await send("new", issued_now.plaintext.get_secret_value())
            await asyncio.sleep(0.5)

    async def watch() -> None:
        while time.perf_counter() < end:
            stalls.append(await _stall())

    async with asyncio.TaskGroup() as tasks:
        for running in (attack(tasks), work(), newcomers(), watch()):
            tasks.create_task(running)
    assert not told["new: invalid"]
    assert not told["known: invalid"] + told["known: busy"]
    longest, cpu_ms = max(stalls)
    stall.ours.append(longest)
    good.ours.append(max(known_ms))
    for figure in (stall, good):
        figure.limit.append(LONGEST_STALL_MS)
        figure.facts = {"seconds": seconds, "told": dict(told), "wrong keys per second": WRONG_PER_S}
    stall.facts |= {
        "99th percentile": statistics.quantiles([found[0] for found in stalls], n=100)[-1],
        "CPU ms of the event loop in the longest": cpu_ms,
        "longest of an idle loop beforehand": idle,
    }
