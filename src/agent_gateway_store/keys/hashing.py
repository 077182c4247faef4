"""bcrypt in a bounded pool of threads, never on the event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import bcrypt

from agent_gateway_store.errors import StoreNotOpenError, StoreUnavailableError

__all__ = ["Hasher"]

T = TypeVar("T")
_MOST_WAITING = 64


class Hasher:
    """Hashes and checks secrets.

    Args:
        rounds: bcrypt's cost, as a power of two.
    """

    def __init__(self, *, rounds: int) -> None:
        self._rounds = rounds
        self._threads = max(1, (os.cpu_count() or 2) - 1)
        self._pool: ThreadPoolExecutor | None = None
        self._room = threading.Semaphore(_MOST_WAITING)

    async def hash(self, secret: bytes) -> str:
        """Return the bcrypt of `secret` (at most 72 bytes)."""
        return (await self._run(lambda: bcrypt.hashpw(secret, bcrypt.gensalt(self._rounds)))).decode()

    async def check(self, secret: bytes, hashed: str) -> bool:
        """True if `hashed` is the bcrypt of `secret`.

        Raises:
            StoreUnavailableError: Too many checks wait already.
        """
        return await self._run(lambda: bcrypt.checkpw(secret, hashed.encode()))

    async def _run(self, work: Callable[[], T]) -> T:
        if not self._room.acquire(blocking=False):
            raise StoreUnavailableError("Too many keys wait to be checked: try again in a second.")
        try:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="gateway-store-bcrypt")
            future = self._pool.submit(work)
        except BaseException:
            self._room.release()
            raise
        # The place is held until the thread is done, also where the caller is cancelled before.
        future.add_done_callback(self._done)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if future.cancelled() and not _is_cancelling():
                raise StoreNotOpenError("The store was closed while a key was being checked.") from None
            raise

    def _done(self, _future: Future[T]) -> None:
        self._room.release()

    def close(self) -> None:
        """Let the threads go; what waits is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
