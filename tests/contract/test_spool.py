"""The spool: while the database is away events go to the local disk, and come to the database once when it is back."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing, suppress
from pathlib import Path
from typing import TypeAlias

import pytest
from contract_helpers import until

import agent_gateway_store.audit.backends as backends_module
import agent_gateway_store.audit.spool as spool_module
import servers
from agent_gateway_store import GatewayStore, StoreSettings, WriteOutcome
from agent_gateway_store.audit.record import REUSED_LABEL, encode_event, to_values
from agent_gateway_store.errors import AuditUnavailableError, StoreUnavailableError
from builders import make_event, rehash
from proofs.harness import (
    AWAY_S,
    SPOOLING,
    TRIGGERS,
    child,
    eventually,
    execute,
    migrated,
    spool_is_empty,
    spooled_by,
    spooled_ids,
    stored_events,
    stored_ids,
)
from servers import PostgresServer
from tampering import OFF

STORED, DUPLICATE, SPOOLED, LOST = WriteOutcome


class PostgresPlace:
    dialect = "postgresql"

    def __init__(self, server: PostgresServer, url: str) -> None:
        self.url = url
        self._server = server

    async def go_away(self) -> None:
        await asyncio.to_thread(self._server.kill)

    async def come_back(self) -> None:
        await asyncio.to_thread(self._server.start)

    async def refuse_poison(self) -> None:
        await execute(self.url, TRIGGERS[self.dialect])

    async def take_poison(self) -> None:
        await execute(self.url, "DROP TRIGGER refuse ON audit_events")


class SqlitePlace:
    """A file that another process has locked for writing; while it is, nobody waits for the lock as long as usual."""

    dialect = "sqlite"

    def __init__(self, path: Path, patch: pytest.MonkeyPatch) -> None:
        self.url = f"sqlite:///{path}"
        self._path = path
        self._patch = patch
        self._locker: sqlite3.Connection | None = None

    async def go_away(self) -> None:
        self._patch.setattr(backends_module, "_SQLITE_TIMEOUT_S", AWAY_S)
        self._locker = sqlite3.connect(self._path, isolation_level=None)
        self._locker.execute("BEGIN EXCLUSIVE")

    async def come_back(self) -> None:
        self._patch.undo()
        if self._locker is not None:
            self._locker.close()

    async def refuse_poison(self) -> None:
        with closing(sqlite3.connect(self._path)) as connection:
            connection.execute(TRIGGERS[self.dialect])

    async def take_poison(self) -> None:
        with closing(sqlite3.connect(self._path)) as connection:
            connection.execute("DROP TRIGGER refuse")


Place: TypeAlias = PostgresPlace | SqlitePlace


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(durable=True) as started:
        migrated(started.url)
        yield started


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patched:
        yield patched


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        path = Path(migrated(f"sqlite:///{tmp_path}/gateway.db").removeprefix("sqlite:///"))
        local = SqlitePlace(path, request.getfixturevalue("patch"))
        yield local
        asyncio.run(local.come_back())
        return
    started: PostgresServer = request.getfixturevalue("server")
    clean = (OFF, "DELETE FROM audit_events", "DROP FUNCTION IF EXISTS refuse CASCADE")
    asyncio.run(execute(started.url, *clean))
    yield PostgresPlace(started, started.url)
    if not servers.alive(started.pid):
        started.start()


async def is_stored(store: GatewayStore) -> bool:
    return await store.audit.write(make_event()) is STORED


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


async def test_events_wait_on_disk_and_come_back_once_and_in_order(place: Place, path: Path) -> None:
    """SPOOLED is told once the event is in the file; back again, new ones go to the database at once."""
    events = [make_event() for _ in range(40)]
    async with GatewayStore(place.url, redis_url="") as store:
        assert await store.audit.write_many(events[:10]) == {STORED: 10}
        await place.go_away()
        singles = [await store.audit.write(event) for event in events[10:20]]
        together = await asyncio.gather(*(store.audit.write(event) for event in events[20:30]))
        bulk = await store.audit.write_many(events[30:])

        assert [*singles, *together] == [SPOOLED] * 20
        assert bulk == {SPOOLED: 10}
        assert spooled_ids(path) == [event.request_id for event in events[10:]]
        assert store.audit.counters.spooled == 30

        await place.come_back()
        await eventually(lambda: spool_is_empty(store))

        assert await store.audit.write(make_event(request_id="after")) is STORED
        found = [event.request_id for event in await stored_events(store)]
        assert found == [*(event.request_id for event in events), "after"]
        assert spooled_ids(path) == []
        counters = store.audit.counters
        assert (counters.stored, counters.spooled, counters.replayed, counters.lost) == (11, 30, 30, 0)


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
async def test_a_long_spool_is_replayed_by_itself(place: Place, path: Path) -> None:
    """More than one commit takes: nobody flushes, and all comes to the database in its order."""
    events = [make_event() for _ in range(520)]
    async with GatewayStore(place.url, redis_url="") as store:
        await place.go_away()
        assert await store.audit.write_many(events) == {SPOOLED: 520}
        await place.come_back()
        await until(lambda: not spooled_ids(path), 20)

        assert [event.request_id for event in await stored_events(store)] == [event.request_id for event in events]
        assert await store.audit.write(make_event()) is STORED
        assert store.audit.counters.replayed == 520


@pytest.mark.system
async def test_what_a_killed_process_left_is_replayed_by_the_next_open(place: Place, path: Path) -> None:
    """The process is killed while the database is away; whoever opens a store on the same spool brings its events."""
    async with child(SPOOLING, place.url, 25) as process:
        await place.go_away()
        acknowledged = await spooled_by(process)
    assert spooled_ids(path) == acknowledged
    await place.come_back()

    async with GatewayStore(place.url, redis_url="") as store:
        # Nobody flushes, which would replay it, too.
        await until(lambda: not spooled_ids(path), 20)

        found = await stored_ids(store)
        assert found.total() == 26
        assert found.keys() >= set(acknowledged)
        assert store.audit.counters.replayed == 25


@pytest.mark.system
async def test_several_processes_share_one_spool(place: Place, path: Path) -> None:
    """Three processes spool into one file and replay it side by side: every event is in the database once."""
    three_children = (child(SPOOLING, place.url, 60) for _ in range(3))
    async with AsyncExitStack() as stack:
        processes = [await stack.enter_async_context(one) for one in three_children]
        await place.go_away()
        acknowledged = [request_id for process in processes for request_id in await spooled_by(process)]
        assert sorted(spooled_ids(path)) == sorted(acknowledged)
        await place.come_back()
        for process in processes:
            process.stdin.write(b"\n")
        assert [await asyncio.wait_for(process.wait(), 30) for process in processes] == [0, 0, 0]

    async with GatewayStore(place.url, redis_url="") as store:
        found = await stored_ids(store)
    assert found.total() == len(found) == 183
    assert found.keys() >= set(acknowledged)


async def test_rows_for_another_database_stay(tmp_path: Path, path: Path, patch: pytest.MonkeyPatch) -> None:
    """Two databases share a spool; the one that is back gets its own rows, the others wait on."""
    one, two = (SqlitePlace(tmp_path / name, patch) for name in ("one.db", "two.db"))
    async with GatewayStore(one.url, redis_url="") as first, GatewayStore(two.url, redis_url="") as second:
        await one.go_away()
        await two.go_away()
        assert await first.audit.write(make_event(request_id="one")) is SPOOLED
        assert await second.audit.write(make_event(request_id="two")) is SPOOLED
        await one.come_back()
        await eventually(lambda: spool_is_empty(first))

        assert list(await stored_ids(first)) == ["one"]
        assert spooled_ids(path) == ["two"]
        await two.come_back()
        await eventually(lambda: spool_is_empty(second))
        assert list(await stored_ids(second)) == ["two"]


async def test_a_poison_row_holds_up_no_other(place: Place, path: Path) -> None:
    """What the database refuses at the replay is set aside and kept, also when it would take it; all others arrive."""
    await place.refuse_poison()
    events = [make_event(tool_name="poison" if number in (0, 13) else "good") for number in range(30)]
    async with GatewayStore(place.url, redis_url="") as store:
        await place.go_away()
        assert {await store.audit.write(event) for event in events} == {SPOOLED}
        await place.come_back()
        await eventually(lambda: spool_is_empty(store))

        assert len(await stored_ids(store)) == 28
        assert await store.audit.write(make_event()) is STORED
        assert store.audit.counters.replayed == 28
    await place.take_poison()
    async with GatewayStore(place.url, redis_url="") as store:
        assert await store.audit.flush() == 0
        assert (len(await stored_ids(store)), store.audit.counters.replayed) == (29, 0)
    assert spooled_ids(path, poisoned=True) == [events[0].request_id, events[13].request_id]
    assert spooled_ids(path) == []


async def test_ids_used_meanwhile_hide_no_spooled_event(place: Place) -> None:
    """What waited finds its id taken by another event: it is kept beside it; what was there already is not doubled."""
    first, other = make_event(request_id="used"), make_event(request_id="used", tool_name="other")
    async with GatewayStore(place.url, redis_url="") as store:
        assert await store.audit.write(first) is STORED
        await place.go_away()
        assert [await store.audit.write(event) for event in (other, first, other)] == [SPOOLED] * 3
        await place.come_back()
        await eventually(lambda: spool_is_empty(store))

        found = await stored_events(store)
        assert [event.tool_name for event in found] == ["read_file", "other"]
        assert found[1].request_id.startswith("used~")
        assert found[1].risk_labels == [REUSED_LABEL]
        assert all(event.content_hash == rehash(event) for event in found)
        assert await store.audit.write(other) is DUPLICATE


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
async def test_a_full_spool_loses_loudly(
    place: Place, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once the file is full the outcome is LOST, the whole event is logged at CRITICAL, and nothing is raised."""
    monkeypatch.setattr(spool_module, "MAX_BYTES", 12 * 4096)
    events = [make_event(sanitized_args={"text": f"\0{number} {'x' * 1_000}"}) for number in range(60)]
    async with GatewayStore(place.url, redis_url="") as store:
        await place.go_away()
        outcomes = [await store.audit.write(event) for event in events]
        lost = [event for event, outcome in zip(events, outcomes, strict=True) if outcome is LOST]
        logged = [record for record in caplog.records if record.name == "agent_gateway_store.audit.lost"]

        assert Counter(outcomes).keys() == {SPOOLED, LOST}
        assert outcomes[0] is SPOOLED
        assert store.audit.counters.lost == len(lost) == len(logged)
        assert {record.levelno for record in logged} == {logging.CRITICAL}
        for event, record in zip(lost, logged, strict=True):
            text = record.getMessage()
            assert json.loads(text[text.index("{") :]) == json.loads(
                json.dumps(to_values(encode_event(event)), default=lambda value: getattr(value, "__dict__", str(value)))
            )
        await place.come_back()
        await eventually(lambda: spool_is_empty(store))

        assert await stored_ids(store) == {
            event.request_id: 1 for event, outcome in zip(events, outcomes, strict=True) if outcome is SPOOLED
        }
        assert await store.audit.write(lost[0]) is STORED


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
@pytest.mark.parametrize("fault", ["no folder", "garbage"])
async def test_a_spool_that_cannot_be_written_keeps_nothing_from_the_database(
    place: Place, path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """Both gone: LOST. When the database is back events go there, although the spool is still broken."""
    path.write_bytes(b"garbage" * 1_000)
    settings = StoreSettings(audit_spool_path=path if fault == "garbage" else path / "spool.db")
    async with GatewayStore(place.url, redis_url="", settings=settings) as store:
        assert await store.audit.write(make_event()) is STORED
        await place.go_away()
        assert [await store.audit.write(make_event()) for _ in range(3)] == [LOST] * 3
        await place.come_back()
        await eventually(lambda: is_stored(store))
        if fault == "garbage":
            with pytest.raises(StoreUnavailableError):
                await store.audit.flush()

    critical = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert caplog.text.count("LOST audit event") == len(critical) >= 3


async def test_strict_mode_raises_and_recovers(place: Place, path: Path) -> None:
    """AUDIT_MODE=strict: every write raises while the database is away, nothing is spooled, and it heals by itself."""
    settings = StoreSettings(audit_mode="strict")
    async with GatewayStore(place.url, redis_url="", settings=settings) as store:
        assert await store.audit.write(make_event(request_id="before")) is STORED
        await place.go_away()
        for _ in range(2):
            with pytest.raises(AuditUnavailableError):
                await store.audit.write(make_event())
        raised = await asyncio.gather(*(store.audit.write(make_event()) for _ in range(20)), return_exceptions=True)
        with pytest.raises(AuditUnavailableError):
            await store.audit.write_many([make_event()])
        await place.come_back()

        async def is_stored() -> bool:
            with suppress(AuditUnavailableError):
                return await store.audit.write(make_event(request_id="after")) is STORED
            return False

        await eventually(is_stored)

        assert {type(error) for error in raised} == {AuditUnavailableError}
        assert await stored_ids(store) == {"before": 1, "after": 1}
        assert (store.audit.counters.stored, store.audit.counters.spooled) == (2, 0)
    assert not path.exists()
