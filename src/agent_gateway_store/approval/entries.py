"""The Redis entries of an approval: `approval:{token}`, and from its id to the token.

An entry is the request as JSON, without the token, plus the token's digest (so that a mixed-up answer is noticed), the
life it was written with (so that Redis's own clock tells its age) and when SQL was read (it may have been written late,
by a reader that stood still or a Redis that hung, or be back from an old copy). What is read is validated as any input.
"""

from __future__ import annotations

import json
from datetime import datetime
from uuid import UUID

from pydantic import ConfigDict, ValidationError

from agent_gateway_store.approval.told import Told
from agent_gateway_store.clock import utc_now
from agent_gateway_store.encoding.canonical import is_text
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult
from agent_gateway_store.models.columns import token_digest
from agent_gateway_store.models.values import FrozenModel
from agent_gateway_store.storage.redis_cache import Entry, RedisCache

__all__ = ["Entries"]

_MAX_TOKEN_CHARS = 512


class _Held(Told):
    """What is read of an entry."""

    life_ms: int


class _Pointer(FrozenModel):
    """What is read of the entry that leads from an id to the token."""

    model_config = ConfigDict(extra="ignore")

    token: str


class Entries:
    """Reads and writes the entries. Only ever makes reads faster: nothing here releases a call.

    Args:
        redis: The guarded client.
        trust_s: How long a status that can still change is trusted, in seconds.
    """

    def __init__(self, redis: RedisCache, *, trust_s: float) -> None:
        self._redis = redis
        self._trust_s = trust_s

    async def get(self, token: str, *, org_id: str | None) -> ApprovalResult | None:
        """Return what the entry of `token` says; None if there is none to be trusted (then SQL must be asked)."""
        if not _is_cached(token) or (found := await self._redis.get(_key(token))) is None:
            return None
        text, left_ms = found
        try:
            held = _Held.model_validate_json(text)
        except ValidationError:
            return None
        if held.token_sha256 != token_digest(token) or org_id not in (None, held.org_id) or left_ms <= 0:
            return None
        if not held.status.is_final:
            age_ms, now = held.life_ms - left_ms, utc_now()
            if (
                not 0 <= age_ms < self._trust_s * 1000
                or (now - held.read_at).total_seconds() >= self._trust_s
                or held.deadline <= now
            ):
                return None
        return held.result(token)

    async def put(
        self,
        request: ApprovalRequest,
        token: str | None,
        *,
        token_sha256: str,
        life_s: float,
        read_at: datetime,
        is_known: bool,
        message: tuple[str, str] | None = None,
    ) -> None:
        """Write the entry for `life_s` seconds, then publish; an older version never replaces a newer one.

        Args:
            request: As SQL has it.
            token: Believed to be its token; where SQL says otherwise, or it is not known, nothing is written.
            token_sha256: The digest that SQL holds.
            life_s: Until neither deadline is ahead, in seconds.
            read_at: When SQL said so, by its clock.
            is_known: Redis has the entry that leads to this token, or can do without it until somebody asks again.
            message: A channel and what goes out on it, in the same round trip and after the entries.
        """
        if not self._redis.is_available:
            return
        entries: list[Entry] = []
        if token is not None and life_s > 0 and _is_cached(token) and token_digest(token) == token_sha256:
            held = request.model_dump(mode="json", exclude={"token", "id"})
            held |= {"token_sha256": token_sha256, "life_ms": int(life_s * 1000), "read_at": read_at.isoformat()}
            if not is_known:
                pointer = {"token": token, "version": request.version}
                entries.append(Entry(_id_key(request.approval_id), _text(pointer), request.version, life_s))
            entries.append(Entry(_key(token), _text(held), request.version, life_s))
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


def _is_cached(token: str) -> bool:
    return len(token) <= _MAX_TOKEN_CHARS and is_text(token)


def _key(token: str) -> str:
    return f"approval:{token}"


def _id_key(approval_id: UUID) -> str:
    return f"approval-token:{approval_id}"


def _text(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
