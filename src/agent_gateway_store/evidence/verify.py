"""Recompute the log from its events, and name what does not fit."""

from __future__ import annotations

import asyncio
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Select, bindparam, exists, func, or_, select

from agent_gateway_store.audit.document import COLUMNS, hash_of_stored
from agent_gateway_store.audit.doors import ERASE, PRUNE, is_door
from agent_gateway_store.audit.selects import FIELDS, select_events, table
from agent_gateway_store.errors import InvalidEvidenceError
from agent_gateway_store.evidence.archived import Archived, read_archives
from agent_gateway_store.evidence.notes import ParsedNote, VerifierKey, parse_note
from agent_gateway_store.evidence.tree import HASH_BYTES, TILE_HEIGHT, TILE_WIDTH, GrowingTree, leaf_hash
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
from agent_gateway_store.storage.streaming import Snapshot, snapshot

_leaves = AuditLeaf.__table__  # type: ignore[attr-defined]
_tiles = AuditTile.__table__  # type: ignore[attr-defined]
_checkpoints = AuditCheckpoint.__table__  # type: ignore[attr-defined]
# Of one kind. Chosen: whoever altered more has altered everything.
_MOST_FINDINGS = 1_000
# Positions that are read at a time; with events of 5 kB 10 MB.
_PAGE = 2_000
# Of tiles, where positions are numbers of 64 bits.
_LEVELS = 64 // TILE_HEIGHT
# Chosen: seconds that others wait for a turn of the event loop.
_TURN_S = 0.002


def _events_with_leaves(dialect: str) -> Select[Any]:
    leaf = (_leaves.c.position, _leaves.c.event_id, _leaves.c.salt, _leaves.c.leaf_hash)
    return select_events(dialect, (), has_zones=False).add_columns(*leaf)


def _log(dialect: str) -> Select[Any]:
    joined = _leaves.outerjoin(table, table.c.id == _leaves.c.event_id)
    page = _leaves.c.position >= _FROM, _leaves.c.position < _UNTIL
    return _events_with_leaves(dialect).select_from(joined).where(*page).order_by(_leaves.c.position)


def _doors(dialect: str) -> Select[Any]:
    joined = table.join(_leaves, table.c.id == _leaves.c.event_id)
    return _events_with_leaves(dialect).select_from(joined).where(is_door(PRUNE, ERASE), _leaves.c.position < _SIZE)


_SIZE, _FROM, _UNTIL = (bindparam(name, type_=BigInteger()) for name in ("p_size", "p_from", "p_until"))
_CHECKPOINT = (_checkpoints.c.size, _checkpoints.c.root_hash, _checkpoints.c.origin, _checkpoints.c.note)
_LOG, _DOORS = Statement(_log), Statement(_doors)
_NEXT = Statement(
    select(func.min(_leaves.c.position).label("position")).where(
        _leaves.c.position >= _FROM, _leaves.c.position < _SIZE
    )
)
_UNSEALED = Statement(
    select(func.count().label("events")).where(~exists().where(_leaves.c.event_id == table.c.id)).select_from(table)
)
_BEYOND = Statement(
    select(func.count().label("leaves")).where(
        or_(_leaves.c.position < 0, _leaves.c.position >= _SIZE, _leaves.c.position.is_(None))
    )
)


_STORED_TILES = Statement(select(_tiles.c.level, _tiles.c.index, _tiles.c.hashes))
_LAST = Statement(select(*_CHECKPOINT).order_by(_checkpoints.c.size.desc()).limit(1))
_BETWEEN = Statement(
    select(*_CHECKPOINT)
    .where(_checkpoints.c.size > bindparam("p_after", type_=BigInteger()), _checkpoints.c.size <= _SIZE)
    .order_by(_checkpoints.c.size)
)


class _Root(NamedTuple):
    """What the root must be at one size; `is_kept`: a checkpoint says so that was kept elsewhere, and may vouch."""

    size: int
    root: bytes
    is_kept: bool
    vouches: bool = False


