"""What keeps events, and what became of the runs that pruned them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Text
from sqlmodel import Field

from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.audit import Instant, JsonObject
from agent_gateway_store.models.base import StoreModel
from agent_gateway_store.models.columns import BigKey, Json, UtcDateTime
from agent_gateway_store.models.evidence import Finding
from agent_gateway_store.models.values import FrozenModel


class AuditHold(StoreModel, table=True):
    """Events that may be neither pruned nor erased, until the hold is released; then its row is deleted.

    Attributes:
        name: By which it is released.
        filters: As `search` takes them; times are instants.
    """

    __tablename__ = "audit_holds"

    name: str = Field(sa_type=Text, primary_key=True)
    reason: str = Field(sa_type=Text)
    placed_by: str = Field(sa_type=Text)
    placed_at: Instant = Field(default_factory=utc_now, sa_type=UtcDateTime)
    filters: JsonObject = Field(sa_type=Json())


class AuditPrune(StoreModel, table=True):
    """One run of a prune.

    Attributes:
        ended_at: None: it is at work, or it was killed.
        archive: The folder; None: the events were discarded.
        result: How it ended, for people; None as `ended_at`.
        last_event_id: The highest id of an event that it took away. Followers behind it would miss events.
        last_transaction_id: The highest transaction id of one, on PostgreSQL; None after `db restored`.
    """

    __tablename__ = "audit_prunes"
    __table_args__ = (CheckConstraint("events >= 0", name="events"),)

    id: int | None = Field(default=None, sa_type=BigKey(), primary_key=True)
    started_at: Instant = Field(default_factory=utc_now, sa_type=UtcDateTime)
    ended_at: Instant | None = Field(default=None, sa_type=UtcDateTime)
    pruned_by: str = Field(sa_type=Text)
    pruned_before: Instant = Field(sa_type=UtcDateTime)
    archive: str | None = Field(default=None, sa_type=Text)
    events: int = Field(default=0, sa_type=BigInteger)
    result: str | None = Field(default=None, sa_type=Text)
    last_event_id: int | None = Field(default=None, sa_type=BigInteger)
    last_transaction_id: int | None = Field(default=None, sa_type=BigInteger)


class Hold(FrozenModel):
    """A hold that is in force.

    Attributes:
        name: By which it is released.
        filters: What it covers, also of events that arrive later.
        by: Who placed it.
    """

    name: str
    reason: str
    by: str
    placed_at: datetime
    filters: dict[str, Any]


class Pruned(FrozenModel):
    """What a prune did.

    Attributes:
        events: How many events left the table.
        files: How many files were written.
        held: How many events are as old, and stay because of a hold.
        remaining: How many could still be pruned: more than 0 where the time was up.
    """

    events: int = 0
    files: int = 0
    held: int = 0
    remaining: int = 0


class PrunedApprovals(FrozenModel):
    """What was pruned of approvals.

    Attributes:
        approvals: How many approvals, with their votes.
        notices: How many delivered notices about them.
        files: How many files were written.
    """

    approvals: int = 0
    notices: int = 0
    files: int = 0

    def __add__(self, other: PrunedApprovals) -> PrunedApprovals:
        """Return what both pruned."""
        return PrunedApprovals(
            approvals=self.approvals + other.approvals,
            notices=self.notices + other.notices,
            files=self.files + other.files,
        )


class Erased(FrozenModel):
    """What was erased.

    Attributes:
        request_id: Under which the blanked event stands; another one than was given, where that held a hash.
        position: Of the event in the log.
        archived: Whether the event was in the archive.
        approvals: How many approvals of the request were blanked.
        notices: How many notices about them.
    """

    request_id: str
    org_id: str
    position: int
    archived: bool = False
    approvals: int = 0
    notices: int = 0


class ArchiveVerification(FrozenModel):
    """What was found in an archive.

    Attributes:
        ok: True if nothing was found that does not fit.
        files: How many files are what was written.
        events: How many events were recomputed from their columns and fit their leaf.
        erased: How many were erased: only the log can vouch for what is left of those.
        findings: What does not fit.
        remarks: What a killed run has left, for people.
    """

    ok: bool
    files: int = 0
    events: int = 0
    erased: int = 0
    findings: tuple[Finding, ...] = ()
    remarks: tuple[str, ...] = ()


class FoundRecord(FrozenModel):
    """One thing that an erasure request is about.

    Attributes:
        kind: What it is; `erase` takes its request_id either way.
        file: The file of the archive; None: it is in the table.
    """

    kind: Literal["event", "approval"]
    request_id: str
    org_id: str
    caller_id: str
    timestamp: datetime
    tool_name: str
    approval_id: UUID | None = None
    file: str | None = None
