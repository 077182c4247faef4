"""The rows of the outbox: one for each notifier, written in the transaction that makes the change."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, Protocol
from uuid import UUID, uuid4

from sqlalchemy import Float, Text, Uuid, column
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.exc import IntegrityError
from sqlalchemy.types import TypeEngine

from agent_gateway_store.approval.queries import ASKED, StoredApproval, asked_of
from agent_gateway_store.approval.statements import (
    APPROVE_SQL,
    CANCEL_SQL,
    DENY_SQL,
    INSERT,
    INSERT_SQL,
    REFS,
    VOTES_SQL,
    Key,
    readable_columns,
    sql_statement,
)
from agent_gateway_store.models.approval import ApprovalRequest, VoteDecision
from agent_gateway_store.models.columns import UTC_MAX
from agent_gateway_store.models.delivery import Leased, NotificationDelivery
from agent_gateway_store.models.values import ApprovalStatus, Notice
from agent_gateway_store.storage.database import AnyConnection, dialect_of
from agent_gateway_store.storage.db_clock import clock_sql
from agent_gateway_store.storage.errors import is_id_taken
from agent_gateway_store.storage.pubsub import NOTIFY_SQL
from agent_gateway_store.storage.statements import RowsParameter, Statement

_deliveries = NotificationDelivery.__table__
_PENDING = ApprovalStatus.PENDING


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

    def send(self, notice: Notice, leased: Leased) -> None:
        """Take a notice whose rows are committed; it has no `delivery_id` that means anything."""
        ...


class PersistOnlyOutbox:
    """An outbox whose rows are sent by a worker somewhere else."""

    lease_s = None

    def __init__(self, notifiers: Iterable[str]) -> None:
        self.notifiers = tuple(notifiers)

    def send(self, notice: Notice, leased: Leased) -> None:
        """Leave it to the worker."""


# Of a row of the outbox, where `is_leased` says whether it is leased to this process.
_INSERT_DELIVERIES = """
    INSERT INTO notification_deliveries (
        delivery_id, org_id, approval_id, notifier, event, payload, status, attempts, next_attempt_at, created_at
    )"""
_DUE = {
    dialect: f"""'DUE',
        CASE WHEN is_leased THEN 1 ELSE 0 END,
        CASE WHEN is_leased THEN {clock_sql(dialect, plus=":p_lease_s")} ELSE {clock_sql(dialect)} END,
        {clock_sql(dialect)}"""
    for dialect in ("sqlite", "postgresql")
}
# A notice that waits for an earlier one about the same approval is sent by the process that delivers that one, so it is
# not leased. `|| ''` keeps the planner from the index over status and notifier, which may hold a whole backlog; the one
# over approval_id finds a few rows. LIMIT and OFFSET keep it from a join, for which it would read the whole table.
# As a CASE, because where nothing is leased a plan for these parameters would leave the look out, look cheaper than one
# for any, and be made anew each time.
_IS_LEASED = """CASE WHEN NOT EXISTS (
            SELECT 1 FROM notification_deliveries AS before
            WHERE before.approval_id = given.approval_id
                AND before.notifier || '' = given.notifier
                AND before.status || '' = 'DUE'
            LIMIT 1 OFFSET 0
        ) THEN :p_lease_s END IS NOT NULL AS is_leased"""
# Of an unknown LIMIT PostgreSQL expects a tenth, so one row, and of an unknown array ten: then the plan for any
# parameters looks dearer than one for these, and the statement is planned for longer than it runs, each time.
_RECIPIENTS = """(
            SELECT * FROM unnest(:p_notifiers, :p_delivery_ids) AS each(notifier, delivery_id)
            LIMIT cardinality(:p_notifiers)
        ) AS recipient"""
_DECISION_TYPES: dict[str, TypeEngine[Any]] = {
    "p_delivery_ids": ARRAY(Uuid()),
    "p_lease_s": Float(53),
    "p_notice": JSONB(),
    "p_notifiers": ARRAY(Text()),
}


def _utc(column: str) -> str:
    # Written out in UTC, for the JSON of a timestamp is in the time zone of the session; asyncpg stores the last
    # instant of UTC as infinity.
    written = f"to_char({column} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
    return f"CASE WHEN {column} = 'infinity' THEN '{UTC_MAX:%Y-%m-%dT%H:%M:%S.%fZ}' ELSE {written} END"


# PostgreSQL alone: SQLite has no INSERT within a WITH.
_INSERT_WITH_DELIVERIES = sql_statement(
    f"""
    WITH asked AS ({INSERT_SQL}
    ), written AS ({_INSERT_DELIVERIES}
        SELECT
            delivery_id, org_id, approval_id, notifier, 'pending',
            :p_notice || jsonb_build_object(
                'created_at', {_utc("created_at")}, 'expires_at', {_utc("expires_at")}, 'delivery_id', delivery_id
            ),
            {{due}}
        FROM asked CROSS JOIN (
            SELECT *, :p_lease_s IS NOT NULL AS is_leased
            FROM {_RECIPIENTS}
        ) AS given
    )
    SELECT * FROM asked
    """,  # noqa: S608  pieces of the program's own
    types=_DECISION_TYPES,
    due=_DUE,
)


@cache
def _decide(decision: VoteDecision, by: Key, publishes: bool) -> Statement:
    """A decision, the vote and the rows of the notice in one statement, with the message to other processes.

    A second vote of the same approver raises IntegrityError, and nothing is written, unless it cancels. The JSON is
    that of `notice_of`. Without a message it does not name the function, which may not be there.
    """
    update, on_conflict = _DECISIONS[decision]
    sent = NOTIFY_SQL.format("approval_id") if publishes else "CAST(NULL AS TEXT)"
    sql = f"""
    WITH decided AS ({update}), voted AS (
        {VOTES_SQL}
        SELECT approval_id, org_id, :p_approver_id, :p_decision, :p_note, :p_channel, {{now}} FROM decided
        {on_conflict}
    ), given AS (
        SELECT decided.*, delivery_id, notifier
        FROM decided CROSS JOIN {_RECIPIENTS}
    ), notices AS MATERIALIZED (
        SELECT given.*, {_IS_LEASED} FROM given
    ), written AS ({_INSERT_DELIVERIES}
        SELECT
            delivery_id, org_id, approval_id, notifier, 'decision',
            jsonb_build_object(
                'event', 'decision', 'delivery_id', delivery_id, 'approval_id', approval_id, 'org_id', org_id,
                'request_id', request_id, 'caller_id', caller_id, 'tool_call', tool_call,
                'risk_explanation', risk_explanation, 'created_at', {_utc("created_at")},
                'expires_at', {_utc("expires_at")}, 'status', status, 'approver_id', approver_id,
                'note', approver_note, 'decided_at', {_utc("decision_at")}, 'scope', scope,
                'required_approvals', required_approvals
            ),
            {{due}}
        FROM notices
        RETURNING delivery_id, attempts
    )
    SELECT decided.*, ARRAY(SELECT delivery_id FROM written WHERE attempts > 0) AS leased, {sent} AS sent
    FROM decided
    """  # noqa: S608  pieces of the program's own
    columns = (*readable_columns, column("leased", ARRAY(Uuid())), column("sent", Text()))
    return sql_statement(sql.replace("{ref}", REFS[by]), columns, types=_DECISION_TYPES, due=_DUE)


_DECISIONS = {
    VoteDecision.APPROVED: (APPROVE_SQL, ""),
    VoteDecision.DENIED: (DENY_SQL, ""),
    # Somebody who has voted may still cancel; the first vote stays on record.
    VoteDecision.CANCELLED: (CANCEL_SQL, "ON CONFLICT (approval_id, approver_id) DO NOTHING"),
}

_NOTICES = RowsParameter(
    "notices",
    {
        "delivery_id": Uuid(),
        "org_id": Text(),
        "approval_id": Uuid(),
        "notifier": Text(),
        "event": Text(),
        "payload": Text(),
    },
)

# Materialized, so that each row looks back once and not once for each use of the answer.
_ENQUEUE = sql_statement(
    f"""
    WITH notices AS MATERIALIZED (
        SELECT given.*, {_IS_LEASED} FROM {{given}} AS given
    ){_INSERT_DELIVERIES}
    SELECT delivery_id, org_id, approval_id, notifier, event, {{payload}}, {{due}}
    FROM notices
    RETURNING delivery_id, attempts
    """,  # noqa: S608
    (_deliveries.c.delivery_id, _deliveries.c.attempts),
    types={**_NOTICES.types, "p_lease_s": Float(53)},
    due=_DUE,
    payload={"postgresql": "CAST(payload AS JSONB)", "sqlite": "payload"},
    given={dialect: _NOTICES.sql(dialect) for dialect in _DUE},
)


async def insert_with_deliveries(
    connection: AnyConnection, values: Mapping[str, Any], outbox: Outbox
) -> tuple[Mapping[str, Any] | None, Leased]:
    """Insert an approval by what `issue_values` gives, and the rows of its notice; in one statement on PostgreSQL.

    Returns:
        The approval, or None if it stands already, and then nothing is written; the rows leased to this process.
    """
    since = time.monotonic()
    delivery_ids = {name: uuid4() for name in outbox.notifiers}
    if not delivery_ids:
        return await INSERT.first(connection, values), Leased({}, since)
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
    return row, Leased(delivery_ids if row is not None and outbox.lease_s is not None else {}, since)


def _pending_notice(values: Mapping[str, Any]) -> Notice:
    return Notice(
        event="pending",
        delivery_id=UUID(int=0),
        status=_PENDING,
        # When, the database says.
        **{name: values[f"p_{name}"] for name in ASKED - {"created_at", "expires_at"}},
    )


def notice_of(request: ApprovalRequest, event: Literal["pending", "decision"]) -> Notice:
    """Return the notice about `request` as it stands: no token, and only the sanitised arguments."""
    return Notice(
        event=event,
        delivery_id=uuid4(),
        status=request.status,
        approver_id=request.approver_id,
        note=request.approver_note,
        decided_at=request.decision_at,
        **asked_of(request),
    )


class Change(NamedTuple):
    """A change that its transaction writes, with its notice; None of a vote that decides nothing."""

    approval: StoredApproval
    notice: Notice | None
    leased: Leased


async def decide_at_once(
    connection: AnyConnection,
    decision: VoteDecision,
    by: Key,
    values: Mapping[str, Any],
    *,
    outbox: Outbox,
    publishes: bool,
) -> Change | None:
    """Decide on PostgreSQL by this one vote, with the rows of the notice, in one statement that commits itself.

    Returns:
        The change; None if nothing is written: more votes are needed, or it is refused.
    """
    since, ids = time.monotonic(), {name: uuid4() for name in outbox.notifiers}
    given = {"p_notifiers": list(ids), "p_delivery_ids": list(ids.values()), "p_lease_s": outbox.lease_s}
    try:
        row = await _decide(decision, by, publishes).first(connection, {**values, **given})
    except IntegrityError as exc:
        if is_id_taken(exc):
            raise
        # The approver has voted before.
        return None
    if row is None:
        return None
    # Of one that cannot be read the worker sends the notice, once the lease is over.
    leased = set(row.get("leased", ()))
    approval = StoredApproval.repaired(row)
    own = {name: each for name, each in ids.items() if each in leased}
    return Change(approval, notice_of(approval.request, "decision"), Leased(own, since))


async def enqueue(connection: AnyConnection, approvals: Sequence[StoredApproval], outbox: Outbox) -> list[Change]:
    """Write the rows of the notices of decided approvals; does not commit."""
    since = time.monotonic()
    notices = [notice_of(each.request, "decision") for each in approvals if each.request.status is not _PENDING]
    addressed = [(notice, {name: uuid4() for name in outbox.notifiers}) for notice in notices]
    leased = await _write(connection, addressed, outbox.lease_s) if addressed and outbox.notifiers else frozenset()
    ids = {
        notice.approval_id: (notice, Leased({name: each for name, each in ids.items() if each in leased}, since))
        for notice, ids in addressed
    }
    nothing = None, Leased({}, since)
    return [Change(each, *ids.get(each.request.approval_id, nothing)) for each in approvals]


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
