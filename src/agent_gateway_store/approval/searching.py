"""Find approvals by what they are about, and tell the story of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from itertools import accumulate
from typing import Any, TypedDict
from uuid import UUID

from sqlalchemy import JSON, ColumnElement, or_, select, type_coerce
from sqlalchemy.dialects.postgresql import JSONB

from agent_gateway_store.approval.transitions import requests, seen_status, votes
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.models.delivery import NotificationDelivery
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.results import Page
from agent_gateway_store.storage.database import SqlConnection
from agent_gateway_store.storage.filters import (
    Moment,
    OneOrMore,
    check_filters,
    identifier,
    instant,
    one_or_many,
    pattern,
    word,
)
from agent_gateway_store.storage.pagination import listing_fingerprint

__all__ = ["ApprovalFilters", "history", "narrowed"]

_deliveries = NotificationDelivery.__table__  # type: ignore[attr-defined]
_STORY = ("at", "event", "by", "status", "note", "channel")


class ApprovalFilters(TypedDict, total=False):
    """What a search for approvals can be narrowed by; None does not narrow.

    Several filters must all match. Where a filter takes several values, any of them may match.

    Attributes:
        tool: Name of the tool.
        server: Name of the server.
        status: As a reader sees it: EXPIRED from the deadline on.
        approver_id: Who decided.
        since: Asked from this time on.
        until: Asked before this time.
        text: Stands in the tool's name, the risk explanation or the approver's note, in upper or lower case (letters
            beyond ASCII match as the database's locale folds them; SQLite folds none).
    """

    caller_id: OneOrMore | None
    request_id: OneOrMore | None
    org_id: OneOrMore | None
    tool: OneOrMore | None
    server: OneOrMore | None
    status: OneOrMore | None
    approver_id: OneOrMore | None
    since: Moment | None
    until: Moment | None
    text: str | None


def narrowed(filters: Mapping[str, Any], dialect: str, org_id: str | None) -> tuple[list[ColumnElement[bool]], bytes]:
    """Return what must hold of an approval, and what binds a cursor to these filters.

    Raises:
        TypeError: There is no such filter, or its value has the wrong type.
        ValueError: There is no such status or time.
    """
    found: list[ColumnElement[bool]] = []
    spelt: dict[str, Any] = {}
    for name, value, spelling in check_filters(filters, _CHECKS):
        spelt[name] = spelling
        found.append(_condition(name, value, dialect))
    return found, listing_fingerprint("approvals", org_id, spelt)


def _condition(name: str, value: Any, dialect: str) -> ColumnElement[bool]:
    if name == "since":
        return requests.c.created_at >= value  # type: ignore[no-any-return]
    if name == "until":
        return requests.c.created_at < value  # type: ignore[no-any-return]
    # The type of the column would take a whole tool call.
    call = type_coerce(requests.c.tool_call, JSONB() if dialect == "postgresql" else JSON())
    if name == "text":
        places = (call["tool"].as_string(), requests.c.risk_explanation, requests.c.approver_note)
        like = "ilike" if dialect == "postgresql" else "like"
        return or_(*(getattr(place, like)(value, escape="\\") for place in places))
    column = {"tool": call["tool"].as_string(), "server": call["server"].as_string(), "status": seen_status()}.get(name)
    if column is None:
        column = requests.c[name]
    return column.in_(value) if isinstance(value, list) else column == value  # type: ignore[no-any-return]


async def history(connection: SqlConnection, request: ApprovalRequest) -> Page[dict[str, Any]]:
    """Return what happened to an approval, in the order of time.

    Args:
        connection: Where to read.
        request: The approval as a reader sees it.
    """
    rows: list[dict[str, Any]] = [
        _step(request.created_at, "asked", by=request.caller_id, note=request.risk_explanation)
    ]
    cast = await _rows(connection, votes, votes.c.voted_at, request.approval_id)
    rows += [
        _step(vote["voted_at"], "vote", vote["approver_id"], vote["decision"], vote["note"], vote["channel"])
        for vote in cast
    ]
    if request.decision_at is not None:
        decided = "DENIED" if request.status is ApprovalStatus.DENIED else _DECIDED.get(request.status, "APPROVED")
        rows.append(_step(request.decision_at, "decided", request.approver_id, decided, request.approver_note))
    if request.status is ApprovalStatus.EXPIRED:
        approved = request.decision_at is not None
        ended = (request.use_before if approved else None) or request.expires_at
        rows.append(_step(ended or request.created_at, "expired", status=ApprovalStatus.EXPIRED))
    if request.used_at is not None:
        rows.append(_step(request.used_at, "used", by=request.caller_id, status=ApprovalStatus.USED))
        rows.append(_step(request.used_at, "outcome", note=request.outcome or "unknown"))
    # A decision is stamped microseconds before the vote that it follows from, so the story's own order comes first.
    reached = list(accumulate((row["at"] for row in rows), max))
    for delivery in await _rows(connection, _deliveries, _deliveries.c.created_at, request.approval_id):
        reached.append(delivery["delivered_at"] or delivery["created_at"])
        rows.append(
            _step(
                reached[-1],
                "notice",
                by=delivery["notifier"],
                status=delivery["status"],
                note=delivery["last_error"] or f"{delivery['event']}, {delivery['attempts']} attempts",
            )
        )
    order = sorted(range(len(rows)), key=reached.__getitem__)
    return Page((rows[index] for index in order), columns=_STORY)


_DECIDED = {ApprovalStatus.CANCELLED: "CANCELLED"}


async def _rows(connection: SqlConnection, table: Any, at: Any, approval_id: UUID) -> list[Mapping[str, Any]]:
    statement = select(table).where(table.c.approval_id == approval_id).order_by(at, table.c.id)
    return [dict(row) for row in (await connection.execute(statement)).mappings().all()]


def _step(
    at: datetime, event: str, by: str | None = None, status: Any = None, note: str = "", channel: str | None = None
) -> dict[str, Any]:
    told = None if status is None else str(status)
    return {"at": at, "event": event, "by": by, "status": told, "note": note, "channel": channel}


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **{
        name: partial(one_or_many, identifier)
        for name in ("caller_id", "request_id", "org_id", "tool", "server", "approver_id")
    },
    "status": partial(one_or_many, partial(word, ApprovalStatus)),
    "since": instant,
    "until": instant,
    "text": pattern,
}
