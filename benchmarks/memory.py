"""Peak memory of `write_many` over generated events: each size in a process of its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from agent_gateway_store import GatewayStore
from benchmarks.events import events
from benchmarks.report import Figure


async def _write(url: str, count: int) -> None:
    async with GatewayStore(url, redis_url="") as store:
        await store.audit.write_many(events(count))


def peak_mb(url: str, count: int) -> float:
    """Return the peak resident memory of a process that writes `count` events, in MB."""
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", url, str(count)], check=True, capture_output=True, text=True
    )
    return float(answer.stdout)


def measure(url: str, *, scale: float) -> list[Figure]:
    """Measure a million events beside a hundred thousand."""
    figure = Figure("memory of write_many, 10 x the events", "MB", "its peak over a tenth", 1.2, more_is_better=False)
    few = int(100_000 * scale)
    figure.limit.append(peak_mb(url, few))
    figure.ours.append(peak_mb(url, few * 10))
    figure.facts = {"events": few * 10}
    return [figure]


def own_peak_mb() -> float:
    """Return the peak resident memory of this process so far, in MB."""
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


if __name__ == "__main__":
    asyncio.run(_write(sys.argv[1], int(sys.argv[2])))
    print(own_peak_mb())
