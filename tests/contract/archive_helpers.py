"""What whoever can write to an archive does: change a file, and the manifest with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from agent_gateway_store.archive.manifest import NAME, Entry

Change = Callable[[pa.Table], pa.Table]


def entries_of(folder: Path) -> list[Entry]:
    """What the manifest says."""
    return [Entry.from_line(line) for line in (folder / NAME).read_text().splitlines(keepends=True)]


def save(folder: Path, entries: list[Entry]) -> None:
    """Write the manifest anew, so that each line has the hash of the rest of it."""
    (folder / NAME).write_text("".join(entry.to_line() for entry in entries))


def rewritten(
    folder: Path,
    entry: Entry,
    change: Change,
    *,
    file: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    **said: Any,
) -> Entry:
    """Replace a file by what `change` makes of its rows; return what the manifest then says of it.

    Args:
        options: Of pyarrow's writer.
    """
    path = folder / (file or entry.file)
    with parquet.ParquetFile(folder / entry.file) as old:
        table = change(old.read())
    (folder / entry.file).unlink()
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(table, path, **options)
    digest = sha256(path.read_bytes()).hexdigest()
    return replace(entry, **{"file": file or entry.file, "sha256": digest, "count": table.num_rows, **said})


def patched(folder: Path, entry: Entry, old: bytes, new: bytes) -> Entry:
    """Replace bytes of the same number in the end of a file, which says what its columns hold."""
    path = folder / entry.file
    data = path.read_bytes()
    at = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert old in data[at:]
    path.write_bytes(data[:at] + data[at:].replace(old, new))
    return replace(entry, sha256=sha256(path.read_bytes()).hexdigest())


def with_column(name: str, values: list[Any], kind: pa.DataType | None = None) -> Change:
    """Return what gives a column other values, or another type."""

    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        array = pa.array(values, kind or table.schema.field(place).type)
        return table.set_column(place, pa.field(name, array.type), array)

    return change
