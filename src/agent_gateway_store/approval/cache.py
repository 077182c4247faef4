"""The Redis entries of an approval: `approval:{token}`, and from its id to the token.

An entry is the request as JSON, without the token and without the output that waits for its release, plus the token's
digest (so that a mixed-up answer is noticed), the life it was written with (so that Redis's own clock tells its age)
and when SQL was read (it may have been written late, by a reader that stood still or a Redis that hung, or be back from
an old copy). What is read is validated as any input.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import lru_cache
from uuid import UUID

from pydantic import AwareDatetime, ConfigDict, ValidationError

from agent_gateway_store.approval.queries import StoredApproval, result_of
from agent_gateway_store.clock import utc_now
from agent_gateway_store.encoding.plain import is_text
from agent_gateway_store.models.approval import ApprovalResult, ApprovalScope
from agent_gateway_store.models.columns import token_digest
from agent_gateway_store.models.values import ApprovalStatus, FrozenModel
from agent_gateway_store.storage.redis_cache import CacheEntry, RedisCache

_MOST_KEPT = 256  # chosen: approvals that are polled at the same time
_MAX_KEPT_CHARS = 8192  # chosen: all of them take two megabytes at most
_MAX_TOKEN_CHARS = 512  # ours have 43; a caller's own longer ones are read from SQL


class ApprovalSnapshot(FrozenModel):
    """How an approval stood when SQL was read, as its entry holds it. It releases nothing."""

    model_config = ConfigDict(extra="ignore")

    approval_id: UUID
    org_id: str
    status: ApprovalStatus
    scope: ApprovalScope
    approver_id: str | None
    approver_note: str
    decision_at: AwareDatetime | None
    expires_at: AwareDatetime
    use_before: AwareDatetime | None
    used_at: AwareDatetime | None = None
    outcome: str | None = None
    token_sha256: str
    read_at: AwareDatetime
    life_ms: int

    def is_fresh(self, left_ms: int, *, trust_s: float) -> bool:
        """True if its status was read less than `trust_s` seconds ago, and is final or has not ended.

        A final one is trusted no longer, since whoever can write to Redis can make one up. `left_ms` is what the entry
        has left by Redis's clock.
        """
        age_ms, now = self.life_ms - left_ms, utc_now()
        deadline = self.expires_at if self.status is ApprovalStatus.PENDING else self.use_before or self.expires_at
        return (
            0 <= age_ms < trust_s * 1000
            and abs((now - self.read_at).total_seconds()) < trust_s  # a clock that is behind cannot tell what is old
            and (self.status.is_final or now < deadline)  # from then on the database's clock decides
        )


class _Pointer(FrozenModel):
    """What is read of the entry that leads from an id to the token."""

    model_config = ConfigDict(extra="ignore")

    token: str


def _read(text: str | bytes, token: str) -> tuple[ApprovalSnapshot, ApprovalResult] | None:
    try:
        snapshot = ApprovalSnapshot.model_validate_json(text)
    except ValidationError:
        return None
    return (snapshot, result_of(snapshot, token)) if snapshot.token_sha256 == token_digest(token) else None


# Who polls gets the same text again and again. Its age is not in it.
_read_again = lru_cache(_MOST_KEPT)(_read)


class ApprovalCache:
    """Reads and writes the entries, whose status is trusted for `trust_s` seconds. Nothing here releases a call."""

    def __init__(self, redis: RedisCache, *, trust_s: float) -> None:
        self._redis = redis
        self._trust_s = trust_s

    async def get(self, token: str, *, org_id: str | None) -> ApprovalResult | None:
        """Return what the entry of `token` holds; None if there is none to be trusted (then SQL must be asked)."""
        if not _is_cached(token) or (found := await self._redis.get(_key(token))) is None:
            return None
        text, left_ms = found
        read = _read_again if len(text) <= _MAX_KEPT_CHARS else _read
        if (stood := read(text, token)) is None or org_id not in (None, stood[0].org_id) or left_ms <= 0:
            return None
        return stood[1] if stood[0].is_fresh(left_ms, trust_s=self._trust_s) else None

    async def put(
        self,
        approval: StoredApproval,
        token: str | None,
        *,
        is_known: bool = True,
        message: tuple[str, str] | None = None,
    ) -> None:
        """Write the entry until no deadline is ahead, then publish; an older version never replaces a newer one.

        Nothing is written where `token` is not that of the approval by SQL. `is_known`: Redis can do without the entry
        that leads from the id to it. `message`: a channel and what to publish on it, in the same step.
        """
        if not self._redis.is_available:
            return
        entries: list[CacheEntry] = []
        request, read_at, token_sha256 = approval
        ends = max(filter(None, (request.expires_at, request.use_before)), default=read_at)
        life_s = (ends - read_at).total_seconds()
        if token is not None and life_s > 0 and _is_cached(token) and token_digest(token) == token_sha256:
            values = request.model_dump(mode="json", exclude={"token", "id", "output_payload"})
            values |= {"token_sha256": token_sha256, "life_ms": int(life_s * 1000), "read_at": read_at.isoformat()}
            if not is_known:
                pointer = {"token": token, "version": request.version}
                entries.append(CacheEntry(_id_key(request.approval_id), _json(pointer), request.version, life_s))
            entries.append(CacheEntry(_key(token), _json(values), request.version, life_s))
        if entries or message is not None:
            await self._redis.put_newer(entries, message=message)

    async def token_of(self, approval_id: UUID) -> str | None:
        """Return the token kept for this id, so that a decision by id reaches the entry of the token."""
        found = await self._redis.get(_id_key(approval_id))
        try:
            return _Pointer.model_validate_json(found[0]).token if found else None
        except ValidationError:
            return None

    async def drop(self, token: str) -> None:
        """Delete the entry of a token that no longer names its approval."""
        if _is_cached(token):
            await self._redis.delete(_key(token))

    async def forget(self, approval_ids: Collection[UUID]) -> bool:
        """Delete both entries of each approval; False if Redis does not answer, and they stay until their life ends."""
        # An entry that was written after Redis had lost its keys has none that leads to it.
        return await self._redis.delete(*map(_id_key, approval_ids)) and await self._redis.delete_naming(
            _key("*"), '"approval_id":"', list(map(str, approval_ids))
        )


def _is_cached(token: str) -> bool:
    return len(token) <= _MAX_TOKEN_CHARS and is_text(token)


def _key(token: str) -> str:
    return f"approval:{token}"


def _id_key(approval_id: UUID) -> str:
    return f"approval-token:{approval_id}"


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
