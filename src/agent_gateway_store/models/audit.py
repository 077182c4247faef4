"""The audit event: one row for each tool call that reached the gateway."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

from pydantic import AfterValidator, BeforeValidator, NonNegativeInt, PlainValidator, StringConstraints
from sqlalchemy import BigInteger, CheckConstraint, Column, Float, Index, Text, UniqueConstraint, Uuid, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import ColumnElement
from sqlmodel import Field

from agent_gateway_store.clock import utc_now
from agent_gateway_store.encoding.canonical import hash_json
from agent_gateway_store.encoding.plain import plain
from agent_gateway_store.models.base import StoreModel, index_where
from agent_gateway_store.models.columns import BigKey, EnumText, Json, JsonOf, UtcDateTime, as_utc
from agent_gateway_store.models.values import FrozenModel


class Decision(StrEnum):
    """What the gateway decided about a tool call."""

    ALLOW = "ALLOW"
    DENY = "DENY"
    APPROVAL_REQUIRED = "APPROVAL_REQUIRED"
    SANITIZE_AND_ALLOW = "SANITIZE_AND_ALLOW"


class ExecutionStatus(StrEnum):
    """How the tool call ended; None on an event means that it was not executed.

    APPROVED_OUTPUT_RELEASE: it ran, and its output was released by a separate approval.
    """

    SUCCESS = "SUCCESS"
    TOOL_ERROR = "TOOL_ERROR"
    TIMEOUT = "TIMEOUT"
    CANCELLED = "CANCELLED"
    APPROVED_OUTPUT_RELEASE = "APPROVED_OUTPUT_RELEASE"


class OutputDecision(StrEnum):
    """What the gateway decided about the output of a tool call."""

    ALLOW = "ALLOW"
    REDACT = "REDACT"
    APPROVAL_REQUIRED = "APPROVAL_REQUIRED"
    DENY = "DENY"


class RedactionFlag(FrozenModel):
    """One replacement in an event.

    Attributes:
        field: Where: the field's name, with the path inside JSON ("sanitized_args.query").
        reason: Why, in capitals; UNSTORABLE for what no database can hold.
        original_hash: SHA-256 of the original, by which an investigator can recognise it; None if not known.
    """

    field: str
    reason: str
    original_hash: str | None = None


def _mapping(value: Any) -> dict[Any, Any]:
    found = value if type(value) is dict else plain(value)
    if type(found) is not dict:
        raise ValueError("it must be a mapping of names to values")
    return dict(found)


def _whole(value: Any) -> Any:
    # The common case first: every event passes here.
    if type(value) is int:
        return value
    value = plain(value)
    # Within 64 bits, as the column: a larger float is refused instead of becoming another number.
    return round(value) if type(value) is float and abs(value) < 2**63 else value


def _exact_uuid(value: UUID) -> UUID:
    # asyncpg reads UUIDs as a class of its own.
    if type(value) is UUID:
        return value
    try:
        return UUID(UUID.__str__(value))
    except Exception as exc:
        raise ValueError("it cannot be read as a UUID") from exc


Instant = Annotated[datetime, AfterValidator(as_utc)]
JsonObject = Annotated[dict[str, Any], PlainValidator(_mapping, json_schema_input_type=dict[str, Any])]
Sha256Hex = Annotated[str, StringConstraints(pattern=r"^[0-9A-Fa-f]{64}$", to_lower=True)]
ExactUuid = Annotated[UUID, AfterValidator(_exact_uuid)]
Milliseconds = Annotated[NonNegativeInt, BeforeValidator(_whole)]


class AuditEvent(StoreModel, table=True):
    """One tool call as the gateway saw it: who called what, what was decided and why, how it ended.

    Rows are only ever added. `content_hash` is set by the store when the event is written. Text and JSON may hold
    anything: what a database cannot hold is replaced visibly at the write and noted in `redaction_flags`.

    Attributes:
        request_id: The gateway's id of the call, unique in its organisation.
        raw_args_hash: 64 hex digits, see `hash_args`; the raw arguments themselves are never stored.
        sanitized_args: The arguments as the gateway wants them to be stored.
        timestamp: When (aware UTC; naive input is taken as UTC).
        risk_score: The gateway's own scale.
        latency_ms: Milliseconds, rounded to whole ones.
        execution_status: None means that the tool was not executed, or that its end is not known.
        approval_id: The approval that released the call.
        extra: What has no field of its own: span ids, error texts, counts of tokens, work references.
    """

    __tablename__ = "audit_events"
    __table_args__ = (
        UniqueConstraint("request_id", "org_id"),
        CheckConstraint("length(raw_args_hash) = 64", name="raw_args_hash"),
        CheckConstraint("latency_ms >= 0", name="latency_ms"),
        CheckConstraint("decision IN ('ALLOW', 'DENY', 'APPROVAL_REQUIRED', 'SANITIZE_AND_ALLOW')", name="decision"),
        CheckConstraint(
            "execution_status IN ('SUCCESS', 'TOOL_ERROR', 'TIMEOUT', 'CANCELLED', 'APPROVED_OUTPUT_RELEASE')",
            name="execution_status",
        ),
        CheckConstraint("output_decision IN ('ALLOW', 'REDACT', 'APPROVAL_REQUIRED', 'DENY')", name="output_decision"),
        # Each ends with the order of the listings, so that a page is read along one index.
        Index(None, "timestamp", "id"),
        Index(None, "caller_id", "timestamp", "id"),
        Index(None, "decision", "timestamp", "id"),
        Index(None, "tool_name", "timestamp", "id"),
        Index(None, "org_id", "timestamp", "id"),
        Index(None, "session_id", "timestamp", "id"),
        index_where(text("parent_request_id IS NOT NULL"), "parent_request_id"),
        index_where(text("approval_id IS NOT NULL"), "approval_id"),
        # What `audit.call(intent=True)` writes before a call runs.
        Index(
            "ix_audit_events_intents",
            "timestamp",
            "id",
            postgresql_where=text("extra ->> 'phase' = 'intent'"),
            sqlite_where=text("json_extract(extra, '$.phase') = 'intent'"),
        ),
        # No id is given twice, also not that of a row that was deleted: leaves name events by it.
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, sa_type=BigKey(), primary_key=True)
    request_id: str = Field(sa_type=Text)
    org_id: str = Field(default="default", sa_type=Text)
    trace_id: str | None = Field(default=None, sa_type=Text)
    session_id: str | None = Field(default=None, sa_type=Text)
    parent_request_id: str | None = Field(default=None, sa_type=Text)
    timestamp: Instant = Field(default_factory=utc_now, sa_type=UtcDateTime)
    caller_id: str = Field(sa_type=Text)
    caller_role: str = Field(sa_type=Text)
    key_id: str | None = Field(default=None, sa_type=Text)
    environment: str = Field(sa_type=Text)
    mcp_server: str = Field(sa_type=Text)
    tool_name: str = Field(sa_type=Text)
    raw_args_hash: Sha256Hex = Field(sa_type=Text)
    sanitized_args: JsonObject = Field(sa_type=Json())
    risk_labels: list[str] = Field(default_factory=list, sa_type=Json())
    # 53 bits of mantissa are a double precision on PostgreSQL; FLOAT alone would do, but is single elsewhere.
    risk_score: float = Field(sa_type=Float(53))
    matched_policy_rule: str = Field(sa_type=Text)
    policy_version: str | None = Field(default=None, sa_type=Text)
    decision: Decision = Field(sa_type=EnumText(Decision))
    approver_id: str | None = Field(default=None, sa_type=Text)
    execution_status: ExecutionStatus | None = Field(default=None, sa_type=EnumText(ExecutionStatus), nullable=True)
    latency_ms: Milliseconds = Field(sa_type=BigInteger)
    output_hash: str | None = Field(default=None, sa_type=Text)
    output_decision: OutputDecision = Field(default=OutputDecision.ALLOW, sa_type=EnumText(OutputDecision))
    output_policy_rationale: str | None = Field(default=None, sa_type=Text)
    redaction_flags: list[RedactionFlag] = Field(default_factory=list, sa_type=JsonOf(list[RedactionFlag]))
    llm_explanation: str | None = Field(default=None, sa_type=Text)
    deterministic_rationale: str = Field(sa_type=Text)
    approval_id: ExactUuid | None = Field(default=None, sa_type=Uuid)
    # With a default in the database, so that a process of the version before goes on writing during an update.
    extra: JsonObject = Field(default_factory=dict, sa_type=Json(), sa_column_kwargs={"server_default": text("'{}'")})
    content_hash: str | None = Field(default=None, sa_type=Text)

    @staticmethod
    def hash_args(args: Mapping[str, Any], *, key: str | None = None) -> str:
        """Return `raw_args_hash` for the raw arguments of a call: 64 lower-case hex digits.

        SHA-256 (with a key: HMAC-SHA-256) over RFC 8785 canonical JSON, so that other languages get the same.
        What RFC 8785 cannot take is tagged first, never rounded: see `agent_gateway_store.encoding.canonical`.

        Args:
            args: The arguments exactly as they came.
            key: Secret that keeps low-entropy arguments from being guessed; default: the setting HASH_KEY.
        """
        return hash_json(args, key=key)


class _CurrentTransaction(ColumnElement[int]):
    """The id of the inserting transaction, by which a snapshot knows its rows. SQLite needs none: it has one writer."""

    inherit_cache = True
    type = BigInteger()


@compiles(_CurrentTransaction)
def _nothing(_element: _CurrentTransaction, _compiler: Any, **_options: Any) -> str:
    return "NULL"


@compiles(_CurrentTransaction, "postgresql")
def _current(_element: _CurrentTransaction, _compiler: Any, **_options: Any) -> str:
    return "(pg_current_xact_id()::text::bigint)"


# A column of the table but not a field of the event: it says when a row was committed, not what happened.
_table = AuditEvent.__table__
_table.append_column(Column("transaction_id", BigInteger, server_default=_CurrentTransaction()))
Index(
    None,
    _table.c.transaction_id,
    postgresql_where=_table.c.transaction_id.is_not(None),
    sqlite_where=_table.c.transaction_id.is_not(None),
)
