"""The sealed log: a leaf for each event, the hashes of the tree above them, and checkpoints; rows are only added

Revision: 0008_sealed_log, after 0007_key_history
"""

import sqlalchemy as sa
from alembic import op

from agent_gateway_store.storage.append_only import TABLES, protection, triggers

revision = "0008_sealed_log"
down_revision = "0007_key_history"
branch_labels = None
depends_on = None

_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NULLABLE = {
    *("trace_id", "session_id", "parent_request_id", "key_id", "policy_version", "approver_id", "execution_status"),
    *("output_hash", "output_policy_rationale", "llm_explanation", "content_hash"),
}


def _events() -> sa.Table:
    """The table as it stands on SQLite, which begins to count its ids only by copying it."""
    json, time, number = sa.JSON(), sa.DateTime(timezone=True), sa.BigInteger()
    kinds = {
        **dict.fromkeys(("request_id", "org_id", "trace_id", "session_id", "parent_request_id"), sa.Text()),
        "timestamp": time,
        **dict.fromkeys(("caller_id", "caller_role", "key_id", "environment", "mcp_server", "tool_name"), sa.Text()),
        "raw_args_hash": sa.Text(),
        **dict.fromkeys(("sanitized_args", "risk_labels"), json),
        "risk_score": sa.Float(precision=53),
        **dict.fromkeys(("matched_policy_rule", "policy_version", "decision", "approver_id"), sa.Text()),
        "execution_status": sa.Text(),
        "latency_ms": number,
        **dict.fromkeys(("output_hash", "output_decision", "output_policy_rationale"), sa.Text()),
        "redaction_flags": json,
        **dict.fromkeys(("llm_explanation", "deterministic_rationale", "content_hash"), sa.Text()),
    }
    table = sa.Table(
        "audit_events",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), nullable=False),
        *(sa.Column(name, kind, nullable=name in _NULLABLE) for name, kind in kinds.items()),
        sa.Column("transaction_id", number, server_default=sa.text("NULL"), nullable=True),
        sa.Column("approval_id", sa.Uuid(), nullable=True),
        sa.Column("extra", json, server_default=sa.text("'{}'"), nullable=False),
        sa.CheckConstraint(
            "decision IN ('ALLOW', 'DENY', 'APPROVAL_REQUIRED', 'SANITIZE_AND_ALLOW')", name="ck_audit_events_decision"
        ),
        sa.CheckConstraint(
            "execution_status IN ('SUCCESS', 'TOOL_ERROR', 'TIMEOUT', 'CANCELLED', 'APPROVED_OUTPUT_RELEASE')",
            name="ck_audit_events_execution_status",
        ),
        sa.CheckConstraint(
            "output_decision IN ('ALLOW', 'REDACT', 'APPROVAL_REQUIRED', 'DENY')",
            name="ck_audit_events_output_decision",
        ),
        sa.CheckConstraint("latency_ms >= 0", name="ck_audit_events_latency_ms"),
        sa.CheckConstraint("length(raw_args_hash) = 64", name="ck_audit_events_raw_args_hash"),
        sa.PrimaryKeyConstraint("id", name="pk_audit_events"),
        sa.UniqueConstraint("request_id", "org_id", name="uq_audit_events_request_id_org_id"),
    )
    for first in ("", "caller_id", "decision", "org_id", "session_id", "tool_name"):
        names = [name for name in (first, "timestamp", "id") if name]
        sa.Index(f"ix_audit_events_{'_'.join(names)}", *(table.c[name] for name in names))
    sa.Index(
        "ix_audit_events_transaction_id",
        table.c.transaction_id,
        sqlite_where=sa.text("transaction_id IS NOT NULL"),
    )
    return table


def _copy_events(*, counted: bool) -> None:
    if op.get_context().dialect.name == "sqlite":
        kinds = {"sqlite_autoincrement": counted}
        with op.batch_alter_table("audit_events", copy_from=_events(), recreate="always", table_kwargs=kinds):
            pass


def upgrade() -> None:
    """Apply. No event is changed: what is there is sealed afterwards, in the background. SQLite copies the table."""
    _copy_events(counted=True)
    op.create_table(
        "audit_leaves",
        sa.Column("position", _KEY, autoincrement=False, nullable=False),
        sa.Column("event_id", sa.BigInteger(), nullable=False),
        sa.Column("salt", sa.LargeBinary(), nullable=True),
        sa.Column("leaf_hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("position", name=op.f("pk_audit_leaves")),
        sa.UniqueConstraint("event_id", name=op.f("uq_audit_leaves_event_id")),
    )
    op.create_table(
        "audit_tiles",
        sa.Column("level", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("index", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("hashes", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("level", "index", name=op.f("pk_audit_tiles")),
    )
    op.create_table(
        "audit_checkpoints",
        sa.Column("size", _KEY, autoincrement=False, nullable=False),
        sa.Column("root_hash", sa.Text(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("length(root_hash) = 64", name=op.f("ck_audit_checkpoints_root_hash")),
        sa.PrimaryKeyConstraint("size", name=op.f("pk_audit_checkpoints")),
    )
    op.create_table(
        "audit_door",
        sa.Column("transaction_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("transaction_id", name=op.f("pk_audit_door")),
    )
    for statement in protection(op.get_context().dialect.name, *TABLES):
        op.execute(statement)


def downgrade() -> None:
    """Take back. The log can be sealed anew, but no checkpoint that was kept elsewhere fits that one."""
    dialect = op.get_context().dialect.name
    for name in triggers(dialect, "audit_events"):
        op.execute(f"DROP TRIGGER {name}" + (" ON audit_events" if dialect == "postgresql" else ""))
    for name in ("audit_door", "audit_checkpoints", "audit_tiles", "audit_leaves"):
        op.drop_table(name)
    if dialect == "postgresql":
        op.execute("DROP FUNCTION audit_append_only()")
    _copy_events(counted=False)
