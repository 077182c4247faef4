"""Archives that hold other events than the log: of another log, of the time before a restore, or planted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from archive_helpers import entries_of, rewritten, save, with_column
from sqlalchemy import text

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.archive import Archive
from agent_gateway_store.errors import ArchiveError
from builders import make_event
from tampering import tamper

OLD = datetime(2025, 3, 1, 12, tzinfo=UTC)
BEFORE = OLD + timedelta(days=60)
SETTINGS = StoreSettings(audit_seal_seconds=0)
SEALED = ("audit_leaves", "audit_tiles", "audit_checkpoints", "audit_prunes", "audit_events")


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[GatewayStore]:
    """An open store that seals when it is told to."""
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as opened:
        yield opened


async def write(store: GatewayStore, name: str, count: int = 3) -> None:
    """Write events that a prune takes, and one that stays."""
    await store.audit.write_many([make_event(request_id=f"{name}-{n}", timestamp=OLD) for n in range(count)])
    await store.audit.write(make_event(request_id=f"{name}-newest"))
    await store.evidence.seal()


@pytest.fixture
async def archive(store: GatewayStore, tmp_path: Path) -> Path:
    """An archive of three events, which stand at the first positions."""
    await write(store, "first")
    await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture
async def restored(store: GatewayStore, archive: Path, database_url: str) -> AsyncIterator[GatewayStore]:
    """The database as a backup has it from before the archived events, with others in their place."""
    [origin] = await _column(store, "SELECT DISTINCT origin FROM audit_checkpoints")
    await tamper(store.database.engine, *(f"DELETE FROM {table}" for table in SEALED))
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as opened:
        await write(opened, "second")
        assert await _column(opened, "SELECT DISTINCT origin FROM audit_checkpoints") == [origin]
        yield opened


async def _column(store: GatewayStore, statement: str) -> list[Any]:
    async with store.database.read() as connection:
        return list((await connection.execute(text(statement))).scalars())


async def request_ids(store: GatewayStore) -> list[str]:
    """Those of the events in the table, without the events of retention itself."""
    return sorted([e.request_id async for e in store.audit.stream() if e.mcp_server != "gateway-store"])


SEALED_AS = (
    "SELECT {} FROM audit_leaves JOIN audit_events ON audit_events.id = event_id "
    "WHERE request_id LIKE 'second-_' ORDER BY position"
)
SECOND = ["second-0", "second-1", "second-2", "second-newest"]


async def test_a_restored_log_is_not_pruned_into_the_archive_of_before(
    restored: GatewayStore, archive: Path, tmp_path: Path
) -> None:
    """The archive holds other events at these positions: nothing is deleted. Another folder takes them."""
    with pytest.raises(ArchiveError, match="restored from a backup: choose another folder"):
        await restored.retention.prune(BEFORE, by="ops", archive=archive)

    assert await request_ids(restored) == SECOND
    assert [event async for event in restored.audit.stream(tool_name="audit.prune")] == []
    assert (await restored.retention.prune(BEFORE, by="ops", archive=tmp_path / "b")).events == 3
    assert sorted(event.request_id for event in Archive(tmp_path / "b").events()) == SECOND[:3]
    assert (await restored.evidence.verify(archive=tmp_path / "b")).ok


@pytest.mark.parametrize("planted", ["positions", "events", "leaves"])
async def test_what_the_archive_only_says_it_holds_stays_in_the_table(
    store: GatewayStore, archive: Path, planted: str
) -> None:
    """A manifest that names positions, a file of other events, and one that has their leaves and other contents."""
    await write(store, "second")
    places, leaves = [await _column(store, SEALED_AS.format(name)) for name in ("position", "leaf_hash")]
    [entry] = entries_of(archive)
    if planted == "positions":
        entry = replace(entry, positions=[[0, 10**6]])
    else:
        runs = [[places[0], places[-1]]]
        entry = rewritten(archive, entry, with_column("position", places), positions=runs)
    if planted == "leaves":
        entry = rewritten(archive, entry, with_column("leaf_hash", [bytes(leaf).hex() for leaf in leaves]))
    save(archive, [entry])

    with pytest.raises(ArchiveError, match="choose another folder"):
        await store.retention.prune(BEFORE, by="ops", archive=archive)

    assert [each for each in await request_ids(store) if each in SECOND[:3]] == SECOND[:3]
