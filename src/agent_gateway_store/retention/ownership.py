"""Whether an archive, and each event in it, is of this log: after a restore, other events have the same positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlalchemy import text

from agent_gateway_store.archive.manifest import NAME, Entry, Manifest
from agent_gateway_store.archive.reader import archived_rows, checked_row, rows_of
from agent_gateway_store.errors import ArchiveError
from agent_gateway_store.storage.database import Database

if TYPE_CHECKING:
    import pyarrow as pa


async def require_own_archive(database: Database, manifest: Manifest) -> None:
    """Raise ArchiveError if the archive is that of another log."""
    notes = (entry.checkpoint for entry in manifest.of_kind("events"))
    origins = {note.partition("\n")[0] for note in notes if note}
    async with database.read() as connection:
        found = await connection.execute(text("SELECT DISTINCT origin FROM audit_checkpoints"))
        own = set(found.scalars())
    if foreign := sorted(origins - own):
        raise ArchiveError(
            f"{manifest.folder} is the archive of {', '.join(foreign)}, and this log is "
            f"{', '.join(sorted(own))}: choose another folder.",
            file=manifest.path.name,
        )


def require_held(manifest: Manifest, entries: Sequence[Entry], events: pa.Table) -> None:
    """Raise ArchiveError unless the files hold each of these events of the table, whose columns are those of a file."""
    import pyarrow.compute as pc

    wanted: dict[int, set[tuple[str, str | None]]] = {}
    for row in rows_of(events):
        _, _, left = checked_row(row) or (None, None, None)
        # An erasure blanks the table first, and may have been killed then.
        wanted[row[-3]] = {(row[-1], None), (row[-1], left)}
    keep = pc.field("position").isin(events.column("position").combine_chunks())
    for entry in entries:
        for row in archived_rows(manifest.folder, entry, keep):
            position, leaf, left = checked_row(row) or (-1, "", None)
            if (leaf, left) in wanted.get(position, ()):
                del wanted[position]
    if wanted:
        raise _of_another(manifest, min(wanted))


def _of_another(manifest: Manifest, position: int) -> ArchiveError:
    return ArchiveError(
        f"{manifest.folder} does not hold the event that this log has sealed at {position:,}, though it says so, as "
        "after the database was restored from a backup: choose another folder.",
        file=NAME,
    )
