"""The rows of the outbox: one for each notifier, written in the transaction that makes the change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol
from uuid import UUID, uuid4

from sqlalchemy import Float, Integer, Text, Uuid
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.types import TypeEngine

from agent_gateway_store.approval.queries import StoredApproval
from agent_gateway_store.approval.statements import INSERT, INSERT_SQL, fragments, sql_statement
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.models.columns import Json
from agent_gateway_store.models.delivery import NotificationDelivery
from agent_gateway_store.models.values import ApprovalStatus, Notice
from agent_gateway_store.storage.database import AnyConnection, dialect_of
from agent_gateway_store.storage.db_clock import clock_sql
from agent_gateway_store.storage.rows import RowsParameter

_deliveries = NotificationDelivery.__table__  # type: ignore[attr-defined]
_PENDING = ApprovalStatus.PENDING
_PLACEHOLDER = UUID(int=0)
_LEASE_END = {dialect: clock_sql(dialect, plus=":p_lease_s") for dialect in ("sqlite", "postgresql")}


class Outbox(Protocol):
    """Which notifiers receive notices, and who sends them."""

    @property
    def notifiers(self) -> Sequence[str]:
        """Names of the notifiers that get a row each."""
        ...

    @property
    def lease_s(self) -> float | None:
        """For how many seconds a new row is leased to this process; None: any worker may send it at once."""
        ...

    def send(self, notice: Notice, leased: Mapping[str, UUID]) -> None:
        """Take a notice whose rows are committed.

        Args:
            notice: Without a `delivery_id` that means anything.
            leased: Notifier to delivery id, of the rows leased to this process.
        """
        ...


class PersistOnlyOutbox:
    """An outbox whose rows are sent by a worker somewhere else."""

    lease_s = None

    def __init__(self, notifiers: Iterable[str]) -> None:
        self.notifiers = tuple(notifiers)

    def send(self, notice: Notice, leased: Mapping[str, UUID]) -> None:
        """Leave it to the worker."""


# PostgreSQL alone: SQLite has no INSERT within a WITH. Times are written out in UTC, for the JSON of a timestamp is in
# the time zone of the session.
_INSERT_WITH_DELIVERIES = sql_statement(
    """
    WITH asked AS ({insert}
    ), written AS (
        INSERT INTO notification_deliveries (
            delivery_id, org_id, approval_id, notifier, event, payload, status, attempts, next_attempt_at, created_at
        )
        SELECT
            recipient.delivery_id, asked.org_id, asked.approval_id, recipient.notifier, 'pending',
            :p_notice || jsonb_build_object(
                'created_at', to_char(asked.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
                'expires_at', to_char(asked.expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
                'delivery_id', recipient.delivery_id
            ),
            'DUE',
            CASE WHEN :p_lease_s IS NULL THEN 0 ELSE 1 END,
            CASE WHEN :p_lease_s IS NULL THEN {now} ELSE {lease_end} END,
            {now}
        FROM asked CROSS JOIN unnest(:p_notifiers, :p_delivery_ids) AS recipient(notifier, delivery_id)
    )
    SELECT * FROM asked
    """,
    types={
        "p_delivery_ids": ARRAY(Uuid()),
        "p_lease_s": Float(53),
        "p_notice": JSONB(),
        "p_notifiers": ARRAY(Text()),
    },
    insert={dialect: INSERT_SQL.format_map(fragments(dialect)) for dialect in _LEASE_END},
    lease_end=_LEASE_END,
)

_FIELDS: dict[str, TypeEngine[Any]] = {
    "delivery_id": Uuid(),
    "org_id": Text(),
    "approval_id": Uuid(),
    "notifier": Text(),
    "event": Text(),
    "payload": Text(),
}
_NOTICES = RowsParameter("notices", _FIELDS)

# A notice that waits for an earlier one about the same approval is sent by the process that delivers that one, so it is
# not leased. Materialized, so that each row looks back once and not once for each use of the answer. `|| ''` keeps the
# planner from the index over status and notifier, which may hold a whole backlog; the one over approval_id finds a few
# rows. LIMIT and OFFSET keep it from a join, for which it would read the whole table.
_ENQUEUE = sql_statement(
    """
    WITH notices AS MATERIALIZED (
        SELECT given.*, :p_lease_s IS NOT NULL AND NOT EXISTS (
            SELECT 1 FROM notification_deliveries AS before
            WHERE before.approval_id = given.approval_id
                AND before.notifier || '' = given.notifier
                AND before.status || '' = 'DUE'
            LIMIT 1 OFFSET 0
        ) AS is_leased
        FROM {given} AS given
    )
    INSERT INTO notification_deliveries (
        delivery_id, org_id, approval_id, notifier, event, payload, status, attempts, next_attempt_at, created_at
    )
    SELECT
        delivery_id, org_id, approval_id, notifier, event, {payload}, 'DUE',
        CASE WHEN is_leased THEN 1 ELSE 0 END,
        CASE WHEN is_leased THEN {lease_end} ELSE {now} END,
        {now}
    FROM notices
    RETURNING delivery_id, attempts
    """,
    (_deliveries.c.delivery_id, _deliveries.c.attempts),
    types={
        **{f"p_notices_{name}": ARRAY(kind) for name, kind in _FIELDS.items()},
        "p_lease_s": Float(53),
        "p_notices": Json(),
    },
    lease_end=_LEASE_END,
    payload={"postgresql": "CAST(payload AS JSONB)", "sqlite": "payload"},
    given={dialect: _NOTICES.sql(dialect) for dialect in _LEASE_END},
)


_DELETE_UNSENT = sql_statement(
    """
    DELETE FROM notification_deliveries
    WHERE approval_id = :p_approval_id AND event = 'pending' AND status || '' = 'DUE' AND attempts <= :p_attempts
    RETURNING id
    """,
    (_deliveries.c.id,),
    types={"p_attempts": Integer()},
)
_FIRST_SENT = sql_statement(
    "SELECT id FROM notification_deliveries WHERE approval_id = :p_approval_id AND event = 'pending' LIMIT 1",
    (_deliveries.c.id,),
)


async def take_back(connection: AnyConnection, approval: StoredApproval, *, is_leased: bool) -> bool:
    """Delete the rows by which notifiers would learn that an approval waits; does not commit.

    Args:
        connection: In a transaction.
        approval: Which one.
        is_leased: Its rows are leased to this process, which sends them only after the caller has its answer.

    Returns:
        True if a row is left: it was sent, or is being sent.
    """
    values = {"p_approval_id": approval.request.approval_id, "p_attempts": int(is_leased)}
    await _DELETE_UNSENT.rows(connection, values)
    return await _FIRST_SENT.first(connection, values) is not None


async def insert_with_deliveries(
    connection: AnyConnection, values: Mapping[str, Any], outbox: Outbox
) -> tuple[Mapping[str, Any] | None, dict[str, UUID]]:
    """Insert an approval and the rows of its notice; in one statement on PostgreSQL.

    Args:
        connection: In a transaction, unless one statement is enough.
        values: As `issue_values` gives them.
        outbox: Which notifiers receive it.

    Returns:
        The approval, or None if it stands already, and then nothing is written; notifier to delivery id of the rows
        leased to this process.
    """
    delivery_ids = {name: uuid4() for name in outbox.notifiers}
    if not delivery_ids:
        return await INSERT.first(connection, values), {}
    notice = _pending_notice(values)
    if dialect_of(connection) == "postgresql":
        given = {
            **values,
            "p_notifiers": list(delivery_ids),
            "p_delivery_ids": list(delivery_ids.values()),
            "p_notice": notice.model_dump(mode="json", exclude={"created_at", "expires_at", "delivery_id"}),
            "p_lease_s": outbox.lease_s,
        }
        row = await _INSERT_WITH_DELIVERIES.first(connection, given)
    else:
        row = await INSERT.first(connection, values)
        if row is not None:
            asked = notice.model_copy(update={"created_at": row["created_at"], "expires_at": row["expires_at"]})
            await _write(connection, [(asked, delivery_ids)], outbox.lease_s)
    return row, delivery_ids if row is not None and outbox.lease_s is not None else {}


def _pending_notice(values: Mapping[str, Any]) -> Notice:
    return Notice(
        event="pending",
        delivery_id=_PLACEHOLDER,
        approval_id=values["p_approval_id"],
        org_id=values["p_org_id"],
        request_id=values["p_request_id"],
        caller_id=values["p_caller_id"],
        tool_call=values["p_tool_call"],
        risk_explanation=values["p_risk_explanation"],
        status=_PENDING,
    )


def notice_of(request: ApprovalRequest, event: Literal["pending", "decision"]) -> Notice:
    """Return the notice about `request` as it stands: no token, and only the sanitised arguments."""
    return Notice(
        event=event,
        delivery_id=uuid4(),
        approval_id=request.approval_id,
        org_id=request.org_id,
        request_id=request.request_id,
        caller_id=request.caller_id,
        tool_call=request.tool_call,
        risk_explanation=request.risk_explanation,
        created_at=request.created_at,
        expires_at=request.expires_at,
        status=request.status,
        approver_id=request.approver_id,
        note=request.approver_note,
        decided_at=request.decision_at,
    )


class Change(NamedTuple):
    """A change that its transaction writes.

    Attributes:
        approval: As it then stands.
        notice: What notifiers receive; None of a vote that decides nothing.
        leased: Notifier to delivery id, of the rows leased to this process.
    """

    approval: StoredApproval
    notice: Notice | None
    leased: Mapping[str, UUID]


async def enqueue(connection: AnyConnection, approvals: Sequence[StoredApproval], outbox: Outbox) -> list[Change]:
    """Write the rows of the notices of decided approvals; does not commit."""
    notices = [notice_of(each.request, "decision") for each in approvals if each.request.status is not _PENDING]
    addressed = [(notice, {name: uuid4() for name in outbox.notifiers}) for notice in notices]
    leased = await _write(connection, addressed, outbox.lease_s) if addressed and outbox.notifiers else frozenset()
    ids = {
        notice.approval_id: (notice, {name: each for name, each in ids.items() if each in leased})
        for notice, ids in addressed
    }
    return [Change(each, *ids.get(each.request.approval_id, (None, {}))) for each in approvals]


async def _write(
    connection: AnyConnection, addressed: Sequence[tuple[Notice, Mapping[str, UUID]]], lease_s: float | None
) -> frozenset[UUID]:
    rows = [
        {
            "delivery_id": delivery_id,
            "org_id": notice.org_id,
            "approval_id": notice.approval_id,
            "notifier": name,
            "event": notice.event,
            "payload": notice.model_copy(update={"delivery_id": delivery_id}).model_dump_json(),
        }
        for notice, ids in addressed
        for name, delivery_id in ids.items()
    ]
    given = _NOTICES.values(dialect_of(connection), rows)
    written = await _ENQUEUE.rows(connection, {**given, "p_lease_s": lease_s})
    return frozenset(row["delivery_id"] for row in written if row["attempts"])
