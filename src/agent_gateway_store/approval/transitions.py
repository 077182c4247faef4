"""The life of an approval in SQL: one table of legal moves, and each move one guarded UPDATE.

The WHERE holds the standing status, the deadline by the database's clock and the organisation, so that the database
picks the winner of a race. EXPIRED is derived when a row is read; only the sweep writes it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Select, Text, and_, case, func, literal_column, or_, select, type_coerce, update
from sqlalchemy.sql.dml import ReturningUpdate

from agent_gateway_store.models.approval import ApprovalRequest, ApprovalVote
from agent_gateway_store.models.columns import EnumText, UtcDateTime
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.database import db_now

__all__ = [
    "ASIDE",
    "LEGAL_MOVES",
    "alive",
    "expire",
    "move",
    "named",
    "note_outcome",
    "overdue",
    "read",
    "requests",
    "returned",
    "seen_status",
    "votes",
]

requests = ApprovalRequest.__table__  # type: ignore[attr-defined]
votes = ApprovalVote.__table__  # type: ignore[attr-defined]

_PENDING, _APPROVED = ApprovalStatus.PENDING, ApprovalStatus.APPROVED

LEGAL_MOVES: dict[ApprovalStatus, frozenset[ApprovalStatus]] = {
    _PENDING: frozenset({_APPROVED, ApprovalStatus.DENIED, ApprovalStatus.EXPIRED, ApprovalStatus.CANCELLED}),
    _APPROVED: frozenset({ApprovalStatus.USED, ApprovalStatus.EXPIRED, ApprovalStatus.CANCELLED}),
}


def _deadline(status: ApprovalStatus) -> ColumnElement[datetime]:
    if status is _PENDING:
        return requests.c.expires_at  # type: ignore[no-any-return]
    return func.coalesce(requests.c.use_before, requests.c.expires_at, type_=UtcDateTime())


def alive(status: ApprovalStatus) -> ColumnElement[bool]:
    """The condition "stands at `status`, and its deadline has not passed"."""
    return and_(requests.c.status == status, _deadline(status) > db_now())


def overdue() -> ColumnElement[bool]:
    """The condition "could still move, but its deadline has passed"."""
    return or_(*(and_(requests.c.status == status, _deadline(status) <= db_now()) for status in LEGAL_MOVES))


def seen_status() -> ColumnElement[Any]:
    """The status as a reader sees it: EXPIRED once the deadline has passed."""
    return type_coerce(
        case((overdue(), literal_column("'EXPIRED'")), else_=requests.c.status), EnumText(ApprovalStatus)
    )


ASIDE = ("read_at", "token_sha256")
"""What a row holds beside the columns: the database's time, and the digest that the column `token` does not show."""


def _aside() -> tuple[ColumnElement[Any], ...]:
    return db_now().label("read_at"), type_coerce(requests.c.token, Text).label("token_sha256")


def named(token: str | None, approval_id: UUID | None, org_id: str | None) -> ColumnElement[bool]:
    """The condition "is the approval of this token or id", seen from an organisation (None: from all)."""
    key = requests.c.approval_id == approval_id if token is None else requests.c.token == token
    return key if org_id is None else and_(key, requests.c.org_id == org_id)


def read(*conditions: ColumnElement[bool]) -> Select[Any]:
    """Select approvals as a reader sees them, with what stands `ASIDE`."""
    columns = (column for column in requests.c if column.name != "status")
    return select(*columns, seen_status().label("status"), *_aside()).where(*conditions)


def returned() -> tuple[ColumnElement[Any], ...]:
    """What a write returns: the row, with what stands `ASIDE`."""
    return (*requests.c, *_aside())


def move(
    sources: tuple[ApprovalStatus, ...], target: ApprovalStatus, *conditions: ColumnElement[bool], **values: Any
) -> ReturningUpdate[Any]:
    """Update approvals from one of `sources` to `target`, if still there and in time; return the rows that moved.

    Moving to the source itself takes the row, so that of two voters one waits for the other.
    """
    for source in sources:
        if target is not source and target not in LEGAL_MOVES[source]:
            raise AssertionError(f"{source} to {target} is no legal move")
    return (
        update(requests)
        .where(or_(*map(alive, sources)), *conditions)
        .values(status=target, version=requests.c.version + 1, **values)
        .returning(*returned())
    )


def expire(*conditions: ColumnElement[bool]) -> ReturningUpdate[Any]:
    """Update what is overdue to EXPIRED; return the rows."""
    return (
        update(requests)
        .where(overdue(), *conditions)
        .values(status=ApprovalStatus.EXPIRED, version=requests.c.version + 1)
        .returning(*returned())
    )


def note_outcome(key: ColumnElement[bool], outcome: str) -> ReturningUpdate[Any]:
    """Note what came of a used approval, unless that was done before; return the row."""
    return (
        update(requests)
        .where(key, requests.c.status == ApprovalStatus.USED, requests.c.outcome.is_(None))
        .values(outcome=outcome, version=requests.c.version + 1)
        .returning(*returned())
    )
