"""Two processes that write to one archive where the file system has no locks: nothing is lost, nothing comes back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from agent_gateway_store.archive import Archive, manifest
from agent_gateway_store.archive.files import Record, read_approvals, rewrite_approvals, write_approvals
from agent_gateway_store.archive.manifest import NAME, Entry, Manifest
from agent_gateway_store.errors import ArchiveError, StoreUnavailableError

pytestmark = pytest.mark.unit

DAY = "2026-01-01"


def opened(folder: Path) -> Manifest:
    found = Manifest(folder)
    found.open()
    return found


def archived(folder: Manifest, *notes: str) -> None:
    folder.append([write_approvals(folder, DAY, [{"note": note} for note in notes])])


def notes_in(folder: Path) -> list[str]:
    read = Manifest(folder).read()
    return [record["note"] for entry in read.of_kind("approvals") for record in read_approvals(read, entry)]


def test_a_file_that_another_process_names_meanwhile_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = opened(tmp_path)
    listed = manifest.files_of

    def meanwhile(folder: Path) -> Iterator[Path]:
        archived(other, "theirs")
        yield from listed(folder)

    monkeypatch.setattr(manifest, "files_of", meanwhile)
    opened(tmp_path)

    assert notes_in(tmp_path) == ["theirs"]


def test_an_older_copy_of_an_erased_record_is_not_brought_back(tmp_path: Path) -> None:
    """Both rewrite one file: the later one is refused, and leaves no file behind."""
    one, other = opened(tmp_path), opened(tmp_path)
    archived(one, "first", "second")

    def meanwhile(record: Record) -> Record | None:
        if record["note"] != "first":
            return None
        rewrite_approvals(other.read(), lambda each: {"note": ""} if each["note"] == "second" else None)
        return {"note": ""}

    with pytest.raises(StoreUnavailableError, match="Another process works on the archive"):
        rewrite_approvals(one, meanwhile)

    assert notes_in(tmp_path) == ["first", ""]
    assert not any("second" in path.read_text() for path in tmp_path.rglob("*.jsonl"))


def test_a_file_that_another_process_has_removed_is_not_named(tmp_path: Path) -> None:
    one = opened(tmp_path)
    entry = write_approvals(one, DAY, [{"note": "mine"}])
    opened(tmp_path)

    with pytest.raises(StoreUnavailableError, match="Another process works on the archive"):
        one.append([entry])

    assert notes_in(tmp_path) == []


def test_a_line_that_ends_in_another_way_is_not_what_was_written(tmp_path: Path) -> None:
    archived(opened(tmp_path), "one")
    archived(opened(tmp_path), "two")
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes().replace(b"\n", b"\r", 1))

    with pytest.raises(ArchiveError, match="Line 1 of"):
        Manifest(tmp_path).read()


def test_half_a_line_of_a_killed_process_is_removed_by_whoever_writes_next(tmp_path: Path) -> None:
    """Two prunes take turns: one is killed, and the other one began before that."""
    one = opened(tmp_path)
    archived(one, "before")
    with (tmp_path / NAME).open("a") as file:
        file.write('{"file": "appro')

    archived(one, "after")

    assert notes_in(tmp_path) == ["before", "after"]


@pytest.mark.parametrize("name", [NAME, "day=2026-01-01/000000000000000-00.parquet"])
def test_a_device_in_the_place_of_a_file_is_not_read(tmp_path: Path, name: str) -> None:
    """`/dev/zero` never ends."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(os.devnull)
    if name != NAME:
        entry = Entry(file=name, kind="events", count=1, positions=[[0, 0]], sha256=sha256().hexdigest())
        (tmp_path / NAME).write_text(entry.to_line())

    assert not Archive(tmp_path).verify().ok
    with pytest.raises(ArchiveError, match="cannot be read"):
        list(Archive(tmp_path).events())
