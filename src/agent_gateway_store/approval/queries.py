"""Read one approval, by its token or its id, and what happened to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from itertools import accumulate
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Table, bindparam, select

from agent_gateway_store.approval.statements import READ, Key
from agent_gateway_store.errors import ApprovalNotFoundError
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult, ApprovalVote
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.models.base import UnreadableRow, repaired
from agent_gateway_store.models.columns import INVALID
from agent_gateway_store.models.delivery import NotificationDelivery
from agent_gateway_store.models.values import ApprovalStatus, PendingApproval
from agent_gateway_store.results import Page
from agent_gateway_store.storage.database import AnyConnection, Transactions
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.filters import uuid_of
from agent_gateway_store.storage.statements import Statement


def _rows_with(name: str, table: Table, at: str) -> Statement:
    is_it = table.c[name] == bindparam(f"p_{name}", type_=table.c[name].type)
    return Statement(select(table).where(is_it).order_by(table.c[at], table.c.id))


_VOTES = _rows_with("approval_id", ApprovalVote.__table__, "voted_at")
_NOTICES = _rows_with("approval_id", NotificationDelivery.__table__, "created_at")
_CALLS = [_rows_with(name, AuditEvent.__table__, "timestamp") for name in ("approval_id", "request_id")]
_HISTORY_COLUMNS = ("at", "event", "by", "status", "note", "channel")


class ApprovalRef(NamedTuple):
    """What names an approval, as seen from one organisation (None: from all): a statement's key and parameters."""

    by: Key
    values: Mapping[str, Any]

    @classmethod
    def by_token(cls, token: Any, org_id: str | None) -> ApprovalRef:
        """Name it by its token; ApprovalNotFoundError for what cannot be one."""
        if not isinstance(token, str) or not token:
            raise ApprovalNotFoundError
        return cls("token", {"p_token": token, "p_org_id": org_id})

    @classmethod
    def by_id(cls, approval_id: Any, org_id: str | None) -> ApprovalRef:
        """Name it by the handle that approvers see; ApprovalNotFoundError for what cannot be one."""
        try:
            found = uuid_of("approval_id", approval_id)
        except (ValueError, TypeError):
            raise ApprovalNotFoundError from None
        return cls("id", {"p_approval_id": found, "p_org_id": org_id})

    @classmethod
    def by_either(cls, token: str | None, approval_id: UUID | str | None, org_id: str | None) -> ApprovalRef:
        """Name it by the one of both that is given; TypeError if that is not one."""
        if (token is None) == (approval_id is None):
            raise TypeError("Name the approval either by its token or by approval_id.")
        return cls.by_id(approval_id, org_id) if token is None else cls.by_token(token, org_id)


class StoredApproval(NamedTuple):
    """An approval as the database had it at `read_at`, by its clock; detached, and without its token."""

    request: ApprovalRequest
    read_at: datetime
    token_sha256: str

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> StoredApproval:
        """Return what a row of `readable_columns` holds; UnreadableRowError if it cannot be read."""
        columns = {name: row[name] for name in ApprovalRequest.model_fields}
        return cls(ApprovalRequest.from_row(columns), row["read_at"], row["token_sha256"])

    @classmethod
    def repaired(cls, row: Mapping[str, Any]) -> StoredApproval:
        """Return the same with stand-ins and a word to whoever reads it, of a row that releases nothing from here."""
        if isinstance(row, UnreadableRow):
            return cls.from_row({**repaired(row), "risk_explanation": f"{INVALID}: {row.error}"})
        return cls.from_row(row)


ASKED = PendingApproval.model_fields.keys() - {"version"}
"""What approvers, notifiers and plugins are told of the call, under the names of an `ApprovalRequest`."""


def asked_of(request: ApprovalRequest) -> dict[str, Any]:
    """Return these values of a request."""
    return {name: getattr(request, name) for name in ASKED}


def result_of(stood: Any, token: str | None) -> ApprovalResult:
    """Return where an approval stands (an `ApprovalRequest` or its snapshot), with the token that the caller gave."""
    return ApprovalResult(
        approval_id=stood.approval_id,
        token=token,
        status=stood.status,
        scope=stood.scope,
        approver_id=stood.approver_id,
        note=stood.approver_note,
        decided_at=stood.decision_at,
        expires_at=stood.expires_at,
        used_at=stood.used_at,
        outcome=stood.outcome,
    )


