"""`Archive`: pruned events, read and verified without a database."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack
from uuid import UUID

from agent_gateway_store._text import code_text, describe
from agent_gateway_store.archive.files import EVENT_COLUMNS, NAMES, require_intact, said_of_unhashed
from agent_gateway_store.archive.footer import BATCH_ROWS, Footer, require_columns
from agent_gateway_store.archive.manifest import Entry, Manifest, Positions, files_of, runs_of
from agent_gateway_store.audit.document import hash_of_stored
from agent_gateway_store.audit.filters import Filters, criteria
from agent_gateway_store.audit.selects import FIELDS, events_of
from agent_gateway_store.errors import ArchiveError
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.models.evidence import Finding, FindingKind, leaf_hash
from agent_gateway_store.models.retention import ArchiveVerification
from agent_gateway_store.results.arrow import arrow, arrow_schema, conform
from agent_gateway_store.results.cells import columns_of
from agent_gateway_store.storage.arrow import DAY
from agent_gateway_store.storage.files import open_regular
from agent_gateway_store.storage.filters import Criteria, searched_text

if TYPE_CHECKING:
    import pyarrow as pa

# Of one file. Chosen: where more was altered, everything may be.
_MOST_FINDINGS = 1_000
_FILES = {
    "events": re.compile(r"day=([0-9-]+)/[0-9]+-[0-9a-f]+\.parquet"),
    "approvals": re.compile(r"approvals-([0-9-]+)-[0-9a-f]+\.jsonl"),
}
_EVENT_NAMES = tuple(column.name for column in EVENT_COLUMNS)
_TIMESTAMP, _CONTENT_HASH = map(FIELDS.index, ("timestamp", "content_hash"))


class CheckedRow(NamedTuple):
    """An archived event whose hashes fit.

    Attributes:
        position: In the log.
        leaf: As hex digits.
        left: Where it was erased, the hash of what is left; None: it is whole.
    """

    position: int
    leaf: str
    left: str | None = None


class Archive:
    """A folder to which events were pruned: read in constant memory, with filters that Parquet itself applies.

    Each event is there once, also where a run was killed while it wrote. Needs no database.

    Args:
        folder: As it was given to `store.retention.prune`.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)

    def events(self, **filters: Unpack[Filters]) -> Iterator[AuditEvent]:
        """Yield the events that match, day after day, and within a day in the order in which they were pruned.

        Args:
            filters: As of `store.audit.search`.

        Raises:
            ArchiveError: The folder is not an archive, a line of its manifest is not what was written, or a file has
                other columns.
            MissingExtraError: pyarrow is not installed.
            TypeError: There is no such filter.
            ValueError: There is no such value.
        """
        for _, batch in self.batches(filters, _EVENT_NAMES):
            yield from events_of(map(stored_form, rows_of(batch)))

    def to_arrow(self, **filters: Unpack[Filters]) -> pa.Table:
        """Return the events that match as one table, with the columns of `store.audit.to_arrow`; see `events`."""
        pa = arrow()
        tables = [pa.Table.from_batches([batch]) for _, batch in self.batches(filters, _EVENT_NAMES)]
        return conform(
            pa.concat_tables(tables) if tables else arrow_schema(EVENT_COLUMNS).empty_table(), columns_of(AuditEvent)
        )

    def verify(self) -> ArchiveVerification:
        """Recompute every hash: of the manifest, of the files, and of each event from its columns, with its leaf.

        That the leaves are those of the log is for `store.evidence.verify(archive=...)` to say.

        Raises:
            MissingExtraError: pyarrow is not installed.
        """
        arrow("Reading an archive")
        walk = ArchiveWalk(self.folder)
        for _ in walk.checked_rows():
            pass
        return ArchiveVerification(
            ok=not walk.findings,
            files=walk.files,
            events=walk.events,
            erased=walk.erased,
            findings=tuple(walk.findings),
            remarks=tuple(walk.remarks()),
        )

    def batches(
        self, filters: Mapping[str, Any], columns: Sequence[str], keep: Any = None, *, skips: bool = True
    ) -> Iterator[tuple[Entry, pa.RecordBatch]]:
        """Yield the rows that match, with these columns, each event once.

        Args:
            filters: As of `events`.
            columns: Their names.
            keep: One more condition of pyarrow.
            skips: False looks at each row, whatever days, positions and statistics say, and yields the copies of an
                event as well: for what must miss none.
        """
        arrow("Reading an archive")
        found = criteria(filters, org_id=None)
        condition, exact = _condition(found, filters.get("text"))
        if keep is not None:
            condition = keep if condition is None else condition & keep
        manifest = Manifest(self.folder).read()
        entries = sorted(manifest.of_kind("events"), key=lambda entry: entry.file)
        repeated = _repeated(entries)
        needed = dict.fromkeys([*columns, *(["risk_labels"] if exact else []), *(["position"] if repeated else [])])
        scanned = _scanned if skips else _read
        for number, entry in enumerate(entries):
            if skips and not _may_hold(entry, found):
                continue
            known = None
            if skips and entry.file in repeated:
                known = Positions([list(run) for each in entries[:number] for run in each.positions])
            for batch in scanned(self.folder / entry.file, list(needed), condition):
                kept = _kept(batch, exact, known)
                if kept.num_rows:
                    yield entry, kept.select(list(columns))


