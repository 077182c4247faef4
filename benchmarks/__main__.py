"""Measure everything and print a table and JSON.

Starts a PostgreSQL with fsync=on from a wheel, or uses the one of `--postgres-url` (an empty database).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import servers  # noqa: E402
from benchmarks import (  # noqa: E402
    approvals,
    audit_writes,
    building,
    calls,
    console,
    deliveries,
    evidence,
    exports,
    keys,
    memory,
    processes,
    queries,
    retention,
)
from benchmarks.report import Figure, as_json, print_table  # noqa: E402


async def durability(url: str) -> dict[str, str]:
    """Return the settings of the server that decide what a commit costs."""
    import asyncpg

    connection = await asyncpg.connect(url)
    try:
        names = ("server_version", "fsync", "synchronous_commit")
        return {name: await connection.fetchval(f"SHOW {name}") for name in names}
    finally:
        await connection.close()


def run(url: str, arguments: argparse.Namespace) -> list[Figure]:
    """Measure what was asked for."""
    figures: list[Figure] = []
    repeat, scale = arguments.repeat, arguments.scale
    if "building" in arguments.only:
        figures += building.measure(repeat=repeat)
    if "audit" in arguments.only:
        figures += asyncio.run(audit_writes.measure(url, repeat=repeat, scale=scale))
    if "processes" in arguments.only:
        figures += asyncio.run(processes.measure(url, repeat=repeat, scale=scale))
    if "sqlite" in arguments.only:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            figures += asyncio.run(audit_writes.measure_sqlite(Path(folder), repeat=repeat, scale=scale))
    if "approvals" in arguments.only:
        with servers.RedisServer() as redis:
            figures += asyncio.run(approvals.measure(url, redis.url, repeat=repeat, scale=scale))
    if "calls" in arguments.only:
        with servers.RedisServer() as redis:
            figures += asyncio.run(calls.measure(url, redis.url, repeat=repeat, scale=scale))
    if arguments.hangar:
        figures += asyncio.run(approvals.measure_peer(url, arguments.hangar, repeat=repeat, scale=scale))
    if "deliveries" in arguments.only:
        figures += asyncio.run(deliveries.measure(url, repeat=repeat, scale=scale))
    if "keys" in arguments.only:
        figures += asyncio.run(keys.measure(url, repeat=repeat, scale=scale))
    if "queries" in arguments.only:
        figures += asyncio.run(queries.measure(url, repeat=repeat, rows=int(arguments.rows * scale)))
    if "exports" in arguments.only:
        rows = int(min(arguments.rows, 1_000_000) * scale)
        figures += asyncio.run(exports.measure(url, repeat=repeat, rows=rows, folder=arguments.folder))
    if "evidence" in arguments.only:
        rows = int(min(arguments.rows, 1_000_000) * scale)
        figures += asyncio.run(evidence.measure(url, repeat=repeat, rows=rows, scale=scale))
    if "retention" in arguments.only:
        rows = int(min(arguments.rows, 1_000_000) * scale)
        options = {"repeat": repeat, "rows": rows, "scale": scale, "folder": arguments.folder}
        figures += asyncio.run(retention.measure(url, **options))
    if "console" in arguments.only:
        rows = int(min(arguments.rows, 1_000_000) * scale)
        figures += asyncio.run(console.measure(url, repeat=repeat, rows=rows, scale=scale))
    if "memory" in arguments.only:
        figures += memory.measure(url, scale=scale)
    return figures


def main() -> None:
    """Read the arguments, find a server, measure, print."""
    parts = [
        "building",
        "audit",
        "processes",
        "sqlite",
        "approvals",
        "calls",
        "deliveries",
        "keys",
        "queries",
        "exports",
        "evidence",
        "retention",
        "console",
        "memory",
    ]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--postgres-url", help="an empty database on a server with fsync=on")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    parser.add_argument("--repeat", type=int, default=3, help="repetitions; medians are shown")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full row counts")
    parser.add_argument("--rows", type=int, default=1_000_000, help="events that queries read; 10,000,000 takes long")
    parser.add_argument("--hangar", type=Path, help="a Python with mcp-hangar[postgres]; measures beside it")
    parser.add_argument("--json", type=Path, help="write the JSON here and not to the terminal")
    parser.add_argument("--folder", type=Path, help="where SQLite files are put, on the disk to measure")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as state:
        os.environ["AUDIT_SPOOL_PATH"] = str(Path(state) / "spool.db")
        if arguments.postgres_url:
            report(arguments.postgres_url, arguments)
        else:
            # With the WAL that PostgreSQL keeps by itself, where the tests are content with little.
            with servers.PostgresServer(durable=True, settings={"max_wal_size": "1GB"}) as server:
                report(server.url.replace("+asyncpg", ""), arguments)


def report(url: str, arguments: argparse.Namespace) -> None:
    """Measure on `url` and print."""
    facts = asyncio.run(durability(url))
    figures = run(url, arguments)
    print_table(figures)
    text = as_json(figures, **facts)
    if arguments.json:
        arguments.json.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
