"""The one clock of the package: aware UTC, with an offset that tests move.

`storage.db_clock` adds the same offset to the database's clock, so that one call to `move` moves both.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

_offset = timedelta()


def utc_now() -> datetime:
    """Return the time now as an aware UTC datetime, moved by the offset."""
    return datetime.now(UTC) + _offset


def monotonic() -> float:
    """Return seconds that only grow, also when the system's clock is set; moved by the offset."""
    return time.monotonic() + _offset.total_seconds()


def offset() -> timedelta:
    """Return how far the clock has been moved; zero outside tests."""
    return _offset


def move(by: timedelta) -> None:
    """Move the clock of this process by `by` (negative: back). For tests; moves add up."""
    global _offset
    _offset += by


def reset() -> None:
    """Put the clock back to the real time."""
    global _offset
    _offset = timedelta()
