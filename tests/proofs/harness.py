"""What the proofs share: events, backends that count and fail, what a database and a spool hold, writers under load."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import asyncpg
from sqlalchemy import select

import servers
from agent_gateway_store import AuditEvent, GatewayStore, WriteOutcome
from agent_gateway_store.audit.backends import Backend, RowResult, backend_for
from agent_gateway_store.audit.record import EncodedRow
from agent_gateway_store.storage import migrate
from agent_gateway_store.storage.database import create_engine
from agent_gateway_store.storage.identity import read_identity
from commands import python_path
from forks import forks

TRIGGERS = {
    "sqlite": "CREATE TRIGGER refuse BEFORE INSERT ON audit_events WHEN NEW.tool_name = 'poison' "
    "BEGIN SELECT RAISE(ABORT, 'refused'); END",
    "postgresql": "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION 'refused'; END $$; "
    "CREATE TRIGGER refuse BEFORE INSERT ON audit_events FOR EACH ROW WHEN (NEW.tool_name = 'poison') "
    "EXECUTE FUNCTION refuse()",
}
"""By dialect: has the database refuse every event of the tool `poison`."""

AWAY_S = 0.15
"""Chosen: how long a write waits for the lock of an SQLite file while a test holds it, where it would wait for 3."""
SPOOLING = f"""
import asyncio, sys
from unittest.mock import patch
from agent_gateway_store import GatewayStore
from builders import make_event

