"""The walk over the leaves of the log: each event, each hash of the tree and each root is compared."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

from agent_gateway_store.archive.files import said_of_unhashed
from agent_gateway_store.archive.manifest import Positions
from agent_gateway_store.audit.document import COLUMNS, hash_of_stored
from agent_gateway_store.audit.doors import ERASE
from agent_gateway_store.evidence.archived import Archived
from agent_gateway_store.evidence.tree import HASH_BYTES, TILE_HEIGHT, TILE_WIDTH, GrowingTree
from agent_gateway_store.models.evidence import Finding, FindingKind, leaf_hash

MOST_FINDINGS = 1_000
"""Of one kind. Chosen: where more was altered, everything may be."""

# Of tiles, where positions are numbers of 64 bits.
_LEVELS = 64 // TILE_HEIGHT
# Bits of a block: dense ids take 2.3 bits each, and one that is far from all others 300 bytes at most.
_BLOCK = 1024
# Chosen: seconds that others wait for a turn of the event loop.
_TURN_S = 0.002


class Root(NamedTuple):
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
class Doors:
    """What sealed events say that doors did.

    Attributes:
        runs: First and last position of each run of pruned events.
        erased: Hashes of the blanked event, by its position.
        archived: The runs of events that went to an archive.
    """

    runs: list[list[int]] = field(default_factory=list)
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
                self.runs.append([pair[0], min(pair[1], position - 1)])
                if said.get("archived") is True:
                    self.archived.append([pair[0], pair[1]])


class LogWalk:
    """The leaves from the first to the last, and what was found on the way.

    Args:
        size: Of the last checkpoint.
        doors: What may be missing or blanked.
        is_jsonb: The JSON of the events is that of PostgreSQL.
    """

    def __init__(self, size: int, doors: Doors, *, is_jsonb: bool) -> None:
        self.size, self.doors, self._is_jsonb = size, doors, is_jsonb
        self._gone = Positions(doors.runs)
        self.tiles: dict[tuple[int, int], bytes] = {}
        self.kept: dict[int, list[Root]] = {}
        self.tree = GrowingTree(self._compare)
        self.next_position = self.present = self.checked = self.anchored = self.pruned = self.archived = self.erased = 0
        self.archive = Archived()
        self.findings: list[Finding] = []
        self.remarks: list[str] = []
        self.origin = ""
        # A bit for each event, by its id: those of a hundred million are twice as large as the tiles above them.
        self._named: dict[int, int] = {}
        self._zeros_left = MOST_FINDINGS
        self._found: Counter[FindingKind] = Counter()
        self._mismatches: list[_Mismatch] = []

    def note(
        self, kind: FindingKind, text: str, *, position: Any = None, event_id: Any = None, request_id: Any = None
    ) -> None:
        """Add a finding; a place that is of no type of its column is left out."""
        self._found[kind] += 1
        if self._found[kind] <= MOST_FINDINGS:
            ids = {"position": position, "event_id": event_id}
            where = {name: value for name, value in ids.items() if type(value) is int}
            # What is not UTF-8 is escaped.
            name = request_id.encode(errors="backslashreplace").decode() if type(request_id) is str else None
            self.findings.append(Finding(kind=kind, text=text, request_id=name, **where))

    async def take_all(self, rows: Sequence[Sequence[Any]], roots: Sequence[Root]) -> None:
        """Check the next leaves and their events, and the roots that the tree must have on the way."""
        expected: dict[int, list[Root]] = {}
        for each in roots:
            expected.setdefault(each.size, []).append(each)
        # Not in a thread, which would keep the event loop waiting for the interpreter each time that rows arrive.
        turn_ends = perf_counter() + _TURN_S
        for row in rows:
            if perf_counter() > turn_ends:
                await asyncio.sleep(0)
                turn_ends = perf_counter() + _TURN_S
            row_id, *event, position, event_id, salt, leaf = row
            if type(position) is not int:
                self.note(FindingKind.BAD_TREE, "A leaf stands at no place.", event_id=event_id)
                continue
            if position != self.next_position:
                self._require_place(position)
            self.next_position = position + 1
            if type(leaf) is not bytes or len(leaf) != HASH_BYTES:
                # A database can be made to hold it; the hash of the tree says the rest.
                salt, leaf = None, bytes(HASH_BYTES)
            self._check(row_id, event, position, event_id, salt if type(salt) is bytes else None, leaf)
            self.tree.append(leaf)
            size = self.tree.size
            if size in expected or size in self.kept:
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
        zeros = min(max(position - self.tree.size, 0), self._zeros_left)
        self._zeros_left -= zeros
        for _ in range(zeros):
            self.tree.append(bytes(HASH_BYTES))

    def _check(
        self, row_id: Any, event: Sequence[Any], position: int, event_id: int, salt: bytes | None, leaf: bytes
    ) -> None:
        if row_id is None:
            if position in self._gone:
                self.pruned += 1
                self._check_archived(position, event_id)
            else:
                text = "The event is gone, and no sealed event says that it was pruned."
                self.note(FindingKind.MISSING, text, position=position, event_id=event_id)
            return
        if not self._is_first(row_id):
            text = (
                "An earlier leaf names this event, or its id is not a number: what was sealed here is gone or changed."
            )
            self.note(FindingKind.ALTERED, text, position=position, event_id=event_id, request_id=event[_REQUEST_ID])
            return
        self.present += 1
        content, written = computed_hash(event, is_jsonb=self._is_jsonb), event[-1]
        if salt is not None and content and written == content and leaf_hash(salt, content) == leaf:
            self.checked += 1
        elif not (salt or written) and content in self.doors.erased.get(position, ()):
            self.erased += 1
        elif len(self._mismatches) < MOST_FINDINGS:
            self._mismatches.append(_Mismatch(position, event_id, event[_REQUEST_ID], salt, leaf, content))

    def _is_first(self, event_id: Any) -> bool:
        """True for an id that no leaf has named before: else an event without one would count as sealed."""
        if type(event_id) is not int:
            return False
        block, bit = event_id // _BLOCK, 1 << event_id % _BLOCK
        named = self._named.get(block, 0)
        self._named[block] = named | bit
        return not named & bit

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

    def check_root(self, expected: Root) -> None:
        """Compare the root of the tree as it stands."""
        if self.tree.root() != expected.root:
            self._forked(expected)
        elif expected.vouches:
            self.anchored = max(self.anchored, expected.size)

    def _forked(self, expected: Root) -> None:
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
            kind, unhashed = FindingKind.ALTERED, said_of_unhashed((found.salt or b"").hex(), found.leaf.hex())
            text = unhashed or "The event, or its leaf, is not what was sealed."
            if owner is not None:
                kind, text = FindingKind.MOVED, f"The event was sealed at {owner.position:,}."
            self.note(kind, text, position=found.position, event_id=found.event_id, request_id=found.request_id)


_REQUEST_ID = COLUMNS.index("request_id")


def computed_hash(event: Sequence[Any], *, is_jsonb: bool) -> str:
    """Return the hash of an event, computed from its columns in the order of `COLUMNS`; "" if they hold none."""
    try:
        return hash_of_stored(event, is_jsonb=is_jsonb)
    except Exception:
        # A database can be made to hold what is not an event: every error means the same.
        return ""


def _fits(content: str, place: _Mismatch) -> bool:
    return bool(content) and place.salt is not None and leaf_hash(place.salt, content) == place.leaf
