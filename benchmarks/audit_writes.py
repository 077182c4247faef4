"""The audit write path beside the limits of the drivers."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from agent_gateway_store import AuditEvent, GatewayStore
from agent_gateway_store.audit.backends import Backend, backend_for
from agent_gateway_store.audit.document import COLUMNS
from agent_gateway_store.audit.record import encode_event
from agent_gateway_store.storage.database import create_engine
from benchmarks.events import events
from benchmarks.report import Figure

WRITERS = 64
INSERT = (
    f"INSERT INTO audit_events ({', '.join(COLUMNS)}) VALUES ({', '.join(f'${n}' for n in range(1, len(COLUMNS) + 1))})"
)


async def timed(work: Awaitable[Any]) -> float:
    """Return the seconds that `work` takes."""
    start = time.perf_counter()
    await work
    return time.perf_counter() - start


async def concurrently(write: Callable[[AuditEvent], Awaitable[Any]], written: Sequence[AuditEvent]) -> None:
    """Write every event from 64 tasks."""
    waiting = iter(written)

    async def writer() -> None:
        for event in waiting:
            await write(event)

    await asyncio.gather(*(writer() for _ in range(WRITERS)))


@contextmanager
def counted_batches() -> Iterator[list[int]]:
    """Have every store that is opened meanwhile note the sizes of its batches."""
    sizes: list[int] = []

    def counting_backend(engine: AsyncEngine) -> Backend:
        backend = backend_for(engine)
        commit = backend.store

        async def counting(rows: Sequence[Any]) -> Any:
            sizes.append(len(rows))
            return await commit(rows)

        backend.store = counting  # type: ignore[method-assign]
        return backend

    with patch("agent_gateway_store.store.backend_for", counting_backend):
        yield sizes


def records(count: int) -> list[tuple[Any, ...]]:
    """Return tuples that the driver takes as they are."""
    return [encode_event(event) for event in events(count)]


async def measure(url: str, *, repeat: int, scale: float) -> list[Figure]:
    """Measure on PostgreSQL; each repetition measures ours and the limit in turn."""
    orm = Figure("write, 64 writers", "events/s", "ORM add and commit per event, same concurrency", 10)
    copy = Figure("write, 64 writers", "events/s", "asyncpg COPY, batches of the same average size", 0.45)
    lone = Figure("write, 1 writer, median latency", "ms", "asyncpg INSERT, autocommit", 1.5, more_is_better=False)
    many = Figure("write_many, built beforehand", "events/s", "asyncpg COPY of ready tuples", 0.5)
    driver = await asyncpg.connect(url)
    with counted_batches() as sizes:
        store = await GatewayStore(url, redis_url="", auto_migrate=True).open()
    async with store:
        await store.audit.write_many(events(2_000))
        for _ in range(repeat):
            await _sixty_four(store, driver, url, orm, copy, sizes, int(20_000 * scale))
            await _lone(store, driver, lone, int(1_000 * scale))
            await _many(store, driver, many, int(200_000 * scale))
    await driver.close()
    return [orm, copy, lone, many]


async def _sixty_four(
    store: GatewayStore,
    driver: asyncpg.Connection,
    url: str,
    orm: Figure,
    copy: Figure,
    sizes: list[int],
    count: int,
) -> None:
    written = list(events(count))
    sizes.clear()
    ours = count / await timed(concurrently(store.audit.write, written))
    batch = max(1, round(statistics.mean(sizes)))
    ready = records(count)

    async def copy_all() -> None:
        for start in range(0, count, batch):
            await driver.copy_records_to_table("audit_events", records=ready[start : start + batch], columns=COLUMNS)

    copy.ours.append(ours)
    copy.limit.append(count / await timed(copy_all()))
    orm.ours.append(ours)
    orm.limit.append(await orm_rate(url, count // 10))
    copy.facts = orm.facts = {"events": count, "average batch": batch}


async def orm_rate(url: str, count: int) -> float:
    """Return events/s of a session, an ORM add and a commit per event, from 64 tasks."""
    engine = create_engine(url, pool_size=32)
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def add(event: AuditEvent) -> None:
        async with sessions() as session:
            session.add(event)
            await session.commit()

    written = list(events(count))
    seconds = await timed(concurrently(add, written))
    await engine.dispose()
    return count / seconds


async def _lone(store: GatewayStore, driver: asyncpg.Connection, figure: Figure, count: int) -> None:
    ours, limit = [], []
    for event, ready in zip(list(events(count)), records(count), strict=True):
        ours.append(await timed(store.audit.write(event)))
        limit.append(await timed(driver.execute(INSERT, *ready)))
    figure.ours.append(statistics.median(ours) * 1000)
    figure.limit.append(statistics.median(limit) * 1000)
    figure.facts = {"events": count}


async def _many(store: GatewayStore, driver: asyncpg.Connection, figure: Figure, count: int) -> None:
    written = list(events(count))
    figure.ours.append(count / await timed(store.audit.write_many(written)))
    ready = records(count)
    copying = driver.copy_records_to_table("audit_events", records=ready, columns=COLUMNS)
    figure.limit.append(count / await timed(copying))
    figure.facts = {"events": count}


async def measure_sqlite(folder: Path, *, repeat: int, scale: float) -> list[Figure]:
    """Measure 64 writers on a SQLite file."""
    figure = Figure("write, 64 writers, SQLite", "events/s", "ORM add and commit per event, same concurrency", 12)
    for number in range(repeat):
        url = f"sqlite:///{folder}/gateway-{number}.db"
        count = int(10_000 * scale)
        async with GatewayStore(url, redis_url="") as store:
            figure.ours.append(count / await timed(concurrently(store.audit.write, list(events(count)))))
        figure.limit.append(await orm_rate(url, max(WRITERS * 2, count // 20)))
        figure.facts = {"events": count}
    return [figure]
