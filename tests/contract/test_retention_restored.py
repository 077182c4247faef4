"""Archives that hold other events than the log: of another log, of the time before a restore, or planted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from archive_helpers import entries_of, rewritten, save, with_column
from contract_helpers import POSTGRES, store_sealed_by_hand
from erasure_helpers import BEFORE, OLD, KilledError, killed
from pyarrow import parquet
from sqlalchemy import text

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.archive import Archive
from agent_gateway_store.errors import ArchiveError, EventHeldError
from agent_gateway_store.retention import prune
from builders import make_event
from tampering import tamper

pytestmark = POSTGRES
store = store_sealed_by_hand

SETTINGS = StoreSettings(audit_seal_seconds=0)
SEALED = ("audit_leaves", "audit_tiles", "audit_checkpoints", "audit_prunes", "audit_events")


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


async def sealed(store: GatewayStore) -> list[Any]:
    """What an erasure changes in the log."""
    async with store.database.read() as connection:
        found = await connection.execute(text("SELECT position, salt, leaf_hash FROM audit_leaves ORDER BY position"))
        return [tuple(row) for row in found]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.*")}


async def refuse_erasure(store: GatewayStore, request_id: str, folder: Path, match: str) -> None:
    """Require that the archive is refused, and that nothing was announced or changed."""
    before = await sealed(store), files_of(folder)
    with pytest.raises(ArchiveError, match=match):
        await store.retention.erase(request_id, reason="r", by="dpo", archive=folder)
    assert (await sealed(store), files_of(folder)) == before
    assert [event async for event in store.audit.stream(tool_name="audit.erase")] == []


async def test_events_of_before_a_restore_are_not_erased_as_others(restored: GatewayStore, archive: Path) -> None:
    """Otherwise the salt of the event that has the position now would go, and the log would look altered."""
    await refuse_erasure(restored, "first-1", archive, "restored from a backup")
    assert (await restored.evidence.verify()).ok
    assert (await restored.retention.erase("second-1", reason="r", by="dpo", archive=archive)).position == 1
    assert "first-1" in {event.request_id for event in Archive(archive).events()}


async def test_nothing_is_taken_from_the_archive_of_another_log(store: GatewayStore, archive: Path) -> None:
    """An erasure and both kinds of prune refuse it."""
    await tamper(store.database.engine, "UPDATE audit_checkpoints SET origin = 'log.example/other'")
    await refuse_erasure(store, "first-1", archive, "archive of agent-gateway-store")
    before = files_of(archive)
    for prune_into in (store.retention.prune, store.retention.prune_approvals):
        with pytest.raises(ArchiveError, match="archive of agent-gateway-store"):
            await prune_into(BEFORE, by="ops", archive=archive)
    assert files_of(archive) == before


@pytest.mark.parametrize("planted", ["renamed", "blanked"])
async def test_an_archived_event_that_was_changed_is_not_erased(
    store: GatewayStore, archive: Path, planted: str
) -> None:
    """Under the id of another, also where it looks as if it had been erased: its leaf says that it is neither."""
    [entry] = entries_of(archive)
    entry = rewritten(archive, entry, with_column("request_id", ["first-0", "victim", "first-2"]))
    if planted == "blanked":
        for name, value in (("salt", None), ("content_hash", None), ("deterministic_rationale", "[ERASED]")):
            entry = rewritten(archive, entry, with_column(name, [value] * 3))
    save(archive, [entry])
    await refuse_erasure(store, "victim", archive, "choose another folder")


async def test_only_the_event_itself_is_blanked_in_the_archive(store: GatewayStore, archive: Path) -> None:
    """Each time that it is there, and no other one that stands at its position."""
    [entry] = entries_of(archive)

    def more(table: pa.Table) -> pa.Table:
        other = with_column("leaf_hash", ["0" * 64])(with_column("request_id", ["other"])(table.slice(1, 1)))
        return pa.concat_tables([table, table.slice(1, 1), other])

    save(archive, [rewritten(archive, entry, more)])
    await store.retention.erase("first-1", reason="r", by="dpo", archive=archive)
    [entry] = entries_of(archive)[1:]
    rows = parquet.ParquetFile(archive / entry.file).read(["request_id", "salt"]).to_pylist()
    assert [(row["request_id"], row["salt"] is None) for row in rows] == [
        ("first-0", False), ("first-1", True), ("first-2", False), ("first-1", True), ("other", False)]  # fmt: skip


async def test_a_hold_covers_an_archived_event_in_whatever_folder_it_lies(store: GatewayStore, archive: Path) -> None:
    """Whoever moved its file to the folder of another day has not taken it out of the hold."""
    [entry] = entries_of(archive)
    moved = entry.file.replace("2025-03-01", "2031-01-01")
    save(archive, [rewritten(archive, entry, lambda table: table, file=moved)])
    await store.retention.hold("case", reason="r", by="c", since=OLD - timedelta(days=1), until=BEFORE)
    with pytest.raises(EventHeldError, match="case"):
        await store.retention.erase("first-1", reason="r", by="dpo", archive=archive)


@pytest.mark.parametrize("is_derived", [False, True])
async def test_what_a_backup_puts_back_is_erased_again(
    store: GatewayStore, tmp_path: Path, database_url: str, is_derived: bool
) -> None:
    """After a restore the table has it whole, and the archive what was left: a prune asks for the erasure first."""
    folder = tmp_path / "a"
    events = [make_event(request_id="first-1", timestamp=OLD, latency_ms=number) for number in range(1 + is_derived)]
    await store.audit.write_many(events)
    await write(store, "other")
    saved = [f"CREATE TABLE saved_{name} AS SELECT * FROM {name}" for name in SEALED]
    emptied = [f"DELETE FROM {name}" for name in SEALED]
    restored = [f"INSERT INTO {name} SELECT * FROM saved_{name}" for name in reversed(SEALED)]
    await tamper(store.database.engine, *saved)
    await store.retention.prune(BEFORE, by="ops", archive=folder)
    *_, stored = [e.request_id for e in Archive(folder).events() if e.request_id.startswith("first-1")]
    assert ("~" in stored) is is_derived
    await store.retention.erase(stored, reason="r", by="dpo", archive=folder)
    await tamper(store.database.engine, *emptied, *restored, *(f"DROP TABLE saved_{name}" for name in SEALED))

    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as opened:
        with pytest.raises(ArchiveError, match=f"'{stored}' was erased in .* erase it again first"):
            await opened.retention.prune(BEFORE, by="ops", archive=folder)
        assert stored in await request_ids(opened)
        await opened.retention.erase(stored, reason="r", by="dpo", archive=folder)
        await opened.retention.prune(BEFORE, by="ops", archive=folder)
        assert (await opened.evidence.verify(archive=folder)).ok


async def test_an_event_that_is_blank_in_the_archive_in_other_words_is_not_erased(
    store: GatewayStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has it whole: what somebody put in its place is not what an erasure leaves of it."""
    await write(store, "first")
    with monkeypatch.context() as patch:
        patch.setattr(prune, "write_door", killed)
        with pytest.raises(KilledError):
            await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
    [entry] = entries_of(tmp_path / "a")
    for name, value in (("salt", None), ("content_hash", None), ("deterministic_rationale", "[ERASED]")):
        entry = rewritten(tmp_path / "a", entry, with_column(name, [value] * 3))
    save(tmp_path / "a", [entry])
    await refuse_erasure(store, "first-1", tmp_path / "a", "choose another folder")
    with pytest.raises(ArchiveError, match="choose another folder"):
        await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
