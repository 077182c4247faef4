"""A sealed log in memory, made by the definitions of the formats, for tests of what is proved from one."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Any

from agent_gateway_store import AuditEvent
from agent_gateway_store.audit.record import encode_event, to_values
from agent_gateway_store.clock import utc_now
from agent_gateway_store.evidence import Evidence
from agent_gateway_store.evidence.notes import SigningKey, checkpoint_note
from agent_gateway_store.evidence.tree import (
    TileHashes,
    inclusion_path,
    node_hash,
    root_from,
)
from agent_gateway_store.models.evidence import Checkpoint, leaf_hash
from builders import make_event
from consistency import consistency_path

ORIGIN = "log.example/4f0c"
KEY = SigningKey("log.example", bytes(32))


def stored(event: AuditEvent) -> AuditEvent:
    """The event as a database gives it back."""
    return AuditEvent(**to_values(encode_event(event)))


class SealedLog:
    """Leaves, and the proofs about them.

    Args:
        events: In the order of their positions.
        leaves: How many more leaves of unknown events follow.
    """

    def __init__(self, events: Iterable[AuditEvent] = (), *, leaves: int = 0, key: SigningKey | None = KEY) -> None:
        self.events = [stored(event) for event in events]
        self.salts = [sha256(f"salt {at}".encode()).digest()[:16] for at in range(len(self.events))]
        self.leaves = [
            leaf_hash(salt, event.content_hash or "") for salt, event in zip(self.salts, self.events, strict=True)
        ]
        self.leaves += [sha256(f"leaf {at}".encode()).digest() for at in range(leaves)]
        self.key = key

    @property
    def tiles(self) -> dict[tuple[int, int], bytes]:
        """Every tile, partial ones too."""
        tiles, level, row = {}, 0, self.leaves
        while row:
            for at in range(0, len(row), 256):
                tiles[level, at // 256] = b"".join(row[at : at + 256])
            row = [over(row[at : at + 256]) for at in range(0, len(row) - 255, 256)]
            level += 1
        return tiles

    def checkpoint(self, size: int | None = None) -> Checkpoint:
        """Return the checkpoint at one size."""
        size = len(self.leaves) if size is None else size
        root = root_from(TileHashes(self.tiles), size)
        note = checkpoint_note(ORIGIN, size, root, self.key)
        return Checkpoint(origin=ORIGIN, size=size, root_hash=root.hex(), note=note, created_at=utc_now())

    def consistency(self, old: int, new: int) -> list[bytes]:
        """Return the proof that the log of `new` leaves begins with that of `old`."""
        return consistency_path(TileHashes(self.tiles), old, new)

    def evidence(self, position: int, /, **fields: Any) -> Evidence:
        """Return the evidence of one event."""
        proof = {
            "event": self.events[position],
            "position": position,
            "salt": self.salts[position],
            "leaf_hash": self.leaves[position],
            "path": tuple(inclusion_path(TileHashes(self.tiles), position, len(self.leaves))),
            "checkpoint": self.checkpoint(),
        }
        return Evidence(**(proof | fields))


def over(row: list[bytes]) -> bytes:
    """Return the hash over a full tile."""
    while len(row) > 1:
        row = [node_hash(*pair) for pair in zip(row[::2], row[1::2], strict=True)]
    return row[0]


def events(count: int) -> list[AuditEvent]:
    """Return different events."""
    return [make_event(request_id=f"r-{at}") for at in range(count)]
