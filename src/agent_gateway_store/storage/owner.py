"""The process and event loop that a store belongs to: it is used in no other ones."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TypeAlias

from agent_gateway_store.errors import StoreNotOpenError

Owner: TypeAlias = tuple[int, asyncio.AbstractEventLoop]


def owner_here() -> Owner:
    """Return this process and event loop."""
    return os.getpid(), asyncio.get_running_loop()


def require_owner(owner: Owner | None) -> None:
    """Raise StoreNotOpenError unless `owner` is this process and event loop."""
    if owner is None:
        raise StoreNotOpenError("The store is not open: use `async with GatewayStore() as store:` or `open()`.")
    pid, loop = owner
    if pid != os.getpid():
        raise StoreNotOpenError("The store was opened in another process: open one in each process, after forking.")
    if loop is not asyncio.get_running_loop():
        raise StoreNotOpenError("The store was opened in another event loop: open one in each loop.")


class Claim:
    """Keeps a store from other event loops, whose threads could open it while this one does."""

    def __init__(self) -> None:
        self._owner: Owner | None = None
        self._lock = threading.Lock()

    def take(self) -> None:
        """Claim the store until `release`, again if it is claimed here; else raise StoreNotOpenError."""
        with self._lock:
            if self._owner is not None:
                require_owner(self._owner)
            self._owner = owner_here()

    def release(self) -> None:
        """Let others claim it."""
        self._owner = None
