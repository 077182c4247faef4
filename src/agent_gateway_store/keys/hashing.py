"""bcrypt in a bounded pool of threads, at most once for a key and a hash, and limited for wrong keys of one id."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import bcrypt
from cachetools import LRUCache

from agent_gateway_store import clock
from agent_gateway_store._concurrency import SingleFlight
from agent_gateway_store.errors import StoreNotOpenError, StoreUnavailableError
from agent_gateway_store.settings import MAX_BCRYPT_ROUNDS

T = TypeVar("T")
_logger = logging.getLogger("agent_gateway_store.keys")

# Some 250 bytes an entry: 8 MB of keys that are right, 2 MB of keys and ids that are wrong.
MAX_VERIFIED, MAX_REFUSED = 32_768, 8_192
# At cost 10 a check takes 50 ms: with one thread the last of 64 waits three seconds.
_MAX_WAITING = 64
# Chosen: a person who mistypes a key may do so eight times; a loop that sends a wrong one costs a check a second.
_MAX_FAILURES = 8.0
_FAILURES_REFILLED_PER_S = 1.0


class Hasher:
    """Hashes and checks secrets; `rounds` is bcrypt's cost, as a power of two."""

    def __init__(self, *, rounds: int) -> None:
        self._rounds = rounds
        # bcrypt releases the GIL; one core stays free for the event loop.
        self._max_threads = max(1, (os.cpu_count() or 2) - 1)
        self._pool: ThreadPoolExecutor | None = None
        self._room = threading.Semaphore(_MAX_WAITING)

    async def hash(self, secret: bytes) -> str:
        """Return the bcrypt of `secret` (at most 72 bytes)."""
        return (await self._run(lambda: bcrypt.hashpw(secret, bcrypt.gensalt(self._rounds)))).decode()

    async def check(self, secret: bytes, hashed: str) -> bool:
        """True if `hashed` is the bcrypt of `secret`.

        Raises:
            StoreUnavailableError: Too many checks wait.
        """
        return await self._run(partial(_is_hash_of, secret, hashed))

    async def _run(self, work: Callable[[], T]) -> T:
        if not self._room.acquire(blocking=False):
            raise StoreUnavailableError("Too many keys wait to be checked: try again in a second.")
        try:
            pool = self._pool = self._pool or ThreadPoolExecutor(
                self._max_threads, thread_name_prefix="gateway-store-bcrypt"
            )
            future = pool.submit(self._work_of, pool, work)
        except BaseException:
            self._room.release()
            raise
        # The place is held until the thread has ended, also if the caller is cancelled before.
        future.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(future)

    def _work_of(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        if self._pool is pool:
            result = work()
            if self._pool is pool:
                return result
        raise StoreNotOpenError("The store was closed while a key was being checked.")

    async def close(self) -> None:
        """End the threads without waiting for them; what they have not done fails with StoreNotOpenError."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None


def _is_hash_of(secret: bytes, hashed: str) -> bool:
    try:
        # As in "$2b$10$...".
        if (cost := int(hashed.split("$")[2])) > MAX_BCRYPT_ROUNDS:
            _logger.error(
                "An API key has a hash of bcrypt's cost %s, above %s, and is refused: issue another key.",
                cost,
                MAX_BCRYPT_ROUNDS,
            )
            return False
        return bcrypt.checkpw(secret, hashed.encode())
    except (ValueError, AttributeError, LookupError):
        # Somebody wrote past the store what is the hash of no key.
        return False


class KeyVerifier:
    """Compares keys with hashes.

    The result of bcrypt for a key and a hash stays true, so it is remembered without an end, by the key's fingerprint
    (see `KeyCache.fingerprint`) and the hash. Each key id may fail eight times in a row, then once a second;
    checks under way count. Beyond that a key that was not checked before gets StoreUnavailableError and not a refusal,
    since it may be the new key of a caller whose key id is attacked. A check goes on when its callers are gone: a wrong
    key counts whoever hangs up, and a right one is remembered where keys are cached.
    """

    def __init__(self, hasher: Hasher, *, remembers: bool) -> None:
        self._hasher = hasher
        self._remembers = remembers
        self._matched: LRUCache[bytes, str] = LRUCache(MAX_VERIFIED)
        self._refused: LRUCache[bytes, tuple[str, ...]] = LRUCache(MAX_REFUSED)
        self._limits: LRUCache[str, _Limit] = LRUCache(MAX_REFUSED)
        self._flights: SingleFlight[str | None] = SingleFlight(to_end=True)

    def admit(self, key_id: str, fingerprint: bytes) -> None:
        """Raise StoreUnavailableError if a check of this key could not run now."""
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
        check = partial(self._check, key_id, fingerprint, secret, untried)
        return await self._flights.run((fingerprint, *untried), check)

    async def _check(self, key_id: str, fingerprint: bytes, secret: bytes, untried: Sequence[str]) -> str | None:
        limit = self._limits.setdefault(key_id, _Limit())
        if limit.left < 1:
            raise _too_many()
        # Counted as a failure in advance, so that checks under way count, and taken back where it is none.
        limit.change(-1)
        try:
            for hashed in untried:
                if await self._hasher.check(secret, hashed):
                    limit.change(+1)
                    if self._remembers:
                        self._matched[fingerprint] = hashed
                    return hashed
        except (StoreUnavailableError, StoreNotOpenError):
            limit.change(+1)
            raise
        if self._remembers:
            # A row has two hashes at most, so no more than the last two are of use.
            self._refused[fingerprint] = (*self._refused.get(fingerprint, ()), *untried)[-2:]
        return None


class _Limit:
    """The failures that one key id has left: a token bucket, which time refills."""

    __slots__ = ("_at", "_left")

    def __init__(self) -> None:
        self._left = _MAX_FAILURES
        self._at = clock.monotonic()

    @property
    def left(self) -> float:
        """How many more checks may fail now."""
        moment = clock.monotonic()
        self._left = min(_MAX_FAILURES, self._left + max(0.0, moment - self._at) * _FAILURES_REFILLED_PER_S)
        self._at = moment
        return self._left

    def change(self, by: int) -> None:
        """Add to the failures that are left."""
        self._left += by


def _too_many() -> StoreUnavailableError:
    return StoreUnavailableError("Too many wrong keys were sent for this key id: try again in a second.")
