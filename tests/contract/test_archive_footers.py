"""What the end of an archive's file says of its columns, by which readers leave rows out, is compared with the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from archive_helpers import entries_of, patched, rewritten, save
from contract_helpers import store_sealed_by_hand
from pyarrow import parquet

from agent_gateway_store import GatewayStore
from agent_gateway_store.archive import Archive
from agent_gateway_store.archive.manifest import Entry
from agent_gateway_store.errors import EventHeldError
from agent_gateway_store.models.evidence import FindingKind
from builders import make_event

store = store_sealed_by_hand
# What the files say has nothing to do with the database.
pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

OLD = datetime(2025, 3, 1, 12, tzinfo=UTC)
CALLERS = ["alice", "mallory", "bob"]
# Of a text of more than 4,096 bytes, a file says no bound: of this column it says only the least one.
TEXTS = ["little-by-little", "o" * 5000, "middle"]

Change = Callable[[Path, Entry], Entry]


@pytest.fixture
async def archive(store: GatewayStore, tmp_path: Path) -> Path:
    """An archive of one file, with an event of each caller."""
    await store.audit.write_many(
        make_event(request_id=f"of-{caller}", caller_id=caller, timestamp=OLD, deterministic_rationale=text)
        for caller, text in zip(CALLERS, TEXTS, strict=True)
    )
    await store.audit.write(make_event(request_id="newest"))
    await store.retention.prune(OLD + timedelta(days=60), by="ops", archive=tmp_path / "a")
    await store.evidence.seal()
    return tmp_path / "a"


def bytes_of(old: bytes, new: bytes) -> Change:
    return lambda folder, entry: patched(folder, entry, old, new)


def written_with(change: Callable[[pa.Table], pa.Table] = lambda table: table, **options: Any) -> Change:
    return lambda folder, entry: rewritten(folder, entry, change, options=options)


HIDDEN = bytes_of(b"mallory", b"bobzzzz")

LIES: dict[str, tuple[Change, str]] = {
    "greatest": (HIDDEN, "caller_id"),
    "least": (bytes_of(b"alice", b"bobby"), "caller_id"),
    "one bound alone": (bytes_of(b"little-by-little", b"middle-by-little"), "deterministic_rationale"),
    # The name that Spark looks a column up by.
    "name": (bytes_of(b"\x19\x18\x09caller_id", b"\x19\x18\x09tool_name"), "caller_id"),
    # Of a page of data: it holds no places in a dictionary but values.
    "encodings": (bytes_of(b"\x15\0\x15\x10\x15\2", b"\x15\0\x15\0\x15\2"), "caller_id"),
    "page index": (written_with(write_page_index=True), "caller_id"),
    "order": (written_with(sorting_columns=[parquet.SortingColumn(7)]), "all"),
    "words": (written_with(lambda table: table.replace_schema_metadata({"pandas": "{}"})), "all"),
}


def hide(folder: Path, change: Change) -> None:
    (entry,) = entries_of(folder)
    save(folder, [change(folder, entry)])


@pytest.mark.parametrize("name", LIES)
async def test_verify_names_the_column_that_the_end_of_a_file_lies_about(
    store: GatewayStore, archive: Path, name: str
) -> None:
    change, column = LIES[name]
    assert Archive(archive).verify().ok
    hide(archive, change)

    for verified in (Archive(archive).verify(), await store.evidence.verify(archive=archive)):
        assert not verified.ok
        (finding,) = verified.findings
        assert finding.kind is FindingKind.ALTERED
        assert "says of its columns what is not so" in finding.text
        assert column in finding.text


def test_a_file_of_other_ways_to_write_the_same_is_no_lie(archive: Path) -> None:
    hide(archive, written_with(write_statistics=False, use_dictionary=False, row_group_size=1, compression="gzip"))

    assert Archive(archive).verify().ok


async def test_an_event_that_statistics_hide_is_found_and_held(store: GatewayStore, archive: Path) -> None:
    """Other readers miss it, which is why `verify` is to run before them."""
    await store.retention.hold("suit", reason="r", by="legal", caller_id="mallory")
    hide(archive, HIDDEN)

    found = await store.retention.find(caller_id="mallory", archive=archive)

    assert [each.request_id for each in found] == ["of-mallory"]
    with pytest.raises(EventHeldError):
        await store.retention.erase("of-mallory", reason="r", by="dpo", archive=archive)
    counted = f"SELECT count(*) FROM read_parquet('{archive}/*/*.parquet') WHERE caller_id = 'mallory'"
    assert duckdb.sql(counted).fetchall() == [(0,)]


async def test_an_event_that_the_manifest_hides_is_found_held_and_erased(store: GatewayStore, archive: Path) -> None:
    """A file that comes first is said to hold the positions of all, and the one that holds them to hold another."""
    (entry,) = entries_of(archive)
    whole = (archive / entry.file).read_bytes()
    first = rewritten(
        archive, entry, lambda table: table.slice(0, 1), file="day=2025-03-01/000000000000000-000000000000.parquet"
    )
    (archive / entry.file).write_bytes(whole)
    save(archive, [replace(first, positions=[[0, 2]]), replace(entry, positions=[[0, 0]])])
    assert [event.caller_id for event in Archive(archive).events()] == ["alice"]

    found = await store.retention.find(caller_id="mallory", archive=archive)
    await store.retention.hold("suit", reason="r", by="legal", caller_id="mallory")
    with pytest.raises(EventHeldError):
        await store.retention.erase("of-mallory", reason="r", by="dpo", archive=archive)
    await store.retention.release_hold("suit", by="legal")
    await store.retention.erase("of-mallory", reason="r", by="dpo", archive=archive)

    assert [each.request_id for each in found] == ["of-mallory"]
    left = [parquet.ParquetFile(path).read(["deterministic_rationale"]) for path in archive.rglob("*.parquet")]
    assert not any(TEXTS[1] in table.column(0).to_pylist() for table in left)
