"""What an event costs: CPU of gateway and server, WAL and disk; `python -m benchmarks.costs` prints two tables.

There is no limit beside these figures, and no goal: they are what servers are sized by.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import asyncpg

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import servers  # noqa: E402
from agent_gateway_store import GatewayStore  # noqa: E402
from benchmarks.events import events  # noqa: E402

# Events a second, and for how many seconds: enough of them that a page more or less does not count.
RATES = ((20, 20), (100, 20), (1_000, 10), (5_000, 6))
LOGS = (300_000, 1_000_000)
STEPS = (1_000, 9_000, 40_000, 150_000)
# Chosen: no checkpoint comes between those that are asked for.
SETTINGS = {"max_wal_size": "8GB", "checkpoint_timeout": "1h", "shared_buffers": "512MB"}


def server_cpu_s(pid: int) -> float:
    """Return the CPU seconds of a server on this machine, those of its processes that ended included."""
    ticks = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        # proc(5): after the name come state, parent, and at 11 to 14 its own times and those of ended children.
        if int(folder.name) == pid:
            ticks += sum(map(int, fields[11:15]))
        elif int(fields[1]) == pid:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def written(driver: asyncpg.Connection) -> tuple[int, int]:
    """Return the bytes of WAL so far, and those of the tables of the log."""
    found = await driver.fetchrow(
        "SELECT (pg_current_wal_lsn() - '0/0'::pg_lsn)::bigint, "
        "(SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relname LIKE 'audit_%' AND relkind = 'r')::bigint"
    )
    return found[0], found[1]


async def steadily(store: GatewayStore, rate: int, seconds: int) -> None:
    """Write one event after the other, as calls come, and seal them."""
    start, tasks = time.perf_counter(), []
    for number, event in enumerate(events(rate * seconds)):
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(store.audit.write(event)))
    await asyncio.gather(*tasks)
    await store.evidence.seal()


async def measure(server: servers.PostgresServer) -> None:
    """Print what events cost at a steady rate, and the WAL of those that follow a checkpoint."""
    url = server.url.replace("+asyncpg", "")
    driver = await asyncpg.connect(url)
    async with GatewayStore(url, redis_url="", auto_migrate=True) as store:
        print("| events/s | µs of the gateway | µs of the server | bytes of WAL | bytes of disk |")
        for rate, seconds in RATES:
            await store.audit.write_many(events(100))
            await driver.execute("CHECKPOINT")
            before, count = (time.process_time(), server_cpu_s(server.pid), *await written(driver)), rate * seconds
            await steadily(store, rate, seconds)
            after = (time.process_time(), server_cpu_s(server.pid), *await written(driver))
            gateway, cpu, wal, disk = ((new - old) / count for new, old in zip(after, before, strict=True))
            print(f"| {rate:,} | {gateway * 1e6:.0f} | {cpu * 1e6:.0f} | {wal:,.0f} | {disk:,.0f} |", flush=True)
        print("| events of the log | the next after a checkpoint | bytes of WAL an event |")
        for rows in LOGS:
            there = await driver.fetchval("SELECT count(*) FROM audit_events")
            await store.audit.write_many(events(rows - there))
            await driver.execute("CHECKPOINT")
            for count in STEPS:
                start, _ = await written(driver)
                await store.audit.write_many(events(count))
                end, _ = await written(driver)
                print(f"| {rows:,} | {count:,} | {(end - start) / count:,.0f} |", flush=True)
    await driver.close()


if __name__ == "__main__":
    with servers.PostgresServer(durable=True, settings=SETTINGS) as started:
        asyncio.run(measure(started))
