"""The sealed log: what sealing costs writers, how fast a backlog is sealed, verified and proved, and what it takes."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
from collections.abc import Sequence

import asyncpg

from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings
from benchmarks.audit_writes import concurrently, timed
from benchmarks.events import events
from benchmarks.filling import database, settle
from benchmarks.memory import own_peak_mb
from benchmarks.report import Figure

_TABLES = "'audit_leaves'::regclass, 'audit_tiles'::regclass, 'audit_checkpoints'::regclass"
# Of the rows: enough for ten batches of the sealer, and a tenth of the whole for the smaller of two peaks of memory.
_CHUNK = 100_000


def _settings(seal_s: float) -> StoreSettings:
    return StoreSettings(audit_seal_seconds=seal_s)


async def measure(url: str, *, repeat: int, rows: int, scale: float) -> list[Figure]:
    """Measure on databases of our own; the backlog is `rows` events."""
    return [await _beside_writers(url, repeat, int(40_000 * scale)), *await _backlog(url, repeat, rows)]


async def _beside_writers(url: str, repeat: int, count: int) -> Figure:
    figure = Figure("write, 64 writers, sealing every second", "events/s", "the same without sealing", 0.9)
    async with database(url) as made:
        sides = [(0.0, figure.limit), (1.0, figure.ours)]
        for number in range(2 * repeat):
            # Each side is first as often, for the table grows.
            for seal_s, samples in sides if number % 2 else sides[::-1]:
                written = list(events(count))
                async with GatewayStore(made, redis_url="", settings=_settings(seal_s)) as store:
                    await store.evidence.seal()
                    samples.append(count / await timed(concurrently(store.audit.write, written)))
    figure.facts = {"events": count}
    return figure


async def _backlog(url: str, repeat: int, rows: int) -> list[Figure]:
    sealing = Figure(f"sealing a backlog of {rows:,} events", "events/s", "write_many of the same, built before", 2)
    verifying = Figure(f"verify of {rows:,} events", "s", "to_arrow of the same", 4, more_is_better=False)
    proving = Figure(f"prove among {rows:,}, median", "ms", "a read by request id", 10, more_is_better=False)
    storage = Figure("leaves and tree", "bytes/event", "180 bytes", 1, more_is_better=False)
    flat = Figure("verify, memory, ten times the rows", "MB", "its peak over a tenth", 1.15, more_is_better=False)
    async with database(url) as made, GatewayStore(made, redis_url="", settings=_settings(0)) as store:
        for first in range(0, rows, _CHUNK):
            await _write_and_seal(store, list(events(min(_CHUNK, rows - first))), sealing)
            if first == 0:
                flat.limit.append(_peak_mb(made))
        await settle(made)
        for _ in range(repeat):
            verifying.ours.append(await timed(store.evidence.verify()))
            verifying.limit.append(await timed(store.audit.to_arrow()))
        await _prove(store, proving)
        flat.ours.append(_peak_mb(made))
        driver = await asyncpg.connect(made)
        size = await driver.fetchval(f"SELECT sum(pg_total_relation_size(t)) FROM unnest(ARRAY[{_TABLES}]) AS t")
        await driver.close()
    storage.ours, storage.limit = [float(size) / rows], [180.0]
    return [sealing, verifying, flat, proving, storage]


async def _write_and_seal(store: GatewayStore, written: Sequence[AuditEvent], figure: Figure) -> None:
    figure.limit.append(len(written) / await timed(store.audit.write_many(written)))
    figure.ours.append(len(written) / await timed(store.evidence.seal()))


async def _prove(store: GatewayStore, figure: Figure) -> None:
    ours, limit = [], []
    ids = [event.request_id for event in await store.audit.list_recent(limit=200)]
    for request_id in ids:
        ours.append(await timed(store.evidence.prove(request_id)))
        limit.append(await timed(store.audit.get_by_request_id(request_id)))
    figure.ours, figure.limit = [statistics.median(ours) * 1000], [statistics.median(limit) * 1000]


def _peak_mb(url: str) -> float:
    """Return the peak resident memory of a process that verifies the log, in MB."""
    command = [sys.executable, "-m", "benchmarks.evidence", url]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


async def _verify(url: str) -> None:
    async with GatewayStore(url, redis_url="", settings=_settings(0)) as store:
        found = await store.evidence.verify()
        assert found.ok, found


if __name__ == "__main__":
    asyncio.run(_verify(sys.argv[1]))
    print(own_peak_mb())
