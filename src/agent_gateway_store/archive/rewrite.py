"""Files of an archive written anew, because something in them was erased."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_gateway_store.archive.files import read_events, require_intact, write_checked, write_day
from agent_gateway_store.archive.manifest import Entry, Manifest
from agent_gateway_store.results.arrow import arrow

if TYPE_CHECKING:
    import pyarrow as pa

Record = dict[str, Any]
"""An approval of an archive: `approval`, `votes` and `notices`."""


def rewrite_events(manifest: Manifest, blank: Mapping[int, Mapping[str, Any]]) -> None:
    """Replace columns of the events at some positions, in every file that holds one; the old files are removed."""
    for entry in manifest.of_kind("events"):
        table = read_events(manifest.folder, entry) if _may_hold(entry, blank) else None
        if table is None:
            continue
        places = {position: place for place, position in enumerate(table.column("position").to_pylist())}
        found = {places[position]: values for position, values in blank.items() if position in places}
        if found:
            day = entry.file.partition("/")[0].removeprefix("day=")
            replaced = _replaced(table, found)
            _replace(manifest, write_day(manifest, day, replaced, entry.checkpoint, replaces=entry.file))


def _may_hold(entry: Entry, blank: Mapping[int, Any]) -> bool:
    return any(first <= position <= last for first, last in entry.positions for position in blank)


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
    """Write approvals to a file, a line for each; return what the manifest must say."""
    text = "".join(json.dumps(record, ensure_ascii=True, sort_keys=True) + "\n" for record in records)
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
    manifest.append([entry])
    (manifest.folder / str(entry.replaces)).unlink(missing_ok=True)