async def read(
    connection: AnyConnection,
    ref: ApprovalRef,
    build: Callable[[Mapping[str, Any]], StoredApproval] = StoredApproval.from_row,
) -> StoredApproval:
    """Return the approval that `ref` names as a reader sees it.

    Raises:
        ApprovalNotFoundError: There is none.
        UnreadableRowError: It cannot be read.
    """
    row = await READ[ref.by].first(connection, ref.values)
    if row is None:
        raise ApprovalNotFoundError
    return build(row)


@retry_conflicts
async def get(transactions: Transactions, ref: ApprovalRef) -> StoredApproval:
    """Read an approval on a connection of its own; errors as of `read`."""
    async with transactions.connection("read") as connection:
        return await read(connection, ref)


async def get_result(transactions: Transactions, ref: ApprovalRef, token: str | None) -> ApprovalResult:
    """Return where the approval that `ref` names stands; errors as of `get`, `token` as of `result_of`."""
    return result_of((await get(transactions, ref)).request, token)


async def history(transactions: Transactions, ref: ApprovalRef) -> Page[dict[str, Any]]:
    """Return what happened to an approval, in the order of time.

    Raises:
        ApprovalNotFoundError: There is no such approval.
    """
    async with transactions.read() as connection:
        request = (await read(connection, ref, StoredApproval.repaired)).request
        of_this = {"p_approval_id": request.approval_id, "p_request_id": request.request_id}
        votes = list(map(repaired, await _VOTES.rows(connection, of_this)))
        deliveries = list(map(repaired, await _NOTICES.rows(connection, of_this)))
        # The call that asked, too: it may have ended before anybody decided. Two statements, since of an OR a planner
        # without statistics makes a look through all events of the organisation.
        calls = [row for each in _CALLS for row in map(repaired, await each.rows(connection, of_this))]
    events = {event["id"]: event for event in calls if event["org_id"] == request.org_id}
    rows = _steps_of(request, votes)
    # A decision is stamped microseconds before the vote that it follows from, so the order of the steps comes first.
    reached = list(accumulate((row["at"] for row in rows), max))
    for event in events.values():
        reached.append(event["timestamp"])
        ended, note = event["execution_status"] or event["decision"], f"request {event['request_id']}"
        rows.append(_step(reached[-1], "call", by=event["caller_id"], status=ended, note=note))
    for delivery in deliveries:
        reached.append(delivery["delivered_at"] or delivery["created_at"])
        note = delivery["last_error"] or f"{delivery['event']}, {delivery['attempts']} attempts"
        rows.append(_step(reached[-1], "notice", by=delivery["notifier"], status=delivery["status"], note=note))
    order = sorted(range(len(rows)), key=reached.__getitem__)
    return Page((rows[index] for index in order), columns=_HISTORY_COLUMNS)


def _steps_of(request: ApprovalRequest, votes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [_step(request.created_at, "asked", by=request.caller_id, note=request.risk_explanation)]
    rows += [
        _step(vote["voted_at"], "vote", vote["approver_id"], vote["decision"], vote["note"], vote["channel"])
        for vote in votes
    ]
    if request.decision_at is not None:
        is_refusal = request.status in (ApprovalStatus.DENIED, ApprovalStatus.CANCELLED)
        decided = request.status if is_refusal else ApprovalStatus.APPROVED
        rows.append(_step(request.decision_at, "decided", request.approver_id, decided, request.approver_note))
    if request.status is ApprovalStatus.EXPIRED:
        is_approved = request.decision_at is not None
        ended = (request.use_before if is_approved else None) or request.expires_at
        rows.append(_step(ended or request.created_at, "expired", status=ApprovalStatus.EXPIRED))
    if request.used_at is not None:
        rows.append(_step(request.used_at, "used", by=request.caller_id, status=ApprovalStatus.USED))
        rows.append(_step(request.used_at, "outcome", note=request.outcome or "unknown"))
    return rows


def _step(
    at: datetime, event: str, by: str | None = None, status: Any = None, note: str = "", channel: str | None = None
) -> dict[str, Any]:
    shown = None if status is None else str(status)
    return {"at": at, "event": event, "by": by, "status": shown, "note": note, "channel": channel}
