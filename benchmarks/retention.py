"""Retention: how fast a prune is, what it costs others, and how much room it gives back."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import asyncpg

from agent_gateway_store import GatewayStore, StoreSettings
from benchmarks.audit_writes import concurrently, timed
from benchmarks.events import events
from benchmarks.exports import LIMIT_MB
from benchmarks.filling import database, fill
from benchmarks.memory import own_peak_mb
from benchmarks.report import Figure

_SIZE = "SELECT pg_total_relation_size('audit_events')"
_MIDDLE = "SELECT timestamp FROM audit_events ORDER BY timestamp, id OFFSET $1 LIMIT 1"
_SETTINGS = StoreSettings(audit_seal_seconds=0)


async def measure(url: str, *, repeat: int, rows: int, scale: float, folder: Path | None) -> list[Figure]:
    """Measure on databases of our own, each of `rows` events, of which the older half is pruned."""
    figures = []
    with tempfile.TemporaryDirectory(dir=folder) as there:
        figures += await _half(url, rows, Path(there))
        figures.append(await _beside_writers(url, repeat, int(20_000 * scale), rows // 4, Path(there)))
    return figures


async def _half(url: str, rows: int, folder: Path) -> list[Figure]:
    speed = Figure(f"prune with archive, {rows // 2:,} of {rows:,}", "events/s", "Parquet export of the same", 0.5)
    reads = Figure("list_recent(100) while pruning, median", "ms", "before", 1.5, more_is_better=False)
    after = Figure("list_recent(100) after pruning, median", "ms", "before", 1.5, more_is_better=False)
    size = Figure("audit_events, half pruned and refilled", "MB", "the size before", 1.15, more_is_better=False)
    memory = Figure("prune, peak memory", "MB", f"the limit of {LIMIT_MB:.0f} MB", 1, more_is_better=False)
    async with database(url) as made, GatewayStore(made, redis_url="", settings=_SETTINGS) as store:
        await fill(made, 1, rows)
        await store.evidence.seal()
        driver = await asyncpg.connect(made)
        await driver.execute("VACUUM ANALYZE audit_events")
        before: datetime = await driver.fetchval(_MIDDLE, rows // 2)
        size.limit.append(await driver.fetchval(_SIZE) / 2**20)
        exported = await timed(store.audit.export(folder / "half.parquet", until=before))
        reads.limit.append(await _recent_ms(store))
        after.limit = reads.limit
        pruning = asyncio.create_task(asyncio.to_thread(_pruned, made, before, folder / "archive"))
        during = []
        while not pruning.done():
            during.append(await _recent_ms(store, 5))
            # A reader, not a load that the prune must share two cores with.
            await asyncio.sleep(0.1)
        seconds, peak = pruning.result()
        speed.ours, speed.limit = [rows // 2 / seconds], [rows // 2 / exported]
        reads.ours = [statistics.median(during)]
        after.ours.append(await _recent_ms(store))
        memory.ours, memory.limit = [peak], [LIMIT_MB]
        # Beside a gateway, as always: PostgreSQL uses the pages that a VACUUM emptied once a transaction has come.
        writing = asyncio.create_task(_write_on(store))
        await driver.execute("VACUUM audit_events")
        writing.cancel()
        await fill(made, rows + 1, rows + rows // 2)
        size.ours.append(await driver.fetchval(_SIZE) / 2**20)
        await driver.close()
    return [speed, reads, after, size, memory]


async def _beside_writers(url: str, repeat: int, count: int, rows: int, folder: Path) -> Figure:
    figure = Figure("write, 64 writers, while pruning", "events/s", "the same without", 0.7)
    for number in range(repeat):
        async with database(url) as made, GatewayStore(made, redis_url="", settings=_SETTINGS) as store:
            await fill(made, 1, rows)
            await store.evidence.seal()
            driver = await asyncpg.connect(made)
            before: datetime = await driver.fetchval(_MIDDLE, rows - 1)
            await driver.close()
            figure.limit.append(count / await timed(concurrently(store.audit.write, list(events(count)))))
            written = list(events(2 * count))[count:]
            pruning = asyncio.create_task(asyncio.to_thread(_pruned, made, before, folder / f"beside-{number}"))
            figure.ours.append(count / await timed(concurrently(store.audit.write, written)))
            await pruning
    figure.facts = {"events": count, "pruned": rows}
    return figure


async def _write_on(store: GatewayStore) -> None:
    for event in events(1_000_000):
        await store.audit.write(event)
        await asyncio.sleep(0.01)


async def _recent_ms(store: GatewayStore, count: int = 50) -> float:
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        await store.audit.list_recent(limit=100)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1000


def _pruned(url: str, before: datetime, archive: Path) -> tuple[float, float]:
    """Prune in a process of its own; return its seconds and its peak resident memory in MB."""
    command = [sys.executable, "-m", "benchmarks.retention", url, before.isoformat(), str(archive)]
    seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), float(peak)


async def _prune(url: str, before: str, archive: str) -> float:
    async with GatewayStore(url, redis_url="", settings=_SETTINGS) as store:
        start = time.perf_counter()
        await store.retention.prune(before, by="benchmark", archive=archive, below_floor=True)
        return time.perf_counter() - start


if __name__ == "__main__":
    print(asyncio.run(_prune(*sys.argv[1:])), own_peak_mb())