class _Mismatch(NamedTuple):
    position: int
    event_id: int
    request_id: str | None
    salt: bytes | None
    leaf: bytes
    content: str


@dataclass
class _Doors:
    """What sealed events say that doors did.

    Attributes:
        runs: First and last position of each run of pruned events, with the position of the event that says so.
        erased: Hashes of the blanked event, by its position.
        archived: The runs of events that went to an archive.
    """

    runs: list[tuple[int, int, int]] = field(default_factory=list)
    erased: dict[int, set[str]] = field(default_factory=dict)
    archived: list[list[int]] = field(default_factory=list)

    def add(self, tool: str, said: Mapping[str, Any], position: int) -> None:
        """Take the word of an event at `position`, as far as it is about events before it."""
        if tool == ERASE:
            if type(said.get("position")) is int and said["position"] < position:
                self.erased.setdefault(said["position"], set()).add(str(said.get("row_sha256")))
            return
        pairs = said.get("positions")
        for pair in pairs if isinstance(pairs, list) else ():
            if isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair):
                self.runs.append((pair[0], min(pair[1], position - 1), position))
                if said.get("archived") is True:
                    self.archived.append([pair[0], pair[1]])

    def close(self) -> None:
        """Sort and join the runs, so that one position is found among any number of them."""
        joined: list[tuple[int, int, int]] = []
        for first, last, position in sorted(self.runs):
            if joined and first <= joined[-1][1] + 1:
                first, before, _ = joined.pop()
                last = max(before, last)
            joined.append((first, last, position))
        self.runs = joined

    def pruned(self, position: int) -> bool:
        """True if a sealed prune names this position."""
        place = bisect_right(self.runs, (position, float("inf"))) - 1
        return place >= 0 and self.runs[place][0] <= position <= self.runs[place][1]