class ArchiveWalk:
    """Every event of an archive, checked.

    Attributes:
        files: How many files were read.
        events: How many events of them fit.
        erased: How many were erased: what is left of those only the log can vouch for.
        findings: What does not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = Manifest(folder)
        self.files = self.events = self.erased = 0
        self.findings: list[Finding] = []

    def checked_rows(self) -> Iterator[list[CheckedRow]]:
        """Yield batches of what fits."""
        try:
            self.manifest.read()
        except ArchiveError as exc:
            self._note(FindingKind.ALTERED, str(exc))
        for file in sorted(_repeated(self.manifest.of_kind("events"))):
            self._note(FindingKind.ALTERED, f"{file} holds an event that another file holds.")
        for entry in self.manifest.entries.values():
            if not (named := _FILES[entry.kind].fullmatch(entry.file)):
                self._note(FindingKind.ALTERED, f"{entry.file} is not named as an archive names its files.")
            try:
                require_intact(self.manifest.folder, [entry])
            except ArchiveError as exc:
                # Not `exists`, which raises for a name that is too long.
                is_there = os.path.lexists(self.manifest.folder / entry.file)
                kind = FindingKind.ALTERED if is_there else FindingKind.MISSING
                self._note(kind, str(exc), position=entry.positions[0][0] if entry.positions else None)
                continue
            self.files += 1
            if entry.kind == "events":
                yield from self._rows_of(entry, named and named[1])

    def remarks(self) -> Iterator[str]:
        """Yield what a killed run has left, or somebody has put beside the files."""
        folder = self.manifest.folder
        if self.manifest.is_torn:
            yield "The last line of the manifest was not finished: the next prune removes it."
        # As other readers look for files: in whatever folder.
        found = {*files_of(folder), *folder.glob("*/*.parquet"), *folder.rglob("*.parquet")}
        found -= {folder / file for file in self.manifest.entries}
        if unlisted := sorted(str(path.relative_to(folder)) for path in found):
            yield (
                f"Files that the manifest does not name: {len(unlisted):,}, such as {code_text(unlisted[0])}. No event "
                "in them counts, and other readers read them. What a killed run has left, the next prune removes."
            )

    def _rows_of(self, entry: Entry, day: str | None) -> Iterator[list[CheckedRow]]:
        try:
            yield from self._fitting_rows_of(entry, day)
        except ArchiveError as exc:
            self._note(FindingKind.ALTERED, str(exc))
        except Exception as exc:
            # A file can be made to hold what is not an archive of events: every error means the same.
            self._note(FindingKind.ALTERED, f"{entry.file} holds no events: {describe(exc)}.")

    def _fitting_rows_of(self, entry: Entry, day: str | None) -> Iterator[list[CheckedRow]]:
        import pyarrow.compute as pc

        footer = Footer(self.manifest.folder / entry.file)
        if not footer.rows == entry.count == sum(last - first + 1 for first, last in entry.positions):
            self._note(FindingKind.MISSING, f"{entry.file} does not hold the positions that the manifest names.")
            return
        positions: list[int] = []
        lies: set[str] = set()
        others = altered = 0
        for batch in footer.read(lies):
            fitting = []
            if day is not None:
                days = pc.strftime(batch.column("timestamp"), format=DAY)
                others += pc.sum(pc.not_equal(days, day)).as_py() or 0
            for row in rows_of(batch):
                positions.append(row[-3])
                if (found := checked_row(row)) is None:
                    altered += 1
                    if altered <= _MOST_FINDINGS:
                        text = said_of_unhashed(*row[-2:]) or (
                            "The archived event, or its leaf, is not what was sealed."
                        )
                        self._note(FindingKind.ALTERED, text, position=row[-3], event_id=row[0], request_id=row[1])
                    continue
                fitting.append(found)
                self.events += found.left is None
                self.erased += found.left is not None
            yield fitting
        if altered > _MOST_FINDINGS:
            self._note(FindingKind.ALTERED, f"{entry.file} holds {altered:,} events that are not what was sealed.")
        if lies:
            names = ", ".join(sorted(lies))
            text = f"{entry.file} says of its columns what is not so ({names}): other readers leave rows out by it."
            self._note(FindingKind.ALTERED, text)
        if others:
            self._note(FindingKind.ALTERED, f"{entry.file} holds {others:,} events of another day.")
        if len(set(positions)) != len(positions):
            self._note(FindingKind.ALTERED, f"{entry.file} holds an event more than once.")
        if runs_of(positions) != entry.positions or len(positions) != entry.count:
            self._note(FindingKind.MISSING, f"{entry.file} does not hold the positions that the manifest names.")

    def _note(self, kind: FindingKind, text: str, **where: Any) -> None:
        self.findings.append(Finding(kind=kind, text=text, **where))


def checked_row(row: Sequence[Any]) -> CheckedRow | None:
    """Recompute the hashes of a row with `COLUMNS`; None if they are not those of its event."""
    *event, position, salt, leaf = row
    try:
        content = hash_of_stored(stored_form(event)[1:])
    except Exception:
        # A file can be made to hold what is not an event: every error means the same.
        content = ""
    # 0.1.0 wrote an empty text in place of no salt, from SQLite.
    if not salt and event[_CONTENT_HASH] is None:
        return CheckedRow(position, leaf, content)
    try:
        is_hashed = content and event[_CONTENT_HASH] == content and salt
        fits = is_hashed and leaf_hash(bytes.fromhex(salt), content).hex() == leaf
    except ValueError:
        # A file can be made to hold a salt of other characters.
        return None
    return CheckedRow(position, leaf) if fits else None


def archived_rows(folder: Path, entry: Entry, keep: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of one file, with `COLUMNS`, for which a condition of pyarrow holds."""
    for batch in _read(folder / entry.file, list(NAMES), keep):
        yield from rows_of(batch)


