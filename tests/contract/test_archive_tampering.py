"""What whoever can write to an archive changes in it, the manifest with it, is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pytest
from archive_helpers import entries_of, rewritten, save, with_column
from contract_helpers import store_sealed_by_hand
from erasure_helpers import BEFORE, OLD

from agent_gateway_store import GatewayStore
from agent_gateway_store.archive import Archive
from agent_gateway_store.archive.manifest import Entry
from agent_gateway_store.errors import ArchiveError
from agent_gateway_store.models.evidence import FindingKind
from builders import make_event
from cases import cases

store = store_sealed_by_hand
# What the files say has nothing to do with the database.
pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
async def archive(store: GatewayStore, tmp_path: Path) -> Path:
    """An archive of four events in two files."""
    days = [OLD, OLD, OLD + timedelta(days=1), OLD + timedelta(days=1)]
    await store.audit.write_many([make_event(request_id=f"r-{n}", timestamp=day) for n, day in enumerate(days)])
    await store.audit.write(make_event(request_id="newest"))
    await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
    await store.evidence.seal()
    assert Archive(tmp_path / "a").verify().ok
    assert (await store.evidence.verify(archive=tmp_path / "a")).ok
    return tmp_path / "a"


def changed(archive: Path, name: str, **said: Any) -> Path:
    """A copy of the archive with this change in its first file; `said` is what the manifest says of all besides."""
    folder = archive.with_name(uuid4().hex)
    shutil.copytree(archive, folder)
    first, *others = entries_of(folder)
    change, _ = CHANGES[name]
    save(folder, [replace(each, **said) for each in [*change(folder, first), *others]])
    return folder


def other_rows(change: Callable[[pa.Table], pa.Table], **said: Any) -> Callable[[Path, Entry], list[Entry]]:
    return lambda folder, entry: [rewritten(folder, entry, change, **said)]


def named(name: Callable[[str], str], **said: Any) -> Callable[[Path, Entry], list[Entry]]:
    return lambda folder, entry: [rewritten(folder, entry, lambda table: table, file=name(entry.file), **said)]


def copied(folder: Path, entry: Entry) -> list[Entry]:
    """List a second file of the same events."""
    path = folder / entry.file.replace(".parquet", "0.parquet")
    path.write_bytes((folder / entry.file).read_bytes())
    return [entry, replace(entry, file=path.relative_to(folder).as_posix())]


def with_more(name: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.add_column(0, name, pa.array(["ALLOW"] * table.num_rows))


def text_of(name: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: with_column(name, list(map(str, table.column(name).to_pylist())), pa.string())(table)


CHANGES: dict[str, tuple[Callable[[Path, Entry], list[Entry]], str]] = {
    "doubled rows": (
        other_rows(lambda table: pa.concat_tables([table] * 3), positions=[[0, 5]]),
        "an event more than once",
    ),
    "more rows than listed": (
        other_rows(lambda table: pa.concat_tables([table] * 3)),
        "not hold the positions that the manifest names",
    ),
    "listed copy": (copied, "that another file holds"),
    "other day": (named(lambda file: file.replace("2025-03-01", "2031-01-01")), "2 events of another day"),
    "no day": (named(lambda file: file.removeprefix("day=")), "is not named as"),
    "hidden": (named(lambda file: file.replace("/", "/.")), "is not named as"),
    "other kind": (named(lambda file: file, kind="approvals", positions=[]), "is not named as"),
    "more columns": (other_rows(with_more("Decision")), "has other columns"),
    "other order": (other_rows(lambda table: table.select(table.column_names[::-1])), "has other columns"),
    "boolean": (other_rows(with_column("latency_ms", [True, True], pa.bool_())), "has other columns"),
    "text": (other_rows(text_of("position")), "has other columns"),
    "other version": (lambda _, entry: [replace(entry, schema_version=99)], "another version wrote it"),
    "true version": (lambda _, entry: [replace(entry, schema_version=True)], "another version wrote it"),
}


def looped(folder: Path, entry: Entry) -> list[Entry]:
    """Put a link to itself in the place of a file."""
    path = folder / entry.file
    path.unlink()
    path.symlink_to(path.name)
    return [entry]


CHANGES |= {
    "loop": (looped, "cannot be read"),
    "long name": (lambda _, entry: [replace(entry, file="day=2025-03-01/" + "a" * 5000)], "cannot be read"),
} | {
    f"{name} {value}": (lambda _, entry, said={name: value}: [replace(entry, **said)], "of another type")
    for name, value in (("checkpoint", 5), ("replaces", ["x"]), ("sha256", None), ("count", None), ("count", True))
}


@cases("name", CHANGES)
async def test_what_is_changed_with_the_manifest_is_found(store: GatewayStore, archive: Path, name: str) -> None:
    """By the archive alone, and against the log: rows, names, columns, versions."""
    folder = changed(archive, name)

    for verified in (Archive(folder).verify(), await store.evidence.verify(archive=folder)):
        assert not verified.ok
        assert any(CHANGES[name][1] in each.text for each in verified.findings), verified.findings
        assert {each.kind for each in verified.findings} <= {FindingKind.ALTERED, FindingKind.MISSING}


@pytest.mark.system
@cases("name", ["more columns", "boolean", "other version", "loop", "long name", "checkpoint 5"])
async def test_it_ends_a_command_that_reads_it_in_one_sentence(store: GatewayStore, archive: Path, name: str) -> None:
    """Nothing is pruned, and nothing is erased."""
    folder = changed(archive, name, positions=[[0, 10**6]])
    await store.audit.write_many([make_event(request_id="more", timestamp=OLD), make_event(request_id="newest-2")])

    with pytest.raises(ArchiveError):
        await store.retention.prune(BEFORE, by="ops", archive=folder)
    with pytest.raises(ArchiveError):
        await store.retention.erase("r-0", reason="r", by="dpo", archive=folder)

    assert await store.audit.get_by_request_id("more") is not None
    assert [event async for event in store.audit.stream(tool_name="audit.erase")] == []


@pytest.mark.parametrize("folder", ["day=2025-03-01", "day=1999-01-01", "more/of/it"])
async def test_a_file_that_the_manifest_does_not_name_is_said(store: GatewayStore, archive: Path, folder: str) -> None:
    """A killed prune leaves such, so it is no finding; but other readers count what is in it."""
    (archive / folder).mkdir(parents=True, exist_ok=True)
    (archive / folder / "x.parquet").write_bytes((archive / entries_of(archive)[0].file).read_bytes())

    for verified in (Archive(archive).verify(), await store.evidence.verify(archive=archive)):
        assert verified.ok
        (remark,) = verified.remarks
        assert f"Files that the manifest does not name: 1, such as '{folder}/x.parquet'." in remark