class _Walk:
    """The leaves from the first to the last, and what was found on the way.

    Args:
        size: Of the last checkpoint.
        doors: What may be missing or blanked.
    """

    def __init__(self, size: int, doors: _Doors) -> None:
        self.size, self.doors = size, doors
        self.tiles: dict[tuple[int, int], bytes] = {}
        self.kept: dict[int, list[_Root]] = {}
        self.tree = GrowingTree(self._compare)
        self.next_position = self.checked = self.anchored = self.pruned = self.archived = self.erased = 0
        self.archive = Archived()
        self.findings: list[Finding] = []
        self._found: Counter[FindingKind] = Counter()
        self._mismatches: list[_Mismatch] = []

    def note(
        self, kind: FindingKind, text: str, *, position: Any = None, event_id: Any = None, request_id: Any = None
    ) -> None:
        """Add a finding; a place that is of no type of its column is left out."""
        self._found[kind] += 1
        if self._found[kind] <= _MOST_FINDINGS:
            ids = {"position": position, "event_id": event_id}
            where = {name: value for name, value in ids.items() if type(value) is int}
            # What is no UTF-8 is escaped.
            name = request_id.encode(errors="backslashreplace").decode() if type(request_id) is str else None
            self.findings.append(Finding(kind=kind, text=text, request_id=name, **where))

    async def take_all(self, rows: Sequence[Sequence[Any]], roots: Sequence[_Root]) -> None:
        """Check the next leaves and their events, and the roots that the tree must have on the way."""
        expected: dict[int, list[_Root]] = {}
        for each in roots:
            expected.setdefault(each.size, []).append(each)
        # Not in a thread, which would keep the event loop waiting for the interpreter each time that rows arrive.
        turn_ends = perf_counter() + _TURN_S
        for row in rows:
            if perf_counter() > turn_ends:
                await asyncio.sleep(0)
                turn_ends = perf_counter() + _TURN_S
            position, event_id, salt, leaf = row[-4:]
            if type(position) is not int:
                self.note(FindingKind.BAD_TREE, "A leaf stands at no place.", event_id=event_id)
                continue
            if position != self.next_position:
                self._require_place(position)
            self.next_position = position + 1
            if type(leaf) is not bytes or len(leaf) != HASH_BYTES:
                # A database can be made to hold it; the hash of the tree says the rest.
                salt, leaf = None, bytes(HASH_BYTES)
            self._check(row, position, event_id, salt if type(salt) is bytes else None, leaf)
            self.tree.append(leaf)
            size = self.tree.size
            for root in (*expected.pop(size, ()), *self.kept.pop(size, ())):
                self.check_root(root)
        for roots_there in expected.values():
            # The leaves that would lead there are gone.
            for root in roots_there:
                self._forked(root)

    def _require_place(self, position: int) -> None:
        if position > self.next_position:
            text = f"The leaf at {self.next_position:,} is gone: the next one stands at {position:,}."
            self.note(FindingKind.MISSING, text, position=self.next_position)
        else:
            self.note(FindingKind.BAD_TREE, f"There are two leaves at {position:,}.", position=position)
        # So that what follows is compared with the right hashes; where very much is gone, nothing would fit anyway.
        for _ in range(min(max(position - self.tree.size, 0), _MOST_FINDINGS)):
            self.tree.append(bytes(HASH_BYTES))

    def _check(self, row: Sequence[Any], position: int, event_id: int, salt: bytes | None, leaf: bytes) -> None:
        if row[_ID] is None:
            if self.doors.pruned(position):
                self.pruned += 1
                self._check_archived(position, event_id)
            else:
                text = "The event is gone, and no sealed event says that it was pruned."
                self.note(FindingKind.MISSING, text, position=position, event_id=event_id)
            return
        content, written = _hash(row), row[_CONTENT_HASH]
        if salt is not None and content and written == content and leaf_hash(salt, content) == leaf:
            self.checked += 1
        elif not (salt or written) and content in self.doors.erased.get(position, ()):
            self.erased += 1
        elif len(self._mismatches) < _MOST_FINDINGS:
            self._mismatches.append(_Mismatch(position, event_id, row[_REQUEST_ID], salt, leaf, content))

    def _check_archived(self, position: int, event_id: int) -> None:
        if position in self.archive.intact:
            self.archived += 1
        elif position in self.archive.erased:
            self.archived += 1
            self.erased += 1
        elif position in self.archive.expected and position not in self.archive.altered:
            text = "The event was pruned into an archive, and is not in the one that was looked at."
            self.note(FindingKind.MISSING, text, position=position, event_id=event_id)

    def _compare(self, level: int, count: int, node: bytes) -> None:
        tile, place = divmod(count, TILE_WIDTH)
        stored = self.tiles.get((level, tile), b"")[place * HASH_BYTES : (place + 1) * HASH_BYTES]
        if stored != node:
            text = f"Hash {count:,} of level {level} is not that of the leaves below it."
            self.note(FindingKind.BAD_TREE, text, position=count << TILE_HEIGHT * level)

    def check_root(self, expected: _Root) -> None:
        """Compare the root of the tree as it stands."""
        if self.tree.root() != expected.root:
            self._forked(expected)
        elif expected.vouches:
            self.anchored = max(self.anchored, expected.size)

    def _forked(self, expected: _Root) -> None:
        kept = "that was kept elsewhere" if expected.is_kept else "in the database"
        text = f"The first {expected.size:,} events are not those of the checkpoint {kept}."
        self.note(FindingKind.FORKED, text, position=expected.size - 1 if expected.size else None)

    def finish(self, beyond: int) -> None:
        """Say what only the end of the log shows."""
        for (level, tile), hashes in self.tiles.items():
            count, is_level = tile * TILE_WIDTH + len(hashes) // HASH_BYTES, 1 <= level < _LEVELS
            if not is_level or tile < 0 or count > self.tree.size >> TILE_HEIGHT * level or len(hashes) % HASH_BYTES:
                text = f"Tile {tile:,} of level {level} holds hashes of leaves that are not there."
                at = tile << TILE_HEIGHT * (level + 1) if is_level else None
                self.note(FindingKind.BAD_TREE, text, position=at)
        if beyond:
            self.note(FindingKind.BAD_TREE, f"There are {beyond:,} leaves outside of the last checkpoint.")
        if (largest := max((self.size, *self.kept))) > self.tree.size:
            text = f"There was a checkpoint over {largest:,} events, and {self.tree.size:,} are left."
            self.note(FindingKind.TRUNCATED, text, position=self.tree.size)
        for found in self._mismatches:
            owner = next((each for each in self._mismatches if each is not found and _fits(found.content, each)), None)
            kind, text = FindingKind.ALTERED, "The event, or its leaf, is not what was sealed."
            if owner is not None:
                kind, text = FindingKind.MOVED, f"The event was sealed at {owner.position:,}."
            self.note(kind, text, position=found.position, event_id=found.event_id, request_id=found.request_id)


