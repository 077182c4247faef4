"""What an analyst waits for: first pages, pages far down, more rows, and what the indexes cost a writer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from agent_gateway_store import GatewayStore
from agent_gateway_store.audit.document import COLUMNS
from agent_gateway_store.audit.filters import criteria
from agent_gateway_store.audit.selects import newest
from benchmarks.audit_writes import records
from benchmarks.filling import database, fill
from benchmarks.report import Figure

PAGE = 100
SEARCHES: dict[str, dict[str, Any]] = {
    "list_recent(100)": {},
    "search by caller": {"caller_id": "agent-7"},
    "search by decision": {"decision": "DENY"},
    "search by tool": {"tool_name": "tool_3"},
    "search by organisation": {"org_id": "org-3"},
}


async def median_ms(work: Callable[[], Awaitable[Any]], times: int) -> float:
    """Return the median of the milliseconds that `work` takes."""
    return (await in_turn_ms(work, work, (times + 1) // 2))[0]


async def in_turn_ms(
    one: Callable[[], Awaitable[Any]], other: Callable[[], Awaitable[Any]], times: int
) -> tuple[float, float]:
    """Return the medians of the milliseconds of two works, done in turn, so that both meet the same noise."""
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(times):
        for work, taken in zip((one, other), samples, strict=True):
            start = time.perf_counter()
            await work()
            taken.append((time.perf_counter() - start) * 1_000)
    return statistics.median(samples[0]), statistics.median(samples[1])


async def measure(url: str, *, repeat: int, rows: int) -> list[Figure]:
    """Measure reads on `rows` events and on 100,000 of them, and writes with and without the newest migration."""
    few = min(100_000, rows // 10)
    async with database(url) as made:
        await fill(made, 1, few)
        recent_before = await _recent(made, repeat)
        await fill(made, few + 1, rows)
        figures = [*await _first_pages(made, repeat, rows), await _far_down(made, repeat, rows)]
        more = Figure(f"list_recent(100) on {rows:,} rows", "ms", f"on {few:,} rows", 1.3, more_is_better=False)
        more.ours, more.limit, more.facts = await _recent(made, repeat), recent_before, {"rows": rows}
    return [*figures, more, await _writes(url, repeat)]


async def _recent(url: str, repeat: int) -> list[float]:
    async with GatewayStore(url, redis_url="") as store:
        await median_ms(store.audit.list_recent, 50)
        return [await median_ms(store.audit.list_recent, 300) for _ in range(repeat)]


async def _first_pages(url: str, repeat: int, rows: int) -> list[Figure]:
    figures = []
    driver = await asyncpg.connect(url)
    async with GatewayStore(url, redis_url="") as store:
        dialect = store.database.engine.dialect
        for name, filters in SEARCHES.items():
            figure = Figure(name, "ms", "the same SQL by asyncpg, rows as tuples", 5, more_is_better=False)
            found = criteria(filters, org_id=None)
            query = newest(found.shape, limit=PAGE).compiled(dialect)
            arguments = query.arguments(found.values)

            async def ours(filters: Any = filters) -> Any:
                return await (store.audit.search(limit=PAGE, **filters) if filters else store.audit.list_recent(PAGE))

            async def bare(query: Any = query, arguments: Any = arguments) -> Any:
                return [tuple(row) for row in await driver.fetch(query.text, *arguments)]

            await in_turn_ms(ours, bare, 50)
            for _ in range(repeat):
                mine, limit = await in_turn_ms(ours, bare, 300)
                figure.ours.append(mine)
                figure.limit.append(limit)
            figure.facts = {"rows": rows, "page": PAGE, "aim": 3}
            figures.append(figure)
    await driver.close()
    return figures


async def _far_down(url: str, repeat: int, rows: int) -> Figure:
    figure = Figure("page 1,000 of a walk by cursor", "ms", "page 1", 1.2, more_is_better=False)
    page = min(PAGE, rows // 1_100)
    async with GatewayStore(url, redis_url="") as store:
        cursor = (await store.audit.search(limit=page)).next_cursor
        first, cursors = cursor, []
        for _ in range(1_050):
            cursor = (await store.audit.search(limit=page, cursor=cursor)).next_cursor
            cursors.append(cursor)
        for _ in range(repeat):
            near, far = iter([first, *cursors[:49]]), iter(cursors[-50:])
            far_ms, near_ms = await in_turn_ms(
                lambda far=far: store.audit.search(limit=page, cursor=next(far)),
                lambda near=near: store.audit.search(limit=page, cursor=next(near)),
                50,
            )
            figure.ours.append(far_ms)
            figure.limit.append(near_ms)
    figure.facts = {"rows": rows, "page": page}
    return figure


async def _writes(url: str, repeat: int) -> Figure:
    figure = Figure("writes with all indexes", "events/s", "on the schema of step 2 (0001)", 0.8)
    batch, count = 100, 30_000
    async with database(url) as now, database(url, revision="0001_initial") as before:
        drivers = [(figure.ours, await asyncpg.connect(now)), (figure.limit, await asyncpg.connect(before))]
        for number in range(repeat + 1):
            for samples, driver in drivers[:: 1 if number % 2 else -1]:
                ready = records(count)
                start = time.perf_counter()
                for place in range(0, count, batch):
                    chunk = ready[place : place + batch]
                    await driver.copy_records_to_table("audit_events", records=chunk, columns=COLUMNS)
                if number:  # the first round warms up
                    samples.append(count / (time.perf_counter() - start))
        for _, driver in drivers:
            await driver.close()
    figure.facts = {"events": count, "batch": batch}
    return figure
