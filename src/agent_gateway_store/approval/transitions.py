"""The life of an approval in SQL: one table of legal moves, and each move one guarded UPDATE.

The WHERE holds the standing status, the deadline by the database's clock and the organisation, so that the database
picks the winner of a race. EXPIRED is derived when a row is read; only the sweep writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeAlias

from sqlalchemy import ColumnElement, Select, Text, and_, case, func, literal_column, or_, select, type_coerce, update
from sqlalchemy.sql.dml import ReturningUpdate

from agent_gateway_store.models.approval import ApprovalRequest, ApprovalVote
from agent_gateway_store.models.columns import EnumText, UtcDateTime
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.db_clock import db_now

__all__ = [
    "ASIDE",
    "LEGAL_MOVES",
    "Now",
    "alive",
    "expire",
    "move",
    "overdue",
    "read",
    "requests",
    "returned",
    "seen",
    "seen_status",
    "votes",
]

Now: TypeAlias = Callable[[], ColumnElement[datetime]]
"""Which spelling of the database's clock a statement uses: `db_now`, or `db_now` where it is written once."""

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


def alive(status: ApprovalStatus, now: Now = db_now) -> ColumnElement[bool]:
    """The condition "stands at `status`, and its deadline has not passed"."""
    return and_(requests.c.status == literal_column(f"'{status}'"), _deadline(status) > now())


def overdue(now: Now = db_now) -> ColumnElement[bool]:
    """The condition "could still move, but its deadline has passed"."""
    return or_(
        *(
            and_(requests.c.status == literal_column(f"'{status}'"), _deadline(status) <= now())
            for status in LEGAL_MOVES
        )
    )


def seen_status(now: Now = db_now) -> ColumnElement[Any]:
    """The status as a reader sees it: EXPIRED once the deadline has passed."""
    return type_coerce(
        case((overdue(now), literal_column("'EXPIRED'")), else_=requests.c.status), EnumText(ApprovalStatus)
    )


ASIDE = ("read_at", "token_sha256")
"""What a row holds beside the columns: the database's time, and the digest that the column `token` does not show."""


def _aside(now: Now) -> tuple[ColumnElement[Any], ...]:
    return now().label("read_at"), type_coerce(requests.c.token, Text).label("token_sha256")


def seen(now: Now = db_now) -> tuple[ColumnElement[Any], ...]:
    """What a reader sees of an approval, with what stands `ASIDE`."""
    columns = (column for column in requests.c if column.name != "status")
    return (*columns, seen_status(now).label("status"), *_aside(now))


def read(*conditions: ColumnElement[bool], now: Now = db_now) -> Select[Any]:
    """Select approvals as a reader sees them."""
    return select(*seen(now)).where(*conditions)


def returned(now: Now = db_now) -> tuple[ColumnElement[Any], ...]:
    """What a write returns: the row, with what stands `ASIDE`."""
    return (*requests.c, *_aside(now))


def move(
    sources: tuple[ApprovalStatus, ...],
    target: ApprovalStatus,
    *conditions: ColumnElement[bool],
    now: Now = db_now,
    **values: Any,
) -> ReturningUpdate[Any]:
    """Update approvals from one of `sources` to `target`, if still there and in time; return the rows that moved.

    Moving to the source itself takes the row, so that of two voters one waits for the other.
    """
    for source in sources:
        if target is not source and target not in LEGAL_MOVES[source]:
            raise AssertionError(f"{source} to {target} is no legal move")
    return (
        update(requests)
        .where(or_(*(alive(source, now) for source in sources)), *conditions)
        .values(status=literal_column(f"'{target}'"), version=requests.c.version + literal_column("1"), **values)
        .returning(*returned(now))
    )


def expire(*conditions: ColumnElement[bool], now: Now = db_now) -> ReturningUpdate[Any]:
    """Update what is overdue to EXPIRED; return the rows."""
    return (
        update(requests)
        .where(overdue(now), *conditions)
        .values(status=literal_column("'EXPIRED'"), version=requests.c.version + literal_column("1"))
        .returning(*returned(now))
    )
