"""The manifest of an archive: a line for each file, synced before a row leaves the table. No other file counts."""

from __future__ import annotations

import asyncio
import json
import os
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeAlias

from agent_gateway_store.errors import ArchiveError, StoreUnavailableError
from agent_gateway_store.storage.exclusive import FOLDER_LOCK, folder_lock
from agent_gateway_store.storage.files import create_file, create_folder, open_regular, sync

NAME = "manifest.jsonl"
SCHEMA_VERSION = 1
"""Grows when a column of the files changes its meaning, comes or goes."""

Runs: TypeAlias = list[list[int]]
"""Positions, as the first and the last of each run of neighbours, in order."""

# For a file of some megabytes, read as fast as a disk gives it.
_CHUNK_BYTES = 2**20
# Chosen: many times a batch of another log's prune, and less than those wait who wait for the lock of the database.
_WAIT_S = 5.0


@dataclass(frozen=True)
class Entry:
    """What the manifest says about one file.

    Attributes:
        file: Its path below the folder, with slashes.
        kind: Events (Parquet), or approvals with their votes and notices (JSONL).
        count: How many records it holds.
        positions: Of its events in the log.
        sha256: Of the file.
        checkpoint: The note of a checkpoint that covers its events.
        replaces: The file whose place it takes, because something in that was erased.
    """

    file: str
    kind: Literal["events", "approvals"]
    count: int
    positions: Runs
    sha256: str
    schema_version: int = SCHEMA_VERSION
    checkpoint: str | None = None
    replaces: str | None = None

    def to_line(self) -> str:
        """Return the line, which ends with a hash of the rest of it."""
        return _line(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Entry:
        """Return what a line says; ValueError if one character of it is not what was written."""
        said = json.loads(line)
        if not isinstance(said, dict) or said.pop("line_sha256", None) is None or _line(said) != line:
            raise ValueError("it is not as it was written")
        if said.keys() != _FIELDS:
            raise ValueError("a later version wrote it")
        if not isinstance(said["file"], str) or not said["file"].isprintable():
            raise ValueError("it names no file")
        optional = [said[name] for name in ("checkpoint", "replaces") if said[name] is not None]
        if not all(isinstance(each, str) for each in (said["sha256"], *optional)) or type(said["count"]) is not int:
            raise ValueError("a value is of another type")
        if said["kind"] not in ("events", "approvals"):
            raise ValueError("it names no kind of file")
        if type(said["schema_version"]) is not int or said["schema_version"] != SCHEMA_VERSION:
            raise ValueError("another version wrote it")
        if not all(len(run) == 2 and all(type(end) is int for end in run) for run in said["positions"]):
            raise ValueError("it names no positions")
        return cls(**said)


_FIELDS = {each.name for each in fields(Entry)}


def _line(said: dict[str, Any]) -> str:
    text = json.dumps(said, sort_keys=True)
    return json.dumps(said | {"line_sha256": sha256(text.encode()).hexdigest()}) + "\n"


def _is_whole(torn: bytes) -> bool:
    """True if a last line lacks nothing but its end, which became another byte: no run that was killed leaves that."""
    try:
        Entry.from_line(torn[:-1].decode() + "\n")
    except (ValueError, TypeError):
        return False
    return True


class Manifest:
    """The manifest of one folder, read again only as far as it has grown.

    Attributes:
        folder: The archive.
        entries: By their files, those that were replaced left out.
        is_torn: Whether the last line was not written to its end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / NAME
        self.entries: dict[str, Entry] = {}
        self.is_torn = False
        self._read_bytes = 0

    def read(self) -> Manifest:
        """Read what was appended since the last time.

        Raises:
            ArchiveError: There is no manifest, or a line of it is not what was written.
        """
        try:
            with open_regular(self.path) as file:
                file.seek(self._read_bytes)
                added = file.read()
        except OSError as exc:
            raise ArchiveError(
                f"{self.path} cannot be read, so {self.folder} is not an archive: {exc.strerror}.", file=NAME
            ) from exc
        whole, end, torn = added.rpartition(b"\n")
        self.is_torn = bool(torn)
        if torn and _is_whole(torn):
            raise ArchiveError(f"The last line of {self.path} is not what was written.", file=NAME)
        for number, line in enumerate(whole.split(b"\n") if end else (), start=1):
            try:
                entry = Entry.from_line(line.decode("utf-8") + "\n")
            except (ValueError, TypeError, RecursionError) as exc:
                raise ArchiveError(
                    f"Line {number:,} of {self.path} is not what was written: {exc}. Restore the file from a backup.",
                    file=NAME,
                ) from exc
            self.entries.pop(entry.replaces or "", None)
            self.entries[entry.file] = entry
        self._read_bytes += len(whole) + len(end)
        return self

    def of_kind(self, kind: str) -> list[Entry]:
        """Return the entries of one kind, in the order in which they were written."""
        return [each for each in self.entries.values() if each.kind == kind]

    def open(self) -> None:
        """Make the folder an archive if it is not one yet, and remove what a killed run has left: with `archive_lock`.

        Raises:
            ArchiveError: See `read`.
            OSError: It cannot be written.
        """
        if not self.path.exists():
            create_file(self.path)
            sync(self.folder)
        self._read_and_repair()
        for path in files_of(self.folder):
            name = path.relative_to(self.folder).as_posix()
            # Where the file system has no locks, another process may have named it meanwhile.
            if name not in self.entries and name not in self.read().entries:
                path.unlink(missing_ok=True)

    def append(self, entries: Iterable[Entry]) -> None:
        """Add lines, and return once they are on disk.

        Raises:
            StoreUnavailableError: Another process has worked on the archive meanwhile, and nothing was added.
        """
        entries = list(entries)
        self._read_and_repair()
        for entry in entries:
            is_there = (self.folder / entry.file).exists()
            if not is_there or (entry.replaces is not None and entry.replaces not in self.entries):
                raise StoreUnavailableError(f"{_busy(self.folder)}: try again.")
        text = "".join(entry.to_line() for entry in entries).encode()
        with self.path.open("ab") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.read()

    def _read_and_repair(self) -> None:
        """Read, and remove the last line if a killed run has left only a part of it."""
        self.read()
        if self.is_torn:
            with self.path.open("r+b") as file:
                file.truncate(self._read_bytes)
                os.fsync(file.fileno())
            self.is_torn = False


@asynccontextmanager
async def archive_lock(folder: Path) -> AsyncIterator[None]:
    """Let one process at a time write to an archive, of which the folder is made; after the lock of a database.

    Raises:
        ArchiveError: The folder holds other things and no manifest.
        OSError: It cannot be written.
        StoreUnavailableError: Another process works there.
    """
    await asyncio.to_thread(_make_folder, folder)
    async with folder_lock(folder, wait_s=_WAIT_S, busy=_busy(folder)):
        yield


def _busy(folder: Path) -> str:
    return f"Another process works on the archive {folder}"


def _make_folder(folder: Path) -> None:
    create_folder(folder)
    # SQLite makes a second file beside the one that is locked.
    others = (each for each in folder.iterdir() if not each.name.startswith(FOLDER_LOCK))
    if not (folder / NAME).exists() and any(others):
        raise ArchiveError(f"{folder} is not empty and holds no {NAME}: choose another folder.", file=NAME)


def files_of(folder: Path) -> Iterator[Path]:
    """Yield the files of an archive but its manifest, also those that were not finished."""
    for pattern in ("day=*/*.parquet", "day=*/.*.partial", "approvals-*.jsonl", ".*.partial"):
        yield from folder.glob(pattern)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as it is read from disk."""
    digest = sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def runs_of(positions: Iterable[int]) -> Runs:
    """Return positions as runs of neighbours."""
    runs: Runs = []
    for position in sorted(positions):
        if runs and position <= runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return runs


class Positions:
    """A set of positions, as runs that are joined: one position is found among any number of them."""

    def __init__(self, runs: Iterable[list[int]] = ()) -> None:
        self.runs: Runs = []
        for first, last in sorted(runs):
            if self.runs and first <= self.runs[-1][1] + 1:
                self.runs[-1][1] = max(last, self.runs[-1][1])
            else:
                self.runs.append([first, last])

    def __contains__(self, position: int) -> bool:
        place = bisect_right(self.runs, [position, float("inf")]) - 1
        return place >= 0 and self.runs[place][0] <= position <= self.runs[place][1]

    def meets(self, runs: Iterable[list[int]]) -> bool:
        """True if one of the positions is in one of `runs`."""
        for first, last in runs:
            place = bisect_right(self.runs, [last, float("inf")]) - 1
            if place >= 0 and self.runs[place][1] >= first:
                return True
        return False
