"""What is known of API keys for a while, so that a verified key costs neither a row nor bcrypt.

Entries go by a keyed digest of the key, so no key is in memory after the call. An answer is trusted for a set time from
before its row was read, and never beyond the key's own end; a change made here, or signalled by another process, ends
the trust at once. A signal that Redis does not take is sent again until it does; who hears none all the same, because
they were cut off, trusts no longer than that time.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

from agent_gateway_store._concurrency import SingleFlight
from agent_gateway_store.keys.checking import MOST_GOOD, MOST_WRONG, Checker, now
from agent_gateway_store.keys.hashing import Hasher
from agent_gateway_store.keys.lru import Lru
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.storage.database import SqlConnection
from agent_gateway_store.storage.pubsub import PubSub

__all__ = ["REFUSED", "Good", "KeyCache", "Reading", "Refused"]

_TOPIC = "api-key:"
_UNKNOWN_S = 1.0
_LAST_WRITES_S = 2.0
_TELL_AGAIN_S = 0.25


class Reading(NamedTuple):
    """The moment before a row is read: what was true then may be trusted from then on."""

    at: float
    change: int


class Good:
    """A key that was accepted.

    Attributes:
        identity: Who it belongs to.
        use_due: When its use is to be noted again.
    """

    __slots__ = ("identity", "until", "use_due")

    def __init__(self, identity: CallerIdentity, *, use_due: float) -> None:
        self.identity = identity
        self.use_due = use_due
        self.until = 0.0


class Refused:
    """A key that is not accepted, whatever the reason."""

    __slots__ = ()


REFUSED = Refused()
"""The one of its kind."""

_Name = tuple[str | None, bytes]


class KeyCache:
    """The keys that one open store knows; its organisation-bound views share it, each with answers of its own.

    Args:
        hasher: bcrypt in its threads; stays the caller's.
        trusted_s: How long an answer is trusted; zero: nothing is remembered.
        pubsub: Tell of changes to other processes and hear of theirs; None: the time alone ends trust.
        check_owner: Raises where the store is not open.

    Attributes:
        checker: bcrypt, remembered and limited.
        is_on: False if nothing is remembered.
        trusted_s: As given.
    """

    def __init__(
        self, hasher: Hasher, *, trusted_s: float, pubsub: PubSub | None, check_owner: Callable[[], None]
    ) -> None:
        self.trusted_s = trusted_s
        self.is_on = trusted_s > 0
        self.checker = Checker(hasher, remembers=self.is_on)
        self.check_owner = check_owner
        self._pubsub = pubsub
        self._is_open = self._hears = False
        self._secret = secrets.token_bytes(32)
        # By key id, so that a change finds them; a key id has few keys that were ever good.
        self._good: Lru[str, dict[_Name, Good]] = Lru(MOST_GOOD)
        self._wrong: Lru[_Name, float] = Lru(MOST_WRONG)
        self._unknown: Lru[tuple[str | None, str], float] = Lru(MOST_WRONG)
        self._flights: SingleFlight[Good | Refused] = SingleFlight()
        self._changes = 0
        self._writes: set[asyncio.Task[None]] = set()

    def name(self, plaintext: str) -> bytes:
        """Return what a key is called here: its HMAC-SHA-256 under a secret of this process."""
        return hmac.digest(self._secret, plaintext.encode(), "sha256")

    def find(self, org_id: str | None, key_id: str, name: bytes) -> Good | Refused | None:
        """Return the answer that is trusted now, or None. Costs no I/O."""
        self.check_owner()
        if not self.is_on:
            return None
        moment = now()
        names = self._good.get(key_id)
        if names is not None and (good := names.get((org_id, name))) is not None and moment < good.until:
            return good
        for until in (self._wrong.get((org_id, name)), self._unknown.get((org_id, key_id))):
            if until is not None and moment < until:
                return REFUSED
        return None

    async def shared(
        self, org_id: str | None, name: bytes, look: Callable[[], Coroutine[Any, Any, Good | Refused]]
    ) -> Good | Refused:
        """Have one of the tasks that ask for the same key `look`; what began before a change answers none after it."""
        # Where nothing is to be remembered each looks by itself; they share no more than bcrypt.
        return await (self._flights.run((org_id, name, self._changes), look) if self.is_on else look())

    def begin(self) -> Reading:
        """Call before a row is read whose content is to be remembered."""
        return Reading(now(), self._changes)

    def put_good(
        self, reading: Reading, name: bytes, org_id: str | None, good: Good, *, read_at: datetime, end: datetime | None
    ) -> None:
        """Remember that a key is good, until `end` at most; both times are the database's."""
        if not self._may_keep(reading):
            return
        left_s = self.trusted_s if end is None else min(self.trusted_s, (end - read_at).total_seconds())
        good.until = reading.at + left_s
        if self._pubsub is not None and not self._hears:
            self._pubsub.hear(_TOPIC, self._heard)
            self._hears = True
        key_id = good.identity.key_id
        held = self._good.get(key_id) or {}
        kept = {entry: other for entry, other in held.items() if other.until > reading.at}
        self._good.put(key_id, kept | {(org_id, name): good})

    def put_wrong(self, reading: Reading, name: bytes, org_id: str | None) -> None:
        """Remember that a key is not the one of its id; no change makes it that."""
        if self._may_keep(reading):
            self._wrong.put((org_id, name), reading.at + self.trusted_s)

    def put_unknown(self, reading: Reading, key_id: str, org_id: str | None) -> None:
        """Remember for a second that a key id has no row, or one that has ended."""
        if self._may_keep(reading):
            self._unknown.put((org_id, key_id), reading.at + min(_UNKNOWN_S, self.trusted_s))

    def _may_keep(self, reading: Reading) -> bool:
        return self.is_on and self._is_open and reading.change == self._changes

    def drop(self, key_id: str) -> None:
        """Trust nothing that was read of `key_id` up to now."""
        self._changes += 1
        self._good.drop(key_id)

    def drop_all(self) -> None:
        """Trust nothing that was read up to now. What bcrypt said stays true."""
        self._changes += 1
        self._good.clear()
        self._wrong.clear()
        self._unknown.clear()

    async def announce(self, connection: SqlConnection, key_id: str) -> None:
        """Have the change go out with the transaction, where pubsub go through the database."""
        if self._pubsub is not None:
            await self._pubsub.announce(connection, _TOPIC + key_id)

    async def publish(self, key_id: str) -> None:
        """Drop `key_id` here, then tell every other process that it has changed.

        Where Redis does not answer they are told when it does, in the background, while any of them may trust the key.
        """
        self.drop(key_id)
        if self._pubsub is not None and not await self._pubsub.publish(_TOPIC + key_id):
            self.in_background(self._tell_late(self._pubsub, key_id, until=now() + self.trusted_s))

    async def _tell_late(self, pubsub: PubSub, key_id: str, *, until: float) -> None:
        while self._is_open and now() < until:
            await asyncio.sleep(_TELL_AGAIN_S)
            if await pubsub.send(_TOPIC + key_id):
                return

    def _heard(self, key_id: str | None) -> None:
        if key_id is None:
            self.drop_all()
        else:
            self.drop(key_id)

    def in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` beside the verification that it came from; it raises nothing."""
        task = asyncio.get_running_loop().create_task(work)
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return task

    def open(self) -> None:
        """Begin to remember."""
        self._is_open = True

    async def close(self) -> None:
        """Forget every answer, remember no more, and let what runs in the background end."""
        self._is_open = self._hears = False
        self.drop_all()
        if self._writes:
            _, late = await asyncio.wait(self._writes, timeout=_LAST_WRITES_S)
            for task in late:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
