"""Recompute the log from its events, and name what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, exists, func, select

from agent_gateway_store.audit.record import stored_hash
from agent_gateway_store.audit.selects import FIELDS, select_events, table, values_of
from agent_gateway_store.errors import InvalidEvidenceError
from agent_gateway_store.evidence.notes import ParsedNote, VerifierKey, parse_note
from agent_gateway_store.evidence.tree import HASH_BYTES, TILE_HEIGHT, TILE_WIDTH, Frontier, leaf_hash
from agent_gateway_store.models.evidence import (
    AuditCheckpoint,
    AuditLeaf,
    AuditTile,
    Checkpoint,
    Finding,
    FindingKind,
    Verification,
)
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.statements import Statement
from agent_gateway_store.storage.streaming import fetched, streamed

_leaves = AuditLeaf.__table__  # type: ignore[attr-defined]
_tiles = AuditTile.__table__  # type: ignore[attr-defined]
_checkpoints = AuditCheckpoint.__table__  # type: ignore[attr-defined]
# Chosen: whoever altered more has altered everything; the count says how much.
_MOST_FINDINGS = 1_000


def _log(dialect: str) -> Select[Any]:
    events = select_events(dialect, ())
    joined = _leaves.outerjoin(table, table.c.id == _leaves.c.event_id)
    leaf = (_leaves.c.position, _leaves.c.event_id, _leaves.c.salt, _leaves.c.leaf_hash)
    return events.add_columns(*leaf).select_from(joined).order_by(_leaves.c.position)


_LOG = Statement(_log)
_UNSEALED = Statement(
    select(func.count().label("events")).where(~exists().where(_leaves.c.event_id == table.c.id)).select_from(table)
)
_STORED_TILES = Statement(
    select(_tiles.c.level, _tiles.c.index, _tiles.c.hashes).order_by(_tiles.c.level, _tiles.c.index)
)
_STORED_CHECKPOINTS = Statement(
    select(_checkpoints.c.size, _checkpoints.c.root_hash, _checkpoints.c.origin, _checkpoints.c.note).order_by(
        _checkpoints.c.size
    )
)


@dataclass(frozen=True)
class _Expected:
    """A root that the tree must have had at one size.

    Attributes:
        is_kept: It was kept elsewhere; False: it stands in the database.
    """

    size: int
    root: bytes
    origin: str
    is_kept: bool


@dataclass
class _Mismatch:
    position: int
    event_id: int
    request_id: str | None
    salt: bytes | None
    leaf: bytes
    content: str


class _Levels:
    """The nodes above the leaves, recomputed as they become complete, and compared with the tiles that are stored."""

    def __init__(self, stored: Mapping[tuple[int, int], bytes], note: Callable[..., None]) -> None:
        self._stored, self._note = stored, note
        self._open: list[tuple[int, Frontier]] = []
        self._made: dict[int, int] = {}

    def add(self, node: bytes, level: int = 0) -> None:
        """Add the next node of a level, and what it completes above."""
        if len(self._open) == level:
            self._open.append((0, Frontier()))
        count, frontier = self._open[level]
        if level:
            self._compare(level, count, node)
        frontier.append(node)
        if frontier.size == TILE_WIDTH:
            root, frontier = frontier.root(), Frontier()
            self._open[level] = (count + 1, frontier)
            self.add(root, level + 1)
        else:
            self._open[level] = (count + 1, frontier)
        self._made[level] = count + 1

    def _compare(self, level: int, count: int, node: bytes) -> None:
        tile, place = divmod(count, TILE_WIDTH)
        stored = self._stored.get((level, tile), b"")[place * HASH_BYTES : (place + 1) * HASH_BYTES]
        if stored != node:
            self._note(
                FindingKind.BAD_TREE,
                f"Hash {count:,} of level {level} is not that of the leaves below it.",
                position=count << TILE_HEIGHT * level,
            )

    def require_no_more(self) -> None:
        """Note tiles that hold more nodes than the leaves give."""
        for (level, tile), hashes in self._stored.items():
            count = tile * TILE_WIDTH + len(hashes) // HASH_BYTES
            if level < 1 or count > self._made.get(level, 0) or len(hashes) % HASH_BYTES:
                self._note(
                    FindingKind.BAD_TREE,
                    f"Tile {tile:,} of level {level} holds hashes of leaves that are not there.",
                    position=tile << TILE_HEIGHT * (level + 1) if level >= 1 else None,
                )


class _Walk:
    """The leaves from the first to the last, and what was found on the way.

    Args:
        expected: Roots that the tree must have had, by size.
        tiles: Those that are stored.
    """

    def __init__(self, expected: dict[int, list[_Expected]], tiles: Mapping[tuple[int, int], bytes]) -> None:
        self.expected = expected
        self.tree, self.levels = Frontier(), _Levels(tiles, self.note)
        self.next_position = self.checked = self.anchored = 0
        self.findings: list[Finding] = []
        self.mismatches: list[_Mismatch] = []

    def append(self, leaf: bytes) -> None:
        """Add a leaf to the tree, and compare the roots that it must have had at this size."""
        self.tree.append(leaf)
        self.levels.add(leaf)
        self._check_roots()

    def note(self, kind: FindingKind, text: str, **where: Any) -> None:
        if len(self.findings) < _MOST_FINDINGS:
            self.findings.append(Finding(kind=kind, text=text, **where))

    def take(self, row: Sequence[Any]) -> None:
        """Check one leaf and its event, and add it to the tree."""
        position, event_id, salt, leaf = row[-4:]
        self._require_place(position, event_id)
        if row[FIELDS.index("id")] is None:
            self.note(
                FindingKind.MISSING,
                "The event is gone, and no sealed event says that it was pruned.",
                position=position,
                event_id=event_id,
            )
        else:
            self._check(row, position, event_id, salt, leaf)
        self.append(leaf if len(leaf) == HASH_BYTES else bytes(HASH_BYTES))

    def _require_place(self, position: int, event_id: int) -> None:
        if position != self.next_position:
            self.note(
                FindingKind.MISSING,
                f"The leaf at {self.next_position:,} is gone: the next one stands at {position:,}.",
                position=self.next_position,
            )
        # So that what follows is compared with the right hashes; where very much is gone, nothing would fit anyway.
        for _ in range(min(max(position - self.tree.size, 0), _MOST_FINDINGS)):
            self.append(bytes(HASH_BYTES))
        self.next_position = position + 1

    def _check(self, row: Sequence[Any], position: int, event_id: int, salt: bytes | None, leaf: bytes) -> None:
        stored: str | None = None
        try:
            values = values_of(row[: len(FIELDS)])
            stored, written = values["request_id"], values["content_hash"]
            content = stored_hash(values)
            fits = salt is not None and leaf_hash(salt, content) == leaf and written == content
        except Exception:
            # What a database can be made to hold and is no event: every error means the same.
            content, fits = "", False
        if fits:
            self.checked += 1
        else:
            self.mismatches.append(_Mismatch(position, event_id, stored, salt, leaf, content))

    def _check_roots(self) -> None:
        for expected in self.expected.pop(self.tree.size, ()):
            if self.tree.root() != expected.root:
                kept = "that was kept elsewhere" if expected.is_kept else "in the database"
                self.note(
                    FindingKind.FORKED,
                    f"The first {expected.size:,} events are not those of the checkpoint {kept}.",
                    position=expected.size - 1 if expected.size else None,
                )
            elif expected.is_kept:
                self.anchored = max(self.anchored, expected.size)

    def name_mismatches(self) -> None:
        """Say of each event that does not fit its leaf whether it belongs to another one, or was altered."""
        known = self.mismatches[:_MOST_FINDINGS]
        for found in known:
            owner = next((each for each in known if each is not found and _fits(found.content, each)), None)
            kind, text = FindingKind.ALTERED, "The event, or its leaf, is not what was sealed."
            if owner is not None:
                kind, text = FindingKind.MOVED, f"The event was sealed at {owner.position:,}."
            self.note(kind, text, position=found.position, event_id=found.event_id, request_id=found.request_id)


def _fits(content: str, place: _Mismatch) -> bool:
    return bool(content) and place.salt is not None and leaf_hash(place.salt, content) == place.leaf


async def verify(
    database: Database,
    *,
    against: Iterable[str | Checkpoint] = (),
    keys: Iterable[str] = (),
    report: Callable[[int], None] = lambda _rows: None,
) -> Verification:
    """Recompute every hash from the columns of the events; arguments and result as for `EvidenceManager.verify`."""
    verifiers = [VerifierKey.parse(key) for key in keys]
    kept = [_kept(each) for each in against]
    dialect = database.engine.dialect
    stored = await fetched(database, _STORED_CHECKPOINTS.compiled(dialect), {})
    expected: dict[int, list[_Expected]] = {}
    walk = _Walk(expected, await _stored_tiles(database))
    largest = 0
    for size, root_hash, origin, note in stored:
        largest = max(largest, size)
        _check_note(walk, size, root_hash, origin, note)
        root = bytes.fromhex(root_hash) if _is_hash(root_hash) else b""
        expected.setdefault(size, []).append(_Expected(size, root, origin, False))
    origin = stored[-1][2] if stored else None
    for note in kept:
        _check_kept(walk, note, origin, verifiers)
        expected.setdefault(note.size, []).append(_Expected(note.size, note.root, note.origin, True))
        largest = max(largest, note.size)
    if verifiers and not kept:
        _require_signature(walk, stored, verifiers)
    async with aclosing(streamed(database, _LOG.compiled(dialect), {})) as batches:
        async for rows in batches:
            for row in rows:
                walk.take(row)
            report(walk.tree.size)
    walk.levels.require_no_more()
    walk.name_mismatches()
    if largest > walk.tree.size:
        walk.note(
            FindingKind.TRUNCATED,
            f"There was a checkpoint over {largest:,} events, and {walk.tree.size:,} are left.",
            position=walk.tree.size,
        )
    ((unsealed,),) = await fetched(database, _UNSEALED.compiled(dialect), {})
    return Verification(
        ok=not walk.findings,
        size=walk.tree.size,
        root_hash=walk.tree.root().hex(),
        checked=walk.checked,
        unsealed=unsealed,
        anchored=walk.anchored,
        findings=tuple(walk.findings),
    )


async def _stored_tiles(database: Database) -> dict[tuple[int, int], bytes]:
    # 32 bytes for 256 events: of a hundred million, 12 MB.
    rows = await fetched(database, _STORED_TILES.compiled(database.engine.dialect), {})
    return {(level, index): hashes for level, index, hashes in rows}


def _kept(given: str | Checkpoint) -> ParsedNote:
    return parse_note(given.note if isinstance(given, Checkpoint) else given)


def _is_hash(text: str) -> bool:
    try:
        return len(bytes.fromhex(text)) == HASH_BYTES
    except (TypeError, ValueError):
        return False


def _check_note(walk: _Walk, size: int, root_hash: str, origin: str, text: str) -> None:
    try:
        note = parse_note(text)
        fits = (note.origin, note.size, note.root.hex()) == (origin, size, root_hash)
    except InvalidEvidenceError:
        fits = False
    if not fits:
        walk.note(
            FindingKind.BAD_SIGNATURE,
            f"The checkpoint over {size:,} events and its note differ.",
        )


def _check_kept(walk: _Walk, note: ParsedNote, origin: str | None, verifiers: Sequence[VerifierKey]) -> None:
    if verifiers and not note.signed_by(verifiers):
        walk.note(FindingKind.BAD_SIGNATURE, f"No key has signed the kept checkpoint over {note.size:,} events.")
    if origin is not None and note.origin.rpartition("/")[0] != origin.rpartition("/")[0]:
        walk.note(FindingKind.FORKED, f"The kept checkpoint is of another log, {note.origin}.")


def _require_signature(walk: _Walk, stored: Sequence[Sequence[Any]], verifiers: Sequence[VerifierKey]) -> None:
    try:
        is_signed = bool(stored) and parse_note(stored[-1][3]).signed_by(verifiers)
    except InvalidEvidenceError:
        is_signed = False
    if not is_signed:
        walk.note(FindingKind.BAD_SIGNATURE, "No key has signed the last checkpoint.")
