"""One, two and four gateways on one server, beside as many processes of COPY; and a reader beside a steady load.

Run as a program it is one of those processes: it says "ready", waits for a line, works, and prints what it used.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from typing import Any

import asyncpg

from agent_gateway_store import GatewayStore
from agent_gateway_store.audit.document import COLUMNS
from benchmarks.audit_writes import WRITERS, concurrently, records
from benchmarks.events import events
from benchmarks.report import Figure

PROCESSES = (1, 2, 4)
# Of the goal: 200 writes a second for a minute.
_WRITES_A_SECOND, _READING_S = 200, 60


async def measure(url: str, *, repeat: int, scale: float) -> list[Figure]:
    """Measure on PostgreSQL; ours and the limit in turn."""
    figures = [
        Figure(f"write, {count} x {WRITERS} writers", "events/s", f"{count} x COPY of {WRITERS}", 0.45)
        for count in PROCESSES
    ]
    p99 = Figure(
        "list_recent(100), p99 beside writes", "ms", f"its median, {_WRITES_A_SECOND} writes/s", 5, more_is_better=False
    )
    async with GatewayStore(url, redis_url="", auto_migrate=True) as store:
        for _ in range(repeat):
            for figure, count in zip(figures, PROCESSES, strict=True):
                await _side_by_side(url, figure, count, int(20_000 * scale))
            await _read_beside_writes(store, p99, _READING_S * min(scale, 1))
    return [*figures, p99]


async def _side_by_side(url: str, figure: Figure, processes: int, count: int) -> None:
    driver = await asyncpg.connect(url)
    try:
        await driver.execute("CHECKPOINT")
        before = await _written(driver)
        seconds, used = await _work(url, "write", processes, count)
        after = await _written(driver)
        figure.ours.append(processes * count / seconds)
        figure.facts = {
            "events": processes * count,
            "µs of CPU an event, in the gateways": used / (processes * count) * 1e6,
            "bytes of WAL an event": (after[0] - before[0]) / (processes * count),
            "bytes of table and indexes an event": (after[1] - before[1]) / (processes * count),
        }
        seconds, _ = await _work(url, "copy", processes, count)
        figure.limit.append(processes * count / seconds)
    finally:
        await driver.close()


async def _written(driver: asyncpg.Connection) -> tuple[int, int]:
    """Return the bytes of WAL so far, and those of the table with its indexes."""
    found = await driver.fetchrow(
        "SELECT (pg_current_wal_lsn() - '0/0'::pg_lsn)::bigint, pg_total_relation_size('audit_events')"
    )
    return found[0], found[1]


async def _work(url: str, kind: str, processes: int, count: int) -> tuple[float, float]:
    """Return the seconds from the common start to the end of the last process, and the CPU seconds of them all."""
    command = [sys.executable, "-m", "benchmarks.processes", url, kind, str(count)]
    pipe = asyncio.subprocess.PIPE
    started = [await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe) for _ in range(processes)]
    for process in started:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    start = time.perf_counter()
    for process in started:
        assert process.stdin is not None
        process.stdin.write(b"\n")
    answers = [json.loads((await process.communicate())[0]) for process in started]
    return max(each["end"] for each in answers) - start, sum(each["cpu"] for each in answers)


async def _read_beside_writes(store: GatewayStore, figure: Figure, seconds: float) -> None:
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def write() -> None:
        due = time.perf_counter()
        for event in events(int(seconds * _WRITES_A_SECOND)):
            due += 1 / _WRITES_A_SECOND
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if time.perf_counter() > end:
                return
            await store.audit.write(event)

    async def read() -> None:
        while time.perf_counter() < end:
            start = time.perf_counter()
            await store.audit.list_recent(100)
            times.append((time.perf_counter() - start) * 1000)
            await asyncio.sleep(0.01)

    await asyncio.gather(write(), read())
    figure.ours.append(statistics.quantiles(times, n=100)[-1])
    figure.limit.append(statistics.median(times))
    figure.facts = {"reads": len(times), "slowest, ms": max(times)}


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


async def _begin() -> float:
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    return time.process_time()


async def work(url: str, kind: str, count: int) -> None:
    """Write `count` events as a gateway does, or copy them."""
    if kind == "copy":
        driver = await asyncpg.connect(url)
        ready = records(count)
        before = await _begin()
        for start in range(0, count, WRITERS):
            await driver.copy_records_to_table("audit_events", records=ready[start : start + WRITERS], columns=COLUMNS)
        _say(end=time.perf_counter(), cpu=time.process_time() - before)
        await driver.close()
        return
    async with GatewayStore(url, redis_url="") as store:
        written = list(events(count))
        await store.audit.write_many(events(100))
        before = await _begin()
        await concurrently(store.audit.write, written)
        _say(end=time.perf_counter(), cpu=time.process_time() - before)


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1], sys.argv[2], int(sys.argv[3])))