_ID, _REQUEST_ID, _CONTENT_HASH = map(FIELDS.index, ("id", "request_id", "content_hash"))
# Behind the id.
_EVENT = slice(1, len(COLUMNS) + 1)


def _hash(row: Sequence[Any]) -> str:
    """Return the hash of an event, computed from its columns; "" if they hold none."""
    try:
        return hash_of_stored(row[_EVENT])
    except Exception:
        # What a database can be made to hold and is no event: every error means the same.
        return ""


def _fits(content: str, place: _Mismatch) -> bool:
    return bool(content) and place.salt is not None and leaf_hash(place.salt, content) == place.leaf


async def verify(
    database: Database,
    *,
    against: Iterable[str | Checkpoint] = (),
    keys: Iterable[str] = (),
    archives: Iterable[Path] = (),
    report: Callable[[int], None] = lambda _rows: None,
) -> Verification:
    """Recompute every hash from the columns of the events; arguments and result as for `EvidenceManager.verify`."""
    verifiers = [VerifierKey.parse(key) for key in keys]
    kept = [parse_note(each.note if isinstance(each, Checkpoint) else each) for each in against]
    async with snapshot(database) as reader:
        last = next(iter(await reader.fetched(_LAST)), None)
        size = last[0] if last and type(last[0]) is int else 0
        doors = await _read_doors(reader, size)
        walk = _Walk(size, doors)
        await _take_tiles(reader, walk)
        walk.archive = await read_archives(reader, archives, doors.archived, doors.erased, walk.note)
        # In a thread: a year of checkpoints, one a minute, takes a minute to verify.
        await asyncio.to_thread(_take_kept, walk, kept, verifiers)
        _check_last(walk, last, verifiers)
        await _walk_log(reader, walk, verifiers, report)
        ((beyond,),) = await reader.fetched(_BEYOND, {"p_size": walk.size})
        ((unsealed,),) = await reader.fetched(_UNSEALED)
    walk.finish(beyond)
    return Verification(
        ok=not walk.findings,
        size=walk.tree.size,
        root_hash=walk.tree.root().hex(),
        checked=walk.checked,
        unsealed=unsealed,
        erased=walk.erased,
        pruned=walk.pruned,
        archived=walk.archived,
        anchored=walk.anchored,
        findings=tuple(walk.findings),
    )


async def _walk_log(
    reader: Snapshot, walk: _Walk, verifiers: Sequence[VerifierKey], report: Callable[[int], None]
) -> None:
    """Check the log, each page while the server reads the next one."""
    checking: asyncio.Task[None] | None = None
    # Before every number that a row can hold.
    after = -(2**63)
    try:
        async with aclosing(_pages(reader, walk.size)) as pages:
            async for rows in pages:
                until = rows[-1][-4] + 1
                found = await reader.fetched(_BETWEEN, {"p_after": after, "p_size": until})
                if checking is not None:
                    await checking
                    report(walk.tree.size)
                for checkpoint in found:
                    _check_note(walk, checkpoint, verifiers)
                roots = [_Root(size, _bytes(root_hash), False) for size, root_hash, *_ in found]
                checking = asyncio.create_task(walk.take_all(rows, roots))
                after = until
        if checking is not None:
            await checking
            report(walk.tree.size)
    finally:
        if checking is not None:
            checking.cancel()
            await asyncio.wait([checking])


