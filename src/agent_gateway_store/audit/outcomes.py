"""What becomes of a write, and how many."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["AuditCounters", "WriteOutcome"]


class WriteOutcome(StrEnum):
    """What became of a write.

    STORED: committed. DUPLICATE: the same event was there already. SPOOLED: on disk in the local spool, until the
    database is back. LOST: neither could be had; the event was logged at CRITICAL.
    """

    STORED = "STORED"
    DUPLICATE = "DUPLICATE"
    SPOOLED = "SPOOLED"
    LOST = "LOST"


@dataclass(slots=True)
class AuditCounters:
    """How many events this store has seen since it was opened, in this process.

    Attributes:
        stored: Committed to the database at the first try.
        duplicate: Already there.
        spooled: Kept in the local spool.
        replayed: Brought from the spool to the database.
        lost: Logged at CRITICAL, kept nowhere else.
        withheld: Stored without arguments and texts, because a plugin failed before the write.
        untold: Stored, but not told to a plugin that wants to hear of events; once for each plugin.
        queue_depth: Waiting for a commit now.
    """

    stored: int = 0
    duplicate: int = 0
    spooled: int = 0
    replayed: int = 0
    lost: int = 0
    withheld: int = 0
    untold: int = 0
    queue_depth: int = 0

    def count(self, outcome: WriteOutcome, number: int = 1) -> None:
        """Add `number` writes that ended as `outcome`."""
        name = outcome.value.lower()
        setattr(self, name, getattr(self, name) + number)
