"""Shipping events to sinks: how far each sink is, and which events it has refused."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Text, UniqueConstraint
from sqlmodel import Field

from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.audit import Instant
from agent_gateway_store.models.base import StoreModel
from agent_gateway_store.models.columns import BigKey, UtcDateTime

EVERY_ORG = ""
"""`org_id` of a sink that takes the events of all organisations: no organisation has an empty name."""


class AuditSink(StoreModel, table=True):
    """How far one sink is.

    Attributes:
        org_id: Whose events it takes; "": everybody's.
        cursor: Of `store.audit.changes`, behind the last event that it has acknowledged or refused.
        moved_at: When it was moved.
        last_error: Why the last attempt failed, if it did; holds no secret.
    """

    __tablename__ = "audit_sinks"

    sink: str = Field(sa_type=Text, primary_key=True)
    org_id: str = Field(default=EVERY_ORG, sa_type=Text, primary_key=True)
    cursor: str = Field(sa_type=Text)
    moved_at: Instant = Field(default_factory=utc_now, sa_type=UtcDateTime)
    last_error: str | None = Field(default=None, sa_type=Text)


class DeadLetter(StoreModel, table=True):
    """An event that a sink has refused for good. It is named and not copied, so that an erasure erases it, too.

    Attributes:
        org_id: As of its sink.
        event_id: Of the event, which may have been pruned since.
        error: What the sink said.
        is_due: True: redriven; the process that ships to the sink sends it again.
    """

    __tablename__ = "audit_dead_letters"
    __table_args__ = (UniqueConstraint("sink", "org_id", "event_id"),)

    id: int | None = Field(default=None, sa_type=BigKey(), primary_key=True)
    sink: str = Field(sa_type=Text)
    org_id: str = Field(default=EVERY_ORG, sa_type=Text)
    event_id: int = Field(sa_type=BigInteger)
    error: str = Field(sa_type=Text)
    is_due: bool = Field(default=False, sa_type=Boolean)
    created_at: Instant = Field(default_factory=utc_now, sa_type=UtcDateTime)
