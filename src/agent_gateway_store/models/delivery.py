"""The outbox: one row for each notice to each notifier."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from pydantic import NonNegativeInt
from sqlalchemy import CheckConstraint, Index, Integer, Text, UniqueConstraint, Uuid, text
from sqlmodel import Field

from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.audit import Instant
from agent_gateway_store.models.base import StoreModel, index_where
from agent_gateway_store.models.columns import BigKey, EnumText, Json, UtcDateTime


class NoticeEvent(StrEnum):
    """Why a notice is sent: an approval waits for a decision, or does not wait any more."""

    PENDING = "pending"
    DECISION = "decision"


class DeliveryStatus(StrEnum):
    """DUE: attempted (again) from `next_attempt_at` on. DEAD: a dead letter, which can be redriven."""

    DUE = "DUE"
    DELIVERED = "DELIVERED"
    DEAD = "DEAD"


class Leased(NamedTuple):
    """The rows of one notice that are leased to this process.

    Attributes:
        ids: Notifier to delivery id.
        since: When the lease began at the earliest, by `time.monotonic()`: before the statement was sent, for the
            database counts from there, and a commit may take long.
    """

    ids: Mapping[str, UUID]
    since: float


class NotificationDelivery(StoreModel, table=True):
    """One notice on its way to one notifier. Delivered at least once, always under the same `delivery_id`.

    Attributes:
        payload: The `Notice` as JSON.
        attempts: How many attempts were made.
        last_error: The error of the last attempt; holds no secret.
    """

    __tablename__ = "notification_deliveries"
    __table_args__ = (
        UniqueConstraint("delivery_id"),
        CheckConstraint("event IN ('pending', 'decision')", name="event"),
        CheckConstraint("status IN ('DUE', 'DELIVERED', 'DEAD')", name="status"),
        CheckConstraint("attempts >= 0", name="attempts"),
        # The claim of due rows: of every notifier, and of one.
        Index(None, "status", "next_attempt_at", "id"),
        Index(None, "status", "notifier", "next_attempt_at", "id"),
        Index(None, "approval_id"),
        # What is pruned.
        index_where(text("status = 'DELIVERED'"), "delivered_at"),
        Index(None, "org_id", "created_at", "id"),
    )

    id: int | None = Field(default=None, sa_type=BigKey(), primary_key=True)
    delivery_id: UUID = Field(default_factory=uuid4, sa_type=Uuid)
    org_id: str = Field(default="default", sa_type=Text)
    approval_id: UUID = Field(sa_type=Uuid)
    notifier: str = Field(sa_type=Text)
    event: NoticeEvent = Field(sa_type=EnumText(NoticeEvent))
    payload: dict[str, Any] = Field(sa_type=Json())
    status: DeliveryStatus = Field(default=DeliveryStatus.DUE, sa_type=EnumText(DeliveryStatus))
    attempts: NonNegativeInt = Field(default=0, sa_type=Integer)
    next_attempt_at: Instant = Field(default_factory=utc_now, sa_type=UtcDateTime)
    last_error: str | None = Field(default=None, sa_type=Text)
    created_at: Instant = Field(default_factory=utc_now, sa_type=UtcDateTime)
    delivered_at: Instant | None = Field(default=None, sa_type=UtcDateTime)