def rows_of(batch: pa.RecordBatch | pa.Table) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a batch, or of a table, as tuples."""
    return zip(*(column.to_pylist() for column in batch.columns), strict=True)


def stored_form(row: Sequence[Any]) -> list[Any]:
    """Return the columns of an event as the drivers give them."""
    values = list(row)
    # pyarrow's time zone is another object, which our own code would not take for UTC.
    values[_TIMESTAMP] = values[_TIMESTAMP].replace(tzinfo=UTC)
    return values


def _scanned(path: Path, columns: list[str], condition: Any) -> Iterator[pa.RecordBatch]:
    from pyarrow import dataset

    # Without partitions: an event has no column `day`, as the folder's name has. Threads would read ahead.
    try:
        open_regular(path).close()
        found = dataset.dataset(path, format="parquet", partitioning=None)
    except (OSError, ValueError) as exc:
        raise ArchiveError(f"{path} cannot be read: restore it from a backup.", file=path.name) from exc
    require_columns(path, found.schema)
    scanned = found.scanner(
        columns=columns, filter=condition, batch_size=BATCH_ROWS, batch_readahead=1, use_threads=False
    )
    for batch in scanned.to_batches():
        if batch.num_rows:
            yield batch


def _read(path: Path, columns: list[str], condition: Any) -> Iterator[pa.RecordBatch]:
    """Yield what `_scanned` does, and trust no statistics: each row is read, and only then the condition asked."""
    pa = arrow()
    for batch in Footer(path).read():
        found = pa.Table.from_batches([batch])
        yield from (found if condition is None else found.filter(condition)).select(columns).to_batches()


def _repeated(entries: Sequence[Entry]) -> set[str]:
    """Return the files that hold a position of another one: two runs wrote it, of which one was killed."""
    found: set[str] = set()
    end, end_file = -1, ""
    for first, last, file in sorted((run[0], run[1], entry.file) for entry in entries for run in entry.positions):
        if first <= end:
            found |= {file, end_file}
        if last > end:
            end, end_file = last, file
    return found


def _kept(batch: pa.RecordBatch, exact: Callable[[str], bool] | None, known: Positions | None) -> pa.RecordBatch:
    pa = arrow()
    if exact is not None:
        batch = batch.filter(pa.array([exact(labels) for labels in batch.column("risk_labels").to_pylist()]))
    if known is not None:
        batch = batch.filter(pa.array([each not in known for each in batch.column("position").to_pylist()], pa.bool_()))
    return batch


def _may_hold(entry: Entry, found: Criteria) -> bool:
    """False if the day of the file is outside of the filters: then it is not even opened."""
    day = entry.file[len("day=") :].partition("/")[0]
    since, until = found.values.get("p_since"), found.values.get("p_until")
    return (since is None or day >= since.date().isoformat()) and (until is None or day <= until.date().isoformat())


def _condition(found: Criteria, text: Any) -> tuple[Any, Callable[[str], bool] | None]:
    """Return the filters as a condition of pyarrow, and what risk labels are compared by exactly.

    The `text` of `found` is a pattern of SQL, so it comes once more as the caller gave it.
    """
    import pyarrow.compute as pc

    condition, exact = None, None
    for name, several in found.shape:
        value, column = found.values[f"p_{name}"], pc.field(name)
        match name:
            case "since":
                each = pc.field("timestamp") >= value
            case "until":
                each = pc.field("timestamp") < value
            case "min_risk_score":
                each = pc.field("risk_score") >= value
            case "risk_label":
                wanted = set(value) if several else {value}
                exact = lambda labels, wanted=wanted: not wanted.isdisjoint(json.loads(labels))  # noqa: E731
                continue
            case "text":
                given = searched_text(name, text)
                places = ("tool_name", "deterministic_rationale", "llm_explanation")
                found_in = [pc.match_substring(pc.field(place), given, ignore_case=True) for place in places]
                each = pc.or_kleene(pc.or_kleene(*found_in[:2]), found_in[2])
            case "approval_id":
                # Checked, they are hex digits alone; the files hold them with hyphens.
                each = column.isin([str(UUID(one)) for one in (value if several else [value])])
            case _:
                each = column.isin(list(map(str, value))) if several else column == str(value)
        condition = each if condition is None else condition & each
    return condition, exact
