"""The cache of answers about API keys, so that a verified key costs neither a read of its row nor bcrypt.

Entries are found by a keyed digest of the key, so no key is in memory after the call. An answer is trusted for a set
time, counted from before its row was read, and never beyond the key's own end. A change made here, or published by
another process, ends the trust at once; a process that a message does not reach trusts its answers for no longer than
that time.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from cachetools import LRUCache
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_gateway_store import clock
from agent_gateway_store._concurrency import BackgroundTasks, SingleFlight
from agent_gateway_store.keys.hashing import MAX_REFUSED, MAX_VERIFIED, Hasher, KeyVerifier
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.storage.pubsub import PubSub

_TOPIC = "api-key:"
# Chosen: a key that was just issued by another process is accepted after a second.
_UNKNOWN_S = 1.0
# Chosen: `close` waits so long for the last uses to be written.
_LAST_WRITES_S = 2.0


class ReadVersion(NamedTuple):
    """The moment before a row is read, from which its content may be trusted."""

    at: float
    change: int


@dataclass(slots=True)
class VerifiedKey:
    """A key that was accepted, when its use must be recorded again, and until when it is trusted."""

    identity: CallerIdentity
    use_due: float
    until: float = 0.0


REFUSED: Final = "refused"
"""The answer about a key that is not accepted, whatever the reason."""

Answer: TypeAlias = VerifiedKey | Literal["refused"]

_CacheKey: TypeAlias = tuple[str | None, bytes]


class KeyCache:
    """The keys that one open store knows. Its organisation-bound views share it, each with separate answers.

    Args:
        trusted_s: Seconds for which an answer is trusted; zero: nothing is remembered.
        pubsub: Publishes changes to other processes and receives theirs; None: only the time ends the trust.
        check_owner: Raises where the store is not open.
    """

    def __init__(
        self, hasher: Hasher, *, trusted_s: float, pubsub: PubSub | None, check_owner: Callable[[], None]
    ) -> None:
        self._trusted_s = trusted_s
        self.is_on = trusted_s > 0
        self.verifier = KeyVerifier(hasher, remembers=self.is_on)
        self.check_owner = check_owner
        self._pubsub = pubsub
        self._is_open = self._is_subscribed = False
        self._secret = secrets.token_bytes(32)
        # By key id, because a change names that. A key id has few keys that were ever valid.
        self._verified: LRUCache[str, dict[_CacheKey, VerifiedKey]] = LRUCache(MAX_VERIFIED)
        self._refused: LRUCache[_CacheKey, float] = LRUCache(MAX_REFUSED)
        self._unknown: LRUCache[tuple[str | None, str], float] = LRUCache(MAX_REFUSED)
        self._flights: SingleFlight[Answer] = SingleFlight()
        self._changes = 0
        self.background = BackgroundTasks()

    def fingerprint(self, plaintext: str) -> bytes:
        """Return the name of a key in memory: its HMAC-SHA-256 under a secret of this process."""
        return hmac.digest(self._secret, plaintext.encode(), "sha256")

    def find(self, org_id: str | None, key_id: str, fingerprint: bytes) -> Answer | None:
        """Return the answer that is trusted now, or None. Without I/O; `check_owner` is for the caller."""
        if not self.is_on:
            return None
        moment = clock.monotonic()
        names = self._verified.get(key_id)
        if names is not None and (good := names.get((org_id, fingerprint))) is not None and moment < good.until:
            return good
        for until in (self._refused.get((org_id, fingerprint)), self._unknown.get((org_id, key_id))):
            if until is not None and moment < until:
                return REFUSED
        return None

    async def read_once(
        self, org_id: str | None, fingerprint: bytes, read: Callable[[], Coroutine[Any, Any, Answer]]
    ) -> Answer:
        """Run one `read` for all tasks that ask for a key. After a change, one that began before is not joined."""
        # Where nothing may be remembered each task reads by itself, and they share bcrypt only.
        return await (self._flights.run((org_id, fingerprint, self._changes), read) if self.is_on else read())

    def begin(self) -> ReadVersion:
        """Call before a row is read whose content will be remembered."""
        return ReadVersion(clock.monotonic(), self._changes)

    def put_verified(
        self,
        version: ReadVersion,
        fingerprint: bytes,
        org_id: str | None,
        good: VerifiedKey,
        *,
        read_at: datetime,
        end: datetime | None,
    ) -> None:
        """Remember that a key is valid, until `end` at most; both times are the database's."""
        if not self._may_keep(version):
            return
        left_s = self._trusted_s if end is None else min(self._trusted_s, (end - read_at).total_seconds())
        good.until = version.at + left_s
        # Only now: a store that never accepts a key needs no subscription.
        if self._pubsub is not None and not self._is_subscribed:
            self._pubsub.subscribe(_TOPIC, self._on_change)
            self._is_subscribed = True
        # A verified key always has its id.
        key_id = good.identity.key_id or ""
        held = self._verified.get(key_id) or {}
        kept = {entry: other for entry, other in held.items() if other.until > version.at}
        self._verified[key_id] = kept | {(org_id, fingerprint): good}

    def put_refused(self, version: ReadVersion, fingerprint: bytes, org_id: str | None) -> None:
        """Remember that a key is not the one of its id, which no change can alter."""
        if self._may_keep(version):
            self._refused[org_id, fingerprint] = version.at + self._trusted_s

    def put_unknown(self, version: ReadVersion, key_id: str, org_id: str | None) -> None:
        """Remember for a second that a key id has no row, or one that has ended."""
        if self._may_keep(version):
            self._unknown[org_id, key_id] = version.at + min(_UNKNOWN_S, self._trusted_s)

    def _may_keep(self, version: ReadVersion) -> bool:
        return self.is_on and self._is_open and version.change == self._changes

    def drop(self, key_id: str) -> None:
        """Trust nothing that was read of `key_id` up to now."""
        self._changes += 1
        self._verified.pop(key_id, None)

    def drop_all(self) -> None:
        """Trust nothing that was read up to now. The results of bcrypt stay true."""
        self._changes += 1
        self._verified.clear()
        self._refused.clear()
        self._unknown.clear()

    async def notify(self, connection: AsyncConnection, key_id: str) -> None:
        """Send the change with the commit of the transaction, where messages go through the database."""
        if self._pubsub is not None:
            await self._pubsub.notify(connection, _TOPIC + key_id)

    async def publish(self, key_id: str) -> None:
        """Drop `key_id` here, then publish to every other process that it has changed."""
        self.drop(key_id)
        if self._pubsub is not None:
            await self._pubsub.publish(_TOPIC + key_id)

    def _on_change(self, key_id: str | None) -> None:
        if key_id is None:
            self.drop_all()
        else:
            self.drop(key_id)

    def open(self) -> None:
        """Begin to remember."""
        self._is_open = True

    async def close(self) -> None:
        """Forget every answer, remember no more, and wait a moment for what runs in the background."""
        self._is_open = self._is_subscribed = False
        self.drop_all()
        await self.background.join(_LAST_WRITES_S)
        await self.background.cancel()
