"""Whether an archive, and each event in it, is of this log: after a restore, other events have the same positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import select, text

from agent_gateway_store._text import code_text
from agent_gateway_store.archive.files import NAMES
from agent_gateway_store.archive.manifest import NAME, Entry, Manifest
from agent_gateway_store.archive.reader import CheckedRow, archived_rows, checked_row, rows_of, stored_form
from agent_gateway_store.audit.erased import blank_hash
from agent_gateway_store.errors import ArchiveError
from agent_gateway_store.models.evidence import AuditLeaf
from agent_gateway_store.storage.arrow import in_thread
from agent_gateway_store.storage.database import Database

if TYPE_CHECKING:
    import pyarrow as pa

_leaves = AuditLeaf.__table__


async def open_own_archive(database: Database, manifest: Manifest) -> None:
    """Open it as `manifest.open` does; ArchiveError if the archive is that of another log."""
    await in_thread(manifest.open)
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
        position, leaf, checked = row[-3], row[-1], checked_row(row)
        # An erasure blanks the table first, and may have been killed then.
        wanted[position] = {(leaf, None), (leaf, checked and checked.left)}
    others: set[CheckedRow] = set()
    keep = pc.field("position").isin(events.column("position").combine_chunks())
    for entry in entries:
        for row in archived_rows(manifest.folder, entry, keep):
            checked = checked_row(row)
            if checked and (checked.leaf, checked.left) in wanted.get(checked.position, ()):
                del wanted[checked.position]
            elif checked:
                others.add(checked)
    if not wanted:
        return
    for row in rows_of(events):
        if row[-3] in wanted:
            event = dict(zip(NAMES, stored_form(row), strict=True))
            if CheckedRow(row[-3], row[-1], blank_hash(event)) in others:
                raise ArchiveError(
                    f"The event {code_text(event['request_id'])} was erased in {manifest.folder}, and the database, "
                    "restored from a backup, has it whole: erase it again first.",
                    file=NAME,
                )
    raise _of_another(manifest, min(wanted))


async def require_own_events(
    database: Database, manifest: Manifest, rows: Sequence[Sequence[Any]], whole: Mapping[int, str]
) -> None:
    """Raise ArchiveError unless each archived event, as a row of a file, is what this log has sealed at its position.

    A blanked one must be erased in this log, too, or be what an erasure would leave of the `whole` one, by position.
    """
    checked = [(row[-3], checked_row(row)) for row in rows]
    own = select(_leaves.c.position, _leaves.c.leaf_hash, _leaves.c.salt)
    async with database.read() as connection:
        found = await connection.execute(own.where(_leaves.c.position.in_([position for position, _ in checked])))
        sealed = {row.position: row for row in found}
    for position, row in checked:
        leaf = sealed.get(position)
        if row is None or leaf is None or leaf.leaf_hash.hex() != row.leaf:
            raise _of_another(manifest, position)
        # An erasure forgets the salt in the table before it blanks the archive; a backup puts it back.
        if row.left is not None and leaf.salt and row.left != whole.get(position):
            raise _of_another(manifest, position)


def _of_another(manifest: Manifest, position: int) -> ArchiveError:
    return ArchiveError(
        f"{manifest.folder} does not hold the event that this log has sealed at {position:,}, though it says so, as "
        "after the database was restored from a backup: choose another folder.",
        file=NAME,
    )
