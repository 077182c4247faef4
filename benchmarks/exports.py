"""Bulk reads and exports beside ADBC, and how much memory an export takes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from agent_gateway_store import GatewayStore
from agent_gateway_store.audit.selects import FIELDS
from benchmarks.filling import database, fill
from benchmarks.report import Figure

LIMIT_MB = 250.0
_EXPORT = """
import asyncio, sys
from agent_gateway_store import GatewayStore
from benchmarks.memory import own_peak_mb

async def main():
    async with GatewayStore(sys.argv[1], redis_url="") as store:
        await store.audit.export(sys.argv[2])

asyncio.run(main())
print(own_peak_mb())
"""


async def measure(url: str, *, repeat: int, rows: int, folder: Path | None) -> list[Figure]:
    """Measure on `rows` events, and the memory also on a tenth of them."""
    async with database(url) as made:
        await fill(made, 1, rows // 10)
        few = [await _peak_mb(made, folder) for _ in range(repeat)]
        await fill(made, rows // 10 + 1, rows)
        peak = Figure("Parquet export, peak memory", "MB", f"the limit of {LIMIT_MB:.0f} MB", 1, more_is_better=False)
        peak.ours = [await _peak_mb(made, folder) for _ in range(repeat)]
        peak.limit, peak.facts = [LIMIT_MB] * repeat, {"rows": rows}
        flat = Figure("Parquet export, ten times the rows", "MB", f"at {rows // 10:,} rows", 1.15, more_is_better=False)
        flat.ours, flat.limit, flat.facts = peak.ours, few, {"rows": rows}
        return [await _to_arrow(made, repeat, rows), peak, flat]


async def _to_arrow(url: str, repeat: int, rows: int) -> Figure:
    figure = Figure(f"to_arrow of {rows:,} rows", "rows/s", "ADBC reading the same SELECT", 0.4)
    async with GatewayStore(url, redis_url="") as store:
        await store.audit.to_arrow(caller_id="nobody")  # what is imported at the first use
        for _ in range(repeat):
            start = time.perf_counter()
            table = await store.audit.to_arrow()
            figure.ours.append(table.num_rows / (time.perf_counter() - start))
            del table
            figure.limit.append(rows / await asyncio.to_thread(_adbc_seconds, url, rows))
    figure.facts = {"rows": rows}
    return figure


def _adbc_seconds(url: str, rows: int) -> float:
    from adbc_driver_postgresql import dbapi

    with dbapi.connect(url) as connection, connection.cursor() as cursor:
        start = time.perf_counter()
        cursor.execute(f"SELECT {', '.join(FIELDS)} FROM audit_events ORDER BY timestamp DESC, id DESC")
        assert cursor.fetch_arrow_table().num_rows == rows
        return time.perf_counter() - start


async def _peak_mb(url: str, folder: Path | None) -> float:
    """Return the peak resident memory of a process that exports everything to one Parquet file."""
    with tempfile.TemporaryDirectory(dir=folder) as there:
        command = [sys.executable, "-c", _EXPORT, url, f"{there}/events.parquet"]
        ended = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
        return float(ended.stdout)
