"""The Redis entries of an approval: `approval:{token}`, and from its id to the token.

An entry is the request as JSON, without the token, plus the token's digest (so that a mixed-up answer is noticed), the
life it was written with (so that Redis's own clock tells its age) and when SQL was read (it may have been written late,
by a reader that stood still or a Redis that hung, or be back from an old copy). What is read is validated as any input.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from pydantic import AwareDatetime, ConfigDict, ValidationError

from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult, ApprovalScope
from agent_gateway_store.models.canonical import is_text
from agent_gateway_store.models.columns import token_digest
from agent_gateway_store.models.values import ApprovalStatus, Value
from agent_gateway_store.storage.accelerator import Accelerator

__all__ = ["Entries"]

_MAX_TOKEN_CHARS = 512


class _Entry(Value):
    """What is read of an entry."""

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
    token_sha256: str
    life_ms: int
    read_at: AwareDatetime

    def is_over(self) -> bool:
        """True if a deadline may have passed: then the database's clock decides, not this one."""
        deadline = self.expires_at if self.status is ApprovalStatus.PENDING else self.use_before or self.expires_at
        return deadline <= utc_now()

    def result(self, token: str) -> ApprovalResult:
        """Where the approval stands."""
        return ApprovalResult.model_construct(
            approval_id=self.approval_id,
            token=token,
            status=self.status,
            scope=self.scope,
            approver_id=self.approver_id,
            note=self.approver_note,
            decided_at=self.decision_at,
            expires_at=self.expires_at,
        )


class Entries:
    """Reads and writes the entries. Only ever makes reads faster: nothing here releases a call.

    Args:
        redis: The guarded client.
        trust_s: How long a status that can still change is trusted, in seconds.
    """

    def __init__(self, redis: Accelerator, *, trust_s: float) -> None:
        self._redis = redis
        self._trust_s = trust_s

    async def get(self, token: str, *, org_id: str | None) -> ApprovalResult | None:
        """Return what the entry of `token` says; None if there is none to be trusted (then SQL must be asked)."""
        if not _is_cached(token) or (found := await self._redis.get(_key(token))) is None:
            return None
        try:
            entry = _Entry.model_validate(found[0])
        except ValidationError:
            return None
        left_ms = found[1]
        if entry.token_sha256 != token_digest(token) or org_id not in (None, entry.org_id) or left_ms <= 0:
            return None
        if not entry.status.is_final:
            age_ms, age = entry.life_ms - left_ms, utc_now() - entry.read_at
            trust_ms = self._trust_s * 1000
            if not 0 <= age_ms < trust_ms or age.total_seconds() * 1000 >= trust_ms or entry.is_over():
                return None
        return entry.result(token)

    async def put(
        self, request: ApprovalRequest, token: str, *, token_sha256: str, life_s: float, read_at: datetime
    ) -> None:
        """Write both entries for `life_s` seconds; an older version never replaces a newer one.

        Args:
            request: As SQL has it.
            token: Believed to be its token; if SQL says otherwise, nothing is written.
            token_sha256: The digest that SQL holds.
            life_s: Until neither deadline is ahead, in seconds.
            read_at: When SQL said so, by its clock.
        """
        if life_s <= 0 or not self._redis.is_available or not _is_cached(token) or token_digest(token) != token_sha256:
            return
        entry = request.model_dump(mode="json", exclude={"token", "id"})
        entry |= {"token_sha256": token_sha256, "life_ms": int(life_s * 1000), "read_at": read_at.isoformat()}
        await self._redis.put_newer(_key(token), entry, version=request.version, ttl_s=life_s)
        await self._redis.put_newer(
            _id_key(request.approval_id),
            {"token": token, "version": request.version},
            version=request.version,
            ttl_s=life_s,
        )

    async def token_of(self, approval_id: UUID) -> str | None:
        """Return the token kept for this id, so that a decision by id reaches the entry of the token."""
        found = await self._redis.get(_id_key(approval_id))
        token = found[0].get("token") if found else None
        return token if isinstance(token, str) else None

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
