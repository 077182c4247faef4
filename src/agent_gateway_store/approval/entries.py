"""The Redis entries of an approval: `approval:{token}`, and from its id to the token.

An entry is the request as JSON, without the token, plus the token's digest (so that a mixed-up answer is noticed) and
the life it was written with (so that Redis's own clock tells its age).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult, ApprovalScope
from agent_gateway_store.models.columns import token_digest
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.accelerator import Accelerator

__all__ = ["Entries"]


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
        found = await self._redis.get(_key(token))
        if found is None:
            return None
        entry, left_ms = found
        try:
            result = _result(entry, token)
            age_s = (entry["life_ms"] - left_ms) / 1000
            is_ours = entry["token_sha256"] == token_digest(token) and org_id in (None, entry["org_id"])
        except (KeyError, TypeError, ValueError):
            return None
        if not is_ours or left_ms <= 0:
            return None
        return result if result.status.is_final or (0 <= age_s < self._trust_s and not _is_over(entry)) else None

    async def put(self, request: ApprovalRequest, token: str, *, life_s: float) -> None:
        """Write both entries for `life_s` seconds; an older version never replaces a newer one."""
        if life_s <= 0 or not self._redis.is_available:
            return
        entry = request.model_dump(mode="json", exclude={"token", "id"})
        entry |= {"token_sha256": token_digest(token), "life_ms": int(life_s * 1000)}
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
        await self._redis.delete(_key(token))


def _key(token: str) -> str:
    return f"approval:{token}"


def _id_key(approval_id: UUID) -> str:
    return f"approval-token:{approval_id}"


def _result(entry: dict[str, Any], token: str) -> ApprovalResult:
    return ApprovalResult.model_construct(
        approval_id=UUID(entry["approval_id"]),
        token=token,
        status=ApprovalStatus(entry["status"]),
        scope=ApprovalScope(entry["scope"]),
        approver_id=entry["approver_id"],
        note=entry["approver_note"],
        decided_at=_instant(entry["decision_at"]),
        expires_at=_instant(entry["expires_at"]),
    )


def _instant(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _is_over(entry: dict[str, Any]) -> bool:
    """True if a deadline may have passed: then the database's clock decides, not this one."""
    deadline = entry["expires_at"] if entry["status"] == "PENDING" else entry["use_before"] or entry["expires_at"]
    return datetime.fromisoformat(deadline) <= utc_now()
