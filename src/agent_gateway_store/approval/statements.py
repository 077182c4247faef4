"""The life of an approval in SQL: each step is one UPDATE whose WHERE says from where it may be taken.

    PENDING   to  APPROVED, DENIED, CANCELLED, EXPIRED
    APPROVED  to  USED, CANCELLED, EXPIRED

The WHERE holds the status that stands, the deadline by the database's clock and the organisation, so that the database
picks the winner of a race. EXPIRED is derived when a row is read; only the sweep, and asking for the same call again,
write it.

Statuses are literals, because the partial index over pending calls is used for no parameter. The parameters
`:p_token` or `:p_approval_id` name the approval, `:p_org_id` the organisation that looks (None: all).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from sqlalchemy import BigInteger, Boolean, ColumnElement, Float, Integer, Text, column
from sqlalchemy.types import TypeEngine

from agent_gateway_store.models.approval import ApprovalRequest, ApprovalVote
from agent_gateway_store.models.columns import READABLE_SQL, UtcDateTime
from agent_gateway_store.storage.db_clock import clock_sql
from agent_gateway_store.storage.statements import Statement, typed_text

Key: TypeAlias = Literal["token", "id"]

_requests = ApprovalRequest.__table__
_votes = ApprovalVote.__table__

# Beside the columns: the database's time, and the digest that the column `token` does not show.
readable_columns: tuple[ColumnElement[Any], ...] = (
    *_requests.c,
    column("read_at", UtcDateTime()),
    column("token_sha256", Text()),
)

SAME_CALL = ("org_id", "caller_id", "request_id", "tool_call_hash")
"""What is equal where the same call is asked for again."""

_TYPES: dict[str, TypeEngine[Any]] = {
    **{f"p_{each.name}": each.type for each in (*_votes.c, *_requests.c)},
    "p_allow_self": Boolean(),
    "p_batch_size": Integer(),
    "p_lock": BigInteger(),
    "p_max_pending": Integer(),
    "p_since_s": Float(53),
    "p_ttl_s": Float(53),
}


def fragments(dialect: str) -> dict[str, str]:
    """Return the pieces that statements share, by the names under which they stand in braces."""
    now = clock_sql(dialect)
    same = "IS NOT DISTINCT FROM" if dialect == "postgresql" else "IS"  # which SQLite has had for longer
    is_postgres = dialect == "postgresql"
    names = [
        f"{READABLE_SQL.format(each.name)} AS {each.name}"
        if is_postgres and isinstance(each.type, UtcDateTime)
        else each.name
        for each in _requests.c
    ]
    meta = f"{now} AS read_at, token AS token_sha256"
    overdue = (
        f"(status = 'PENDING' AND expires_at <= {now} "
        f"OR status = 'APPROVED' AND COALESCE(use_before, expires_at) <= {now})"
    )
    status = f"CASE WHEN {overdue} THEN 'EXPIRED' ELSE status END"
    return {
        "now": now,
        "same": same,
        "own": "(:p_org_id IS NULL OR org_id = :p_org_id)",
        # `|| ''` keeps the planner from the index over the status: what has this token is one row, and on a table that
        # was small when PostgreSQL made the plan that index is as good.
        "is_pending": f"status || '' = 'PENDING' AND expires_at > {now}",
        "is_approved": f"status || '' = 'APPROVED' AND COALESCE(use_before, expires_at) > {now}",
        "is_overdue": overdue,
        # As a subquery the time is taken once, so that an index finds the rows.
        "now_once": f"(SELECT {now})",
        "readable_status": status,
        "readable": ", ".join(f"{status} AS status" if name == "status" else name for name in names) + f", {meta}",
        "returning": f"{', '.join(names)}, {meta}",
        "decision": f"approver_id = :p_approver_id, approver_note = :p_note, decision_at = {now}",
        "use_before": f"""use_before = CASE WHEN acquire_key IS NULL THEN use_before
            ELSE COALESCE(use_before, {clock_sql(dialect, plus=":p_ttl_s")}) END""",
        "same_call": " AND ".join([*(f"{name} = :p_{name}" for name in SAME_CALL), "acquire_key IS NULL"]),
        # As the partial index has it: SQLite uses that for the same words only.
        "acquired": """org_id = :p_org_id AND caller_id = :p_caller_id AND acquire_key = :p_acquire_key
            AND status IN ('PENDING', 'APPROVED')""",
        "same_ask": f"""required_approvals >= :p_required_approvals
            AND CAST(tool_call AS TEXT) {same} CAST(:p_tool_call AS TEXT)""",
        # Sorted, because only the index that is meant gives this order: else one that is as cheap might be taken.
        "pending_of_caller": f"""
            (SELECT count(*) FROM (SELECT expires_at FROM approval_requests
                WHERE org_id = :p_org_id AND caller_id = :p_caller_id AND status = 'PENDING' AND required_approvals > 0
                ORDER BY expires_at) AS waiting WHERE expires_at > {now})""",  # noqa: S608
        # JSON is compared as the text that the database shows: as JSONB, 1 would equal 1.0.
        "same_terms": f"""scope = :p_scope
            AND required_approvals = :p_required_approvals
            AND risk_explanation = :p_risk_explanation
            AND output_hash {same} :p_output_hash
            AND CAST(tool_call AS TEXT) {same} CAST(:p_tool_call AS TEXT)
            AND CAST(output_payload AS TEXT) {same} CAST(:p_output_payload AS TEXT)
            AND (:p_expires_at IS NULL OR expires_at = :p_expires_at)
            AND (:p_use_before IS NULL OR use_before {same} :p_use_before)""",
        "skip_locked": "FOR UPDATE SKIP LOCKED" if dialect == "postgresql" else "",  # SQLite has one writer
        "ttl_end": clock_sql(dialect, plus=":p_ttl_s"),
    }


def sql_statement(
    sql: str,
    columns: tuple[ColumnElement[Any], ...] = readable_columns,
    /,
    *,
    types: Mapping[str, TypeEngine[Any]] = _TYPES,
    **more: Mapping[str, str],
) -> Statement:
    """Return the statement of a text with names of `fragments` in braces.

    Args:
        sql: The text.
        columns: What its rows hold.
        types: Of its parameters.
        more: Further fragments, by dialect.
    """

    def of_dialect(dialect: str) -> Any:
        words = fragments(dialect) | {name: texts[dialect] for name, texts in more.items()}
        return typed_text(sql.format_map(words), {**_TYPES, **types}, columns)

    return Statement(of_dialect)


REFS: dict[Key, str] = {"token": "token = :p_token AND {own}", "id": "approval_id = :p_approval_id AND {own}"}
"""What finds an approval by what names it: the text of `{ref}`."""


def _by_token_or_id(sql: str) -> dict[Key, Statement]:
    return {by: sql_statement(sql.replace("{ref}", ref)) for by, ref in REFS.items()}


READ = _by_token_or_id("""
    SELECT {readable} FROM approval_requests WHERE {ref}
    """)

APPROVE_SQL = """
    UPDATE approval_requests SET status = 'APPROVED', version = version + 1, {decision}, {use_before}
    WHERE {ref} AND {is_pending} AND required_approvals <= 1 AND (:p_allow_self OR caller_id != :p_approver_id)
    RETURNING {returning}
    """
APPROVE = _by_token_or_id(APPROVE_SQL)

# Of two voters one waits here for the other.
LOCK_PENDING = _by_token_or_id("""
    UPDATE approval_requests SET version = version + 1
    WHERE {ref} AND {is_pending} AND (:p_allow_self OR caller_id != :p_approver_id)
    RETURNING {returning}
    """)

APPROVE_FINAL = _by_token_or_id("""
    UPDATE approval_requests SET status = 'APPROVED', version = version + 1, {decision}, {use_before}
    WHERE {ref} AND {is_pending}
    RETURNING {returning}
    """)

DENY_SQL = """
    UPDATE approval_requests SET status = 'DENIED', version = version + 1, {decision}
    WHERE {ref} AND {is_pending}
    RETURNING {returning}
    """
DENY = _by_token_or_id(DENY_SQL)

CANCEL_SQL = """
    UPDATE approval_requests SET status = 'CANCELLED', version = version + 1, {decision}
    WHERE {ref} AND ({is_pending} OR {is_approved})
    RETURNING {returning}
    """
CANCEL = _by_token_or_id(CANCEL_SQL)

VOTES_SQL = "INSERT INTO approval_votes (approval_id, org_id, approver_id, decision, note, channel, voted_at)"
VOTE = sql_statement(
    f"""
    {VOTES_SQL}
    VALUES (:p_approval_id, :p_org_id, :p_approver_id, :p_decision, :p_note, :p_channel, {{now}})
    ON CONFLICT (approval_id, approver_id) DO NOTHING
    RETURNING id
    """,
    (_votes.c.id,),
)

COUNT_APPROVALS = sql_statement(
    """
    SELECT count(*) AS approvals FROM approval_votes WHERE approval_id = :p_approval_id AND decision = 'APPROVED'
    """,
    (column("approvals", Integer()),),
)

CONSUME = sql_statement("""
    UPDATE approval_requests SET status = 'USED', version = version + 1, used_at = {now}
    WHERE token = :p_token AND {own} AND {is_approved}
        AND caller_id = :p_caller_id AND scope = :p_scope AND tool_call_hash = :p_tool_call_hash
    RETURNING {returning}
    """)

RELEASE = sql_statement("""
    UPDATE approval_requests SET status = 'USED', version = version + 1, used_at = {now}
    WHERE token = :p_token AND {own} AND {is_approved}
        AND caller_id = :p_caller_id AND scope = :p_scope
    RETURNING {returning}
    """)

SET_OUTCOME = _by_token_or_id("""
    UPDATE approval_requests SET outcome = :p_outcome, version = version + 1
    WHERE {ref} AND status || '' = 'USED' AND outcome IS NULL
    RETURNING {returning}
    """)

INSERT_SQL = """
    INSERT INTO approval_requests (
        approval_id, token, request_id, caller_id, org_id, tool_call, tool_call_hash, risk_explanation, use_before,
        scope, output_payload, output_hash, required_approvals, acquire_key, created_at, expires_at, status,
        approver_note, version
    )
    SELECT
        :p_approval_id, :p_token, :p_request_id, :p_caller_id, :p_org_id, :p_tool_call, :p_tool_call_hash,
        :p_risk_explanation, :p_use_before, :p_scope, :p_output_payload, :p_output_hash, :p_required_approvals,
        :p_acquire_key, {now}, COALESCE(:p_expires_at, {ttl_end}), 'PENDING', '', 1
    WHERE {pending_of_caller} < :p_max_pending
    ON CONFLICT DO NOTHING
    RETURNING {returning}
    """
INSERT = sql_statement(INSERT_SQL)

# The status once more as the index of pending calls has it, here and below.
REISSUE = sql_statement("""
    UPDATE approval_requests SET token = :p_token, version = version + 1
    WHERE {same_call} AND status = 'PENDING' AND {is_pending} AND {same_terms}
    RETURNING {returning}
    """)

WITHDRAW = sql_statement("""
    UPDATE approval_requests SET status = 'CANCELLED', version = version + 1,
        approver_id = caller_id, approver_note = 'The task that asked was cancelled.', decision_at = {now}
    WHERE token = :p_token AND version = :p_version AND {is_pending}
    RETURNING {returning}
    """)

_EXPIRE = """
    UPDATE approval_requests SET status = 'EXPIRED', version = version + 1
    WHERE {scope} AND {is_overdue}
    RETURNING {returning}
    """
_CANCEL = """
    UPDATE approval_requests SET status = 'CANCELLED', version = version + 1,
        approver_id = caller_id, approver_note = 'Asked again with other terms.', decision_at = {now}
    WHERE {scope} AND NOT ({same})
    RETURNING {returning}
    """
EXPIRE_SAME_CALL = sql_statement(_EXPIRE.replace("{scope}", "{same_call}"))
CANCEL_OTHER_TERMS = sql_statement(
    _CANCEL.replace("{scope}", "{same_call} AND status = 'PENDING' AND {is_pending}").replace("{same}", "{same_terms}")
)
EXPIRE_ACQUIRED = sql_statement(_EXPIRE.replace("{scope}", "{acquired}"))
CANCEL_ACQUIRED = sql_statement(
    _CANCEL.replace("{scope}", "{acquired} AND ({is_pending} OR {is_approved})").replace("{same}", "{same_ask}")
)

USE_ACQUIRED = sql_statement("""
    UPDATE approval_requests SET status = 'USED', version = version + 1, used_at = {now}
    WHERE {acquired} AND {is_approved} AND {same_ask}
    RETURNING {returning}
    """)

READ_ACQUIRED = sql_statement(
    "SELECT {readable} FROM approval_requests WHERE {acquired} AND {is_pending} AND {same_ask}"
)

# `|| ''` keeps the planner from the index over the status, where denials are rare by the statistics.
RECENTLY_DENIED = sql_statement(
    """
    SELECT {readable} FROM approval_requests
    WHERE acquire_key = :p_acquire_key AND decision_at > {denied_since} AND status || '' = 'DENIED'
    ORDER BY approval_requests.decision_at DESC LIMIT 1
    """,
    # As a subquery the time is taken once, so that of a call that ran often the index finds the few rows since.
    denied_since={dialect: f"(SELECT {clock_sql(dialect, plus=':p_since_s')})" for dialect in ("sqlite", "postgresql")},
)

LAST_USE = sql_statement(
    """
    SELECT {used} AS used_at, outcome FROM approval_requests
    WHERE acquire_key = :p_acquire_key AND decision_at IS NOT NULL AND used_at IS NOT NULL
    ORDER BY decision_at DESC LIMIT 1
    """,
    (_requests.c.used_at, _requests.c.outcome),
    used={"sqlite": "used_at", "postgresql": READABLE_SQL.format("used_at")},
)

COUNT_PENDING = sql_statement("SELECT {pending_of_caller} AS pending", (column("pending", BigInteger()),))

# PostgreSQL alone: held to the end of the transaction.
LOCK_CALL = sql_statement("SELECT pg_advisory_xact_lock(:p_lock) AS locked", (column("locked", Text()),))

OVERDUE = (
    ("status = 'PENDING' AND version > 0 AND expires_at <= {now_once}", "expires_at"),
    ("status = 'APPROVED' AND version > 0 AND use_before <= {now_once}", "use_before"),
    ("status = 'APPROVED' AND version > 0 AND use_before IS NULL AND expires_at <= {now_once}", "expires_at"),
)
"""The ways to be overdue, in the words of the index that finds each, and its order."""

_BATCHES = ", ".join(
    f"""batch_{at} AS MATERIALIZED (
        SELECT id FROM approval_requests WHERE {condition} AND {{own}}
        ORDER BY {order} LIMIT :p_batch_size {{skip_locked}}
    )"""  # noqa: S608  pieces of the program's own, as below
    for at, (condition, order) in enumerate(OVERDUE)
)
_BATCH = " UNION ALL ".join(f"SELECT id FROM batch_{at}" for at in range(len(OVERDUE)))  # noqa: S608
# Materialized, so that the rows are picked, and locked, once; what is locked beyond the batch comes in the next one.
EXPIRE = sql_statement(f"""
    WITH {_BATCHES}
    UPDATE approval_requests SET status = 'EXPIRED', version = version + 1
    WHERE id IN (SELECT id FROM ({_BATCH}) AS overdue LIMIT :p_batch_size) AND {{is_overdue}}
    RETURNING {{returning}}
    """)  # noqa: S608