async def main(url, count):
    async with GatewayStore(url, redis_url="") as store:
        assert await store.audit.write(make_event()) == "STORED"
        print("open", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        with patch("agent_gateway_store.audit.backends._SQLITE_TIMEOUT_S", {AWAY_S}):
            for number in range(count):
                event = make_event()
                print(event.request_id, await store.audit.write(event), flush=True)
        print("done", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        while await store.audit.flush():
            await asyncio.sleep(0.01)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""
"""A program for `child`: opens a store, and at each line of input goes on to write, then to replay."""


def run_machine(machine: Any, *, examples: int, length: int) -> None:
    """Run a state machine of Hypothesis: the short form with the same steps each time, the long one with new ones."""
    from hypothesis import HealthCheck, Phase, settings
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=length,
            deadline=None,
            database=None,
            derandomize=examples < 10,
            print_blob=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def migrated(url: str) -> str:
    """Bring the schema of an empty database up to date and return its URL."""

    async def upgrade() -> None:
        engine = create_engine(url)
        await migrate.upgrade(engine)
        await engine.dispose()

    servers.run(upgrade())
    return url


async def identity_of(url: str) -> str:
    """The identity of a database."""
    engine = create_engine(url)
    try:
        return await read_identity(engine)
    finally:
        await engine.dispose()


async def stored_events(store: GatewayStore) -> list[AuditEvent]:
    """Everything in the database, in the order of its ids."""
    table = AuditEvent.__table__
    async with store.database.read() as connection:
        rows = (await connection.execute(select(table).order_by(table.c.id))).mappings().all()
    return [AuditEvent.from_row(row) for row in rows]


async def stored_ids(store: GatewayStore) -> Counter[str]:
    """How often each request id stands in the database."""
    table = AuditEvent.__table__
    async with store.database.read() as connection:
        return Counter((await connection.execute(select(table.c.request_id))).scalars())


async def execute(url: str, *statements: str) -> None:
    """Run statements on PostgreSQL over a connection of their own, one by one and outside a transaction."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""), ssl=False, timeout=5)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def spooled_ids(path: Path, *, poisoned: bool = False) -> list[str]:
    """The request ids in a spool file, oldest first, read as any other process would."""
    if not path.exists():
        return []
    wanted = f"SELECT request_id FROM spooled_events WHERE error IS {'NOT ' * poisoned}NULL ORDER BY id"
    with closing(sqlite3.connect(path)) as connection:
        return [request_id for (request_id,) in connection.execute(wanted)]


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 10) -> float:
    """Wait until the condition holds and return how many seconds that took; fail after `timeout_s`."""
    start = time.monotonic()
    while not await condition():
        assert time.monotonic() - start < timeout_s, "not within the time allowed"
        await asyncio.sleep(0.02)
    return time.monotonic() - start


async def spool_is_empty(store: GatewayStore) -> bool:
    """True if nothing waits for the database any more."""
    return await store.audit.flush() == 0


class WatchedBackend:
    """A backend that notes its batches, can hold them back, and fails when told to.

    Attributes:
        batches: The number of rows of each batch.
        gate: Cleared, no batch goes on.
        fault: What the next batches meet: `None`; `away`, an outage before the commit; `cut off`, one after it.
    """

    def __init__(self, backend: Backend) -> None:
        self.places = backend.places
        self.batches: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fault: str | None = None
        self._backend = backend

    @classmethod
    async def within(cls, store: GatewayStore) -> WatchedBackend:
        """Close a store and open it again with one before its backend."""
        await store.close()
        watched = cls(backend_for(store.database.engine))
        with patch("agent_gateway_store.store.backend_for", lambda _engine: watched):
            await store.open()
        return watched

    async def store(self, rows: Sequence[EncodedRow]) -> list[RowResult]:
        self.batches.append(len(rows))
        await self.gate.wait()
        if self.fault == "away":
            raise ConnectionResetError
        results = await self._backend.store(rows)
        if self.fault == "cut off":
            raise ConnectionResetError
        return results

    async def probe(self) -> str:
        if self.fault:
            raise ConnectionResetError
        return await self._backend.probe()

    async def close(self) -> None:
        await self._backend.close()


@dataclass
class Load:
    """Writers that take their events from one source, with a record of everything they were told.

    Attributes:
        acknowledged: Request id to outcome.
        errors: What was raised to a writer.
        slowest_s: The longest call.
    """

    store: GatewayStore
    acknowledged: dict[str, WriteOutcome] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)
    slowest_s: float = 0.0

    async def run(self, events: Iterable[AuditEvent], *, writers: int = 64) -> None:
        """Write all `events` by so many concurrent writers."""
        source = iter(events)
        await asyncio.gather(*(self._write(source) for _ in range(writers)))

    async def _write(self, source: Iterator[AuditEvent]) -> None:
        for event in source:
            await self.write(event)

    async def write(self, event: AuditEvent) -> WriteOutcome | None:
        """Write one event and note what came of it; None if an exception did."""
        start, outcome = time.monotonic(), None
        try:
            self.acknowledged[event.request_id] = outcome = await self.store.audit.write(event)
        except Exception as exc:
            self.errors.append(exc)
        self.slowest_s = max(self.slowest_s, time.monotonic() - start)
        return outcome

    async def until(self, number: int) -> None:
        """Wait until so many events are acknowledged."""
        while len(self.acknowledged) < number:
            await asyncio.sleep(0.001)

    def outcomes(self) -> Counter[WriteOutcome]:
        """How many events came to which outcome."""
        return Counter(self.acknowledged.values())

    def __str__(self) -> str:
        counts = ", ".join(f"{number:,} {outcome}" for outcome, number in sorted(self.outcomes().items()))
        return f"{len(self.acknowledged):,} acknowledged ({counts}), longest call {self.slowest_s:.2f} s"

    async def judge(self) -> Verdict:
        """Compare what was acknowledged with what the database holds, after the spool was emptied."""
        found = await stored_ids(self.store)
        return Verdict(
            lost=len(self.acknowledged.keys() - found.keys()),
            # Under its own id an event cannot stand twice; a second copy would have a derived one.
            doubled=found.total() - len(self.acknowledged.keys() & found.keys()),
            errors=len(self.errors),
        )


@dataclass(frozen=True)
class Verdict:
    """What a proof found: acknowledged events that are gone, rows too many, exceptions to writers."""

    lost: int = 0
    doubled: int = 0
    errors: int = 0


@asynccontextmanager
async def child(program: str, *arguments: object) -> AsyncIterator[Any]:
    """Run a Python program that says `open` once its store is open; it is killed at the end if it still runs."""
    environment = {**os.environ, "PYTHONPATH": python_path(Path(__file__).parent.parent)}
    command = ["-W", "error", "-c", program, *map(str, arguments)]
    process = await forks().begin(command, Path.cwd(), environment)
    try:
        assert await process.stdout.readline() == b"open\n"
        yield process
    finally:
        process.kill()
        await process.communicate()


async def spooled_by(process: Any) -> list[str]:
    """Have a child write its events; return the ids that it says are SPOOLED, which must be all."""
    process.stdin.write(b"\n")
    ids = []
    while (line := (await process.stdout.readline()).decode().split()) != ["done"]:
        assert line[1:] == ["SPOOLED"]
        ids.append(line[0])
    return ids
