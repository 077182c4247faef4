"""bcrypt in a bounded pool of threads, at most once for a key and a hash, and limited for wrong keys of one id."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import bcrypt
from cachetools import LRUCache

from agent_gateway_store import clock
from agent_gateway_store._concurrency import SingleFlight
from agent_gateway_store.errors import StoreNotOpenError, StoreUnavailableError

__all__ = ["MAX_REFUSED", "MAX_VERIFIED", "Hasher", "KeyVerifier", "now"]

T = TypeVar("T")
# Some 250 bytes an entry: 8 MB of keys that are right, 2 MB of keys and ids that are wrong.
MAX_VERIFIED, MAX_REFUSED = 32_768, 8_192
# At cost 10 a check takes 50 ms: with one thread the last of 64 waits three seconds.
_MAX_WAITING = 64
# A person who mistypes a key gets eight tries; a loop that sends a wrong one costs a check a second.
_MAX_CONCURRENT_CHECKS = 4
_MAX_FAILURES = 8.0
_FAILURES_REFILLED_PER_S = 1.0


def now() -> float:
    """Return seconds that only grow, and move with `clock` in tests."""
    return time.monotonic() + clock.offset().total_seconds()


class Hasher:
    """Hashes and checks secrets.

    Args:
        rounds: bcrypt's cost, as a power of two.
    """

    def __init__(self, *, rounds: int) -> None:
        self._rounds = rounds
        self._threads = max(1, (os.cpu_count() or 2) - 1)
        self._pool: ThreadPoolExecutor | None = None
        self._room = threading.Semaphore(_MAX_WAITING)

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


class KeyVerifier:
    """Compares keys with hashes.

    What bcrypt said of a key and a hash stays true, so it is remembered without an end: by the key's fingerprint (see
    `KeyCache.fingerprint`) and the hash. Each key id may fail eight times in a row and once a second from then on, and
    have four checks under way; above that a key that was not checked before must be tried again later. It is not called
    wrong, since it may be the new key of a caller whose key id somebody attacks.

    Args:
        hasher: bcrypt in its threads.
        remembers: False: every check runs bcrypt.
    """

    def __init__(self, hasher: Hasher, *, remembers: bool) -> None:
        self._hasher = hasher
        self._remembers = remembers
        self._matched: LRUCache[bytes, str] = LRUCache(MAX_VERIFIED)
        self._refused: LRUCache[bytes, tuple[str, ...]] = LRUCache(MAX_REFUSED)
        self._limits: LRUCache[str, _Limit] = LRUCache(MAX_REFUSED)
        self._flights: SingleFlight[str | None] = SingleFlight()

    def admit(self, key_id: str, fingerprint: bytes) -> None:
        """Raise StoreUnavailableError if a check of this key could not run now. Costs nothing else."""
        if fingerprint not in self._matched and fingerprint not in self._refused:
            limit = self._limits.get(key_id)
            if limit is not None and limit.left < 1:
                raise _too_many()

    async def matching(self, key_id: str, fingerprint: bytes, secret: bytes, hashes: Sequence[str]) -> str | None:
        """Return the one of `hashes` that is the bcrypt of `secret`, or None.

        Tasks that ask the same at the same time share one check.

        Raises:
            StoreUnavailableError: Too many keys wait to be checked, or too many of this key id were wrong.
        """
        good = self._matched.get(fingerprint)
        if good is not None and good in hashes:
            return good
        refused = self._refused.get(fingerprint, ())
        untried = [hashed for hashed in hashes if hashed not in refused]
        if not untried:
            return None
        return await self._flights.run(
            (fingerprint, *untried), lambda: self._check(key_id, fingerprint, secret, untried)
        )

    async def _check(self, key_id: str, fingerprint: bytes, secret: bytes, untried: Sequence[str]) -> str | None:
        limit = self._limits.setdefault(key_id, _Limit())
        if limit.left < 1 or limit.running >= _MAX_CONCURRENT_CHECKS:
            raise _too_many()
        limit.enter()
        try:
            for hashed in untried:
                if await self._hasher.check(secret, hashed):
                    limit.give_back()
                    self._remember(fingerprint, hashed, untried)
                    return hashed
        except StoreUnavailableError:
            limit.give_back()
            raise
        finally:
            limit.running -= 1
        self._remember(fingerprint, None, untried)
        return None

    def _remember(self, fingerprint: bytes, good: str | None, tried: Sequence[str]) -> None:
        if not self._remembers:
            return
        if good is not None:
            self._matched[fingerprint] = good
        else:
            # A row has two hashes at most, so more than the last two are of no use.
            self._refused[fingerprint] = (*self._refused.get(fingerprint, ()), *tried)[-2:]


class _Limit:
    """The failures of one key id: a bucket that a failure takes from and time fills."""

    __slots__ = ("_at", "_left", "running")

    def __init__(self) -> None:
        self.running = 0
        self._left = _MAX_FAILURES
        self._at = now()

    @property
    def left(self) -> float:
        """How many more may fail now."""
        moment = now()
        self._left = min(_MAX_FAILURES, self._left + max(0.0, moment - self._at) * _FAILURES_REFILLED_PER_S)
        self._at = moment
        return self._left

    def enter(self) -> None:
        self.running += 1
        self._left -= 1

    def give_back(self) -> None:
        self._left += 1


def _too_many() -> StoreUnavailableError:
    return StoreUnavailableError("Too many wrong keys came for this key id: try again in a second.")
