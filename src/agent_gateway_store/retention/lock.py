"""One at a time in all processes: what prunes, erases, or changes a hold."""

from __future__ import annotations

from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.exclusive import POLL_S, ExclusiveLock

# Any number that is not used otherwise: the bytes of "agwhold".
LOCK_KEY = int.from_bytes(b"agwhold", "big")
# Chosen: many times what a prune holds it for, and less than the timeout of one command.
_WAIT_S = 20.0
PAUSE_S = 3 * POLL_S
"""Seconds for which a prune leaves the lock alone between two batches: whoever waits for it tries meanwhile."""


def retention_lock(database: Database) -> ExclusiveLock:
    """Return the lock of one database; within a store there must be one of it."""
    return ExclusiveLock(
        database, key=LOCK_KEY, suffix=".retention.lock", wait_s=_WAIT_S, busy="Another retention command is at work"
    )
