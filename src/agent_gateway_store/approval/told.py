"""How an approval stood when SQL was read, as it is told beside SQL: in Redis entries and in pubsub.

What is told is validated as any input and belongs to one token. It releases nothing.
"""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from pydantic import AwareDatetime, ConfigDict, ValidationError

from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult, ApprovalScope
from agent_gateway_store.models.columns import token_digest
from agent_gateway_store.models.values import ApprovalStatus, FrozenModel

__all__ = ["Look", "Told", "believed", "news_of"]

_MAX_NEWS_BYTES = 8_000
_CLOCK_STEP_S = 0.01  # SQLite's clock counts milliseconds


class Told(FrozenModel):
    """What is read of an entry or of news."""

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
    read_at: AwareDatetime

    @property
    def deadline(self) -> datetime:
        """When a status that can still change ends by itself; then the database's clock decides."""
        return self.expires_at if self.status is ApprovalStatus.PENDING else self.use_before or self.expires_at

    def result(self, token: str) -> ApprovalResult:
        """Where the approval stands."""
        return ApprovalResult(
            approval_id=self.approval_id,
            token=token,
            status=self.status,
            scope=self.scope,
            approver_id=self.approver_id,
            note=self.approver_note,
            decided_at=self.decision_at,
            expires_at=self.expires_at,
        )


class Look(NamedTuple):
    """What a waiter saw in SQL.

    Attributes:
        result: How the approval stood.
        ahead_s: The database's clock less this process's monotonic one, in seconds; never less than it is.
    """

    result: ApprovalResult
    ahead_s: float

    @classmethod
    def at(cls, result: ApprovalResult, *, read_at: datetime, asked_at: float) -> Look:
        """Return what was seen when SQL was asked at `asked_at` (monotonic) and answered at `read_at` (its clock)."""
        return cls(result, read_at.timestamp() - asked_at)


def news_of(request: ApprovalRequest, *, token_sha256: str, read_at: datetime) -> str:
    """Return a decision as news for those who wait; empty if it is too long to be sent around."""
    told = {
        "approval_id": str(request.approval_id),
        "org_id": request.org_id,
        "status": request.status,
        "scope": request.scope,
        "approver_id": request.approver_id,
        "approver_note": request.approver_note,
        "decision_at": request.decision_at and request.decision_at.isoformat(),
        "expires_at": request.expires_at and request.expires_at.isoformat(),
        "use_before": request.use_before and request.use_before.isoformat(),
        "token_sha256": token_sha256,
        "read_at": read_at.isoformat(),
    }
    text = json.dumps(told, separators=(",", ":"))
    return text if len(text) <= _MAX_NEWS_BYTES else ""


def believed(news: str, token: str, look: Look, *, trust_s: float) -> ApprovalResult | None:
    """Return what `news` says of the approval of `token`; None if it is not to be trusted (then SQL must be asked).

    It must be about this approval and carry the digest of this very token, which nobody knows who may only publish. A
    status that can still change must have been read less than `trust_s` seconds ago: by the database's clock, as the
    waiter's own look tells what that clock says now at most.
    """
    try:
        told = Told.model_validate_json(news)
    except ValidationError:
        return None
    if told.status is ApprovalStatus.PENDING or told.approval_id != look.result.approval_id:
        return None
    if told.token_sha256 != token_digest(token):
        return None
    if not told.status.is_final:
        latest = look.ahead_s + time.monotonic()
        age_s = latest - told.read_at.timestamp()
        if not -_CLOCK_STEP_S <= age_s < trust_s or told.deadline.timestamp() <= latest:
            return None
    return told.result(token)