async def _pages(reader: Snapshot, size: int) -> AsyncGenerator[Sequence[Sequence[Any]], None]:
    """Yield the leaves and their events. By positions: a cursor over all would sort them all where statistics lack."""
    start = 0
    while start < size:
        until = min(start + _PAGE, size)
        if rows := await reader.fetched(_LOG, {"p_from": start, "p_until": until}):
            yield rows
            start = until
        else:
            ((found,),) = await reader.fetched(_NEXT, {"p_from": until, "p_size": size})
            start = size if found is None else found


async def _take_tiles(reader: Snapshot, walk: _Walk) -> None:
    # 32 bytes for 256 events: of a hundred million, 12 MB.
    for level, index, hashes in await reader.fetched(_STORED_TILES):
        if (level, index) in walk.tiles:
            walk.note(FindingKind.BAD_TREE, f"There are two tiles {index:,} of level {level}.")
        elif (type(level), type(index), type(hashes)) != (int, int, bytes):
            walk.note(FindingKind.BAD_TREE, "A tile holds no hashes, or stands at no place.")
        else:
            walk.tiles[level, index] = hashes


async def _read_doors(reader: Snapshot, size: int) -> _Doors:
    """Return what the doors did, as far as the events that say so fit their leaves."""
    doors = _Doors()
    for row in await reader.fetched(_DOORS, {"p_size": size}):
        position, _, salt, leaf = row[-4:]
        content = _hash(row)
        if salt is not None and content and row[_CONTENT_HASH] == content and leaf_hash(salt, content) == leaf:
            said = json.loads(row[FIELDS.index("sanitized_args")])
            doors.add(row[FIELDS.index("tool_name")], said if isinstance(said, dict) else {}, position)
    doors.close()
    return doors


def _bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError):
        return b""


def _check_note(walk: _Walk, checkpoint: Sequence[Any], verifiers: Sequence[VerifierKey]) -> None:
    size, root_hash, origin, text = checkpoint
    try:
        note = _note(text)
        fits = (note.origin, note.size, note.root.hex()) == (origin, size, root_hash)
    except InvalidEvidenceError:
        fits = False
    else:
        # An earlier one may be signed by a key of its time, or by none; what names one of these keys must be by it.
        if verifiers and note.signed_by(verifiers) is False:
            walk.note(FindingKind.BAD_SIGNATURE, f"The signature of the checkpoint over {size:,} events is forged.")
    if not fits:
        walk.note(FindingKind.BAD_SIGNATURE, f"The checkpoint over {size:,} events and its note differ.")


def _note(text: Any) -> ParsedNote:
    # A database can be made to hold something else.
    return parse_note(text if isinstance(text, str) else "")


def _vouching(note: ParsedNote, verifiers: Sequence[VerifierKey]) -> bool:
    """True for a kept checkpoint where no key is given, since it vouches by where it was kept, or a key has signed."""
    return not verifiers or bool(note.signed_by(verifiers))


def _take_kept(walk: _Walk, kept: Sequence[ParsedNote], verifiers: Sequence[VerifierKey]) -> None:
    for note in kept:
        vouches = _vouching(note, verifiers)
        walk.kept.setdefault(note.size, []).append(_Root(note.size, note.root, True, vouches))
        if not vouches:
            text = f"No key that was named has signed the kept checkpoint over {note.size:,} events."
            walk.note(FindingKind.BAD_SIGNATURE, text)
    for empty in walk.kept.pop(0, ()):
        walk.check_root(empty)


def _check_last(walk: _Walk, last: Sequence[Any] | None, verifiers: Sequence[VerifierKey]) -> None:
    try:
        is_signed = last is None or _vouching(_note(last[3]), verifiers)
    except InvalidEvidenceError:
        # It is a finding of its own.
        is_signed = not verifiers
    if last is not None and type(last[0]) is not int:
        walk.note(FindingKind.BAD_SIGNATURE, "The last checkpoint is over no number of events.")
    if not is_signed:
        walk.note(FindingKind.BAD_SIGNATURE, "No key that was named has signed the last checkpoint.")
