"""bcrypt at most once for a key and a hash, and only so often for wrong keys of one key id."""

from __future__ import annotations

import time
from collections.abc import Sequence

from agent_gateway_store import clock
from agent_gateway_store._concurrency import SingleFlight
from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.keys.hashing import Hasher
from agent_gateway_store.keys.lru import Lru

__all__ = ["MOST_GOOD", "MOST_WRONG", "Checker", "now"]

MOST_GOOD, MOST_WRONG = 32_768, 8_192
_MOST_AT_ONCE = 4
_FAILURES = 8.0
_FAILURES_PER_S = 1.0


def now() -> float:
    """Return seconds that only grow, and move with `clock` in tests."""
    return time.monotonic() + clock.offset().total_seconds()


class Checker:
    """Compares keys with hashes.

    What bcrypt said of a key and a hash stays true, so it is remembered without an end: as the key's name (see
    `KeyCache.name`) and the hash. Each key id may fail eight times in a row and once a second from then on, and have
    four checks under way; above that a key that was not checked before is told to come back later. It is not called
    wrong, since it may be the new key of a caller whose key id somebody attacks.

    Args:
        hasher: bcrypt in its threads.
        remembers: False: every check runs bcrypt.
    """

    def __init__(self, hasher: Hasher, *, remembers: bool) -> None:
        self._hasher = hasher
        self._remembers = remembers
        self._good: Lru[bytes, str] = Lru(MOST_GOOD)
        self._wrong: Lru[bytes, tuple[str, ...]] = Lru(MOST_WRONG)
        self._limits: Lru[str, _Limit] = Lru(MOST_WRONG)
        self._flights: SingleFlight[str | None] = SingleFlight()

    def admit(self, key_id: str, name: bytes) -> None:
        """Raise StoreUnavailableError if a check of this key could not run now. Costs nothing else."""
        if self._good.get(name) is None and self._wrong.get(name) is None:
            limit = self._limits.get(key_id)
            if limit is not None and limit.left < 1:
                raise _too_many()

    async def matching(self, key_id: str, name: bytes, secret: bytes, hashes: Sequence[str]) -> str | None:
        """Return the one of `hashes` that is the bcrypt of `secret`, or None.

        Tasks that ask the same at the same time share one check.

        Raises:
            StoreUnavailableError: Too many keys wait to be checked, or too many of this key id were wrong.
        """
        good = self._good.get(name)
        if good is not None and good in hashes:
            return good
        wrong = self._wrong.get(name) or ()
        untried = [hashed for hashed in hashes if hashed not in wrong]
        if not untried:
            return None
        return await self._flights.run((name, *untried), lambda: self._check(key_id, name, secret, untried))

    async def _check(self, key_id: str, name: bytes, secret: bytes, untried: Sequence[str]) -> str | None:
        limit = self._limits.get(key_id)
        if limit is None:
            limit = _Limit()
            self._limits.put(key_id, limit)
        if limit.left < 1 or limit.running >= _MOST_AT_ONCE:
            raise _too_many()
        limit.enter()
        try:
            for hashed in untried:
                if await self._hasher.check(secret, hashed):
                    limit.give_back()
                    self._remember(name, hashed, untried)
                    return hashed
        except StoreUnavailableError:
            limit.give_back()
            raise
        finally:
            limit.running -= 1
        self._remember(name, None, untried)
        return None

    def _remember(self, name: bytes, good: str | None, tried: Sequence[str]) -> None:
        if not self._remembers:
            return
        if good is not None:
            self._good.put(name, good)
        else:
            # A row has two hashes at most, so more than the last two are of no use.
            self._wrong.put(name, (*(self._wrong.get(name) or ()), *tried)[-2:])


class _Limit:
    """The failures of one key id: a bucket that a failure takes from and time fills."""

    __slots__ = ("_at", "_left", "running")

    def __init__(self) -> None:
        self.running = 0
        self._left = _FAILURES
        self._at = now()

    @property
    def left(self) -> float:
        """How many more may fail now."""
        moment = now()
        self._left = min(_FAILURES, self._left + max(0.0, moment - self._at) * _FAILURES_PER_S)
        self._at = moment
        return self._left

    def enter(self) -> None:
        self.running += 1
        self._left -= 1

    def give_back(self) -> None:
        self._left += 1


def _too_many() -> StoreUnavailableError:
    return StoreUnavailableError("Too many wrong keys came for this key id: try again in a second.")
