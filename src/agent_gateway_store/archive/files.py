"""The files of an archive: written beside their name, synced, read back, and only then renamed.

Where something in one was erased, it is written anew.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_gateway_store.archive.manifest import Entry, Manifest, runs_of, sha256_of
from agent_gateway_store.errors import ArchiveError, StoreUnavailableError
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.models.evidence import leaf_hash
from agent_gateway_store.results.arrow import arrow
from agent_gateway_store.results.cells import Column, columns_of
from agent_gateway_store.storage.arrow import by_day
from agent_gateway_store.storage.files import create_file, create_folder, sync

if TYPE_CHECKING:
    import pyarrow as pa

EVENT_COLUMNS = tuple(
    # Parquet numbers the words of a text by itself, and what is read back is then equal to what was written.
    Column(each.name, "text") if each.kind == "category" else each
    for each in columns_of(AuditEvent)
)
COLUMNS = (*EVENT_COLUMNS, Column("position", "integer"), Column("salt", "text"), Column("leaf_hash", "text"))
"""Those of an event, its position in the log, and salt and leaf as hex digits."""
NAMES = tuple(column.name for column in COLUMNS)
"""Their names."""

# Chosen: readers skip whole groups, and a group is in memory while it is read.
_GROUP_ROWS = 10_000
# As long as the salts of the leaves: nobody guesses 128 bits.
_SALT_BYTES = 16


def said_of_unhashed(salt: str, leaf: str) -> str | None:
    """Say of an event that does not fit its leaf that it was sealed without a hash, which counts as zeros there."""
    try:
        is_unhashed = leaf_hash(bytes.fromhex(salt), bytes(32)).hex() == leaf
    except (TypeError, ValueError):
        # A file can be made to hold something else.
        return None
    if not is_unhashed:
        return None
    return (
        "The event had no valid content_hash when it was sealed: it was not written by this package, or was changed "
        "before it was sealed."
    )


def write_events(manifest: Manifest, table: pa.Table, checkpoint: str | None) -> list[Entry]:
    """Write events, which are in the order of time, to one file for each day; return what the manifest must say.

    Raises:
        ArchiveError: What is read back is not what was written.
        OSError: The folder cannot be written.
    """
    entries = [write_day(manifest, day, rows, checkpoint) for day, rows in by_day(table, "timestamp")]
    sync(manifest.folder)
    return entries


def write_day(
    manifest: Manifest, day: str, table: pa.Table, checkpoint: str | None, *, replaces: str | None = None
) -> Entry:
    """Write the events of one day to a file; errors as of `write_events`."""
    from pyarrow import parquet

    positions = table.column("position").to_pylist()
    runs = runs_of(positions)

    def write(path: Path) -> None:
        # As `Footer` knows them, whatever a later version of pyarrow writes by itself.
        parquet.write_table(
            table,
            path,
            compression="zstd",
            row_group_size=_GROUP_ROWS,
            data_page_version="1.0",
            write_page_index=False,
        )

    def check(path: Path) -> bool:
        with parquet.ParquetFile(path) as file:
            # With threads it would take twice the time and 40 MB more, for a file of this size.
            return bool(file.read(use_threads=False).equals(table))

    # By position, so that a listing shows them in the order of the log; 15 digits are more than there will be.
    file = f"day={day}/{runs[0][0]:015d}-{secrets.token_hex(6)}.parquet"
    digest = write_checked(manifest.folder / file, write, check)
    return Entry(
        file=file,
        kind="events",
        count=len(positions),
        positions=runs,
        sha256=digest,
        checkpoint=checkpoint,
        replaces=replaces,
    )


def write_checked(path: Path, write: Callable[[Path], Any], check: Callable[[Path], bool]) -> str:
    """Write a file for its owner alone, force it to disk, read it back, and give it its name; return its SHA-256."""
    create_folder(path.parent)
    partial = path.with_name(f".{path.name}.partial")
    try:
        create_file(partial)
        write(partial)
        sync(partial)
        digest = sha256_of(partial)
        if not check(partial):
            raise ArchiveError(
                f"{path} does not read back as it was written, so no event was pruned: check the disk.", file=path.name
            )
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return digest


def require_intact(folder: Path, entries: Iterable[Entry]) -> None:
    """Raise ArchiveError unless each file is what was written."""
    for entry in entries:
        path = folder / entry.file
        try:
            if not path.resolve().is_relative_to(folder.resolve()) or (path.exists() and not path.is_file()):
                raise ArchiveError(f"{path} is not a file of this archive.", file=entry.file)
            digest = sha256_of(path)
        except (OSError, RuntimeError) as exc:
            # Up to Python 3.12, a link to itself is a RuntimeError.
            why = exc.strerror if isinstance(exc, OSError) else exc
            raise ArchiveError(f"{path} cannot be read: {why}.", file=entry.file) from exc
        if digest != entry.sha256:
            raise ArchiveError(f"{path} is not what was written: restore it from a backup.", file=entry.file)


def read_events(folder: Path, entry: Entry) -> pa.Table:
    """Return the events of one file, with `COLUMNS`; ArchiveError if it is not what was written."""
    arrow("Reading an archive")
    from pyarrow import parquet

    require_intact(folder, [entry])
    with parquet.ParquetFile(folder / entry.file) as file:
        return file.read()


Record = dict[str, Any]
"""An approval of an archive: `approval`, `votes`, `notices`, and `salt` where it was read."""


def rewrite_events(manifest: Manifest, blank: Mapping[tuple[int, str], Mapping[str, Any]]) -> None:
    """Replace columns of the events with some positions and leaves, in every file that has one; the old files go."""
    from pyarrow import parquet

    for entry in manifest.of_kind("events") if blank else ():
        # Whatever the manifest says of the positions.
        with parquet.ParquetFile(manifest.folder / entry.file) as file:
            held = file.read(["position", "leaf_hash"])
        keys = zip(*(column.to_pylist() for column in held.columns), strict=True)
        if found := {place: blank[key] for place, key in enumerate(keys) if key in blank}:
            table = read_events(manifest.folder, entry)
            day = entry.file.partition("/")[0].removeprefix("day=")
            replaced = _replaced(table, found)
            _replace(manifest, write_day(manifest, day, replaced, entry.checkpoint, replaces=entry.file))


def _replaced(table: pa.Table, rows: Mapping[int, Mapping[str, Any]]) -> pa.Table:
    pa = arrow()
    for name in sorted({name for values in rows.values() for name in values}):
        column = table.column(name).to_pylist()
        for place, values in rows.items():
            if name in values:
                column[place] = values[name]
        index = table.schema.get_field_index(name)
        table = table.set_column(index, table.schema.field(index), pa.array(column, table.schema.field(index).type))
    return table


def read_approvals(manifest: Manifest, entry: Entry) -> list[Record]:
    """Return the approvals of one file; ArchiveError if it is not what was written."""
    require_intact(manifest.folder, [entry])
    text = (manifest.folder / entry.file).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write_approvals(manifest: Manifest, name: str, records: Sequence[Record], *, replaces: str | None = None) -> Entry:
    """Write approvals to a file, a line for each; return what the manifest must say.

    Each gets a salt, so that the hash of the file, which stays in the manifest, does not let one be guessed that was
    erased.
    """
    salted = [record | {"salt": secrets.token_hex(_SALT_BYTES)} for record in records]
    text = "".join(json.dumps(record, ensure_ascii=True, sort_keys=True) + "\n" for record in salted)
    file = f"approvals-{name}-{secrets.token_hex(6)}.jsonl"

    def check(path: Path) -> bool:
        return path.read_text(encoding="utf-8") == text

    digest = write_checked(manifest.folder / file, lambda path: path.write_text(text, encoding="utf-8"), check)
    return Entry(file=file, kind="approvals", count=len(records), positions=[], sha256=digest, replaces=replaces)


def rewrite_approvals(manifest: Manifest, change: Callable[[Record], Record | None]) -> int:
    """Replace the approvals for which `change` returns another; return how many."""
    count = 0
    for entry in manifest.of_kind("approvals"):
        records = read_approvals(manifest, entry)
        changed = [change(record) for record in records]
        if replaced := sum(each is not None for each in changed):
            written = [new or old for new, old in zip(changed, records, strict=True)]
            day = entry.file.removeprefix("approvals-")[: len("2026-01-01")]
            _replace(manifest, write_approvals(manifest, day, written, replaces=entry.file))
            count += replaced
    return count


def _replace(manifest: Manifest, entry: Entry) -> None:
    try:
        manifest.append([entry])
    except StoreUnavailableError:
        # It may hold what another process has erased meanwhile.
        (manifest.folder / entry.file).unlink(missing_ok=True)
        raise
    (manifest.folder / str(entry.replaces)).unlink(missing_ok=True)
