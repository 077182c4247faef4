"""Create the five tables

Revision: 0001_initial, after
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001_initial"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "api_keys",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("caller_id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("key_hash", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("trust_level", sa.Integer(), nullable=False),
        sa.Column("environment", sa.Text(), nullable=False),
        sa.Column("is_active", sa.Boolean(), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("(CURRENT_TIMESTAMP)"), nullable=False
        ),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("previous_key_hash", sa.Text(), nullable=True),
        sa.Column("previous_key_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("trust_level BETWEEN 0 AND 4", name=op.f("ck_api_keys_trust_level")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("caller_id", "org_id", name=op.f("uq_api_keys_caller_id_org_id")),
        sa.UniqueConstraint("key_id", name=op.f("uq_api_keys_key_id")),
    )
    op.create_table(
        "approval_requests",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("approval_id", sa.Uuid(), nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("caller_id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("tool_call", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=False),
        sa.Column("tool_call_hash", sa.Text(), nullable=False),
        sa.Column("risk_explanation", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("use_before", sa.DateTime(timezone=True), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("output_payload", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=True),
        sa.Column("output_hash", sa.Text(), nullable=True),
        sa.Column("required_approvals", sa.Integer(), nullable=False),
        sa.Column("approver_id", sa.Text(), nullable=True),
        sa.Column("decision_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("approver_note", sa.Text(), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.CheckConstraint("scope IN ('EXECUTION', 'OUTPUT_RELEASE')", name=op.f("ck_approval_requests_scope")),
        sa.CheckConstraint(
            "status IN ('PENDING', 'APPROVED', 'DENIED', 'EXPIRED', 'CANCELLED', 'USED')",
            name=op.f("ck_approval_requests_status"),
        ),
        sa.CheckConstraint("length(token) = 64", name=op.f("ck_approval_requests_token")),
        sa.CheckConstraint("required_approvals >= 1", name=op.f("ck_approval_requests_required_approvals")),
        sa.CheckConstraint("version >= 1", name=op.f("ck_approval_requests_version")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_approval_requests")),
        sa.UniqueConstraint("approval_id", name=op.f("uq_approval_requests_approval_id")),
        sa.UniqueConstraint("token", name=op.f("uq_approval_requests_token")),
    )
    op.create_index(op.f("ix_approval_requests_created_at_id"), "approval_requests", ["created_at", "id"], unique=False)
    op.create_index(
        op.f("ix_approval_requests_org_id_created_at_id"),
        "approval_requests",
        ["org_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(op.f("ix_approval_requests_request_id"), "approval_requests", ["request_id"], unique=False)
    op.create_index(
        op.f("ix_approval_requests_status_created_at_id"),
        "approval_requests",
        ["status", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        "uq_approval_requests_pending_call",
        "approval_requests",
        ["org_id", "caller_id", "request_id", "tool_call_hash"],
        unique=True,
        postgresql_where=sa.text("status = 'PENDING'"),
        sqlite_where=sa.text("status = 'PENDING'"),
    )
    op.create_table(
        "audit_events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("trace_id", sa.Text(), nullable=True),
        sa.Column("session_id", sa.Text(), nullable=True),
        sa.Column("parent_request_id", sa.Text(), nullable=True),
        sa.Column("timestamp", sa.DateTime(timezone=True), nullable=False),
        sa.Column("caller_id", sa.Text(), nullable=False),
        sa.Column("caller_role", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("environment", sa.Text(), nullable=False),
        sa.Column("mcp_server", sa.Text(), nullable=False),
        sa.Column("tool_name", sa.Text(), nullable=False),
        sa.Column("raw_args_hash", sa.Text(), nullable=False),
        sa.Column("sanitized_args", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=False),
        sa.Column("risk_labels", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=False),
        sa.Column("risk_score", sa.Float(precision=53), nullable=False),
        sa.Column("matched_policy_rule", sa.Text(), nullable=False),
        sa.Column("policy_version", sa.Text(), nullable=True),
        sa.Column("decision", sa.Text(), nullable=False),
        sa.Column("approver_id", sa.Text(), nullable=True),
        sa.Column("execution_status", sa.Text(), nullable=True),
        sa.Column("latency_ms", sa.BigInteger(), nullable=False),
        sa.Column("output_hash", sa.Text(), nullable=True),
        sa.Column("output_decision", sa.Text(), nullable=False),
        sa.Column("output_policy_rationale", sa.Text(), nullable=True),
        sa.Column("redaction_flags", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=False),
        sa.Column("llm_explanation", sa.Text(), nullable=True),
        sa.Column("deterministic_rationale", sa.Text(), nullable=False),
        sa.Column("content_hash", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "decision IN ('ALLOW', 'DENY', 'APPROVAL_REQUIRED', 'SANITIZE_AND_ALLOW')",
            name=op.f("ck_audit_events_decision"),
        ),
        sa.CheckConstraint(
            "execution_status IN ('SUCCESS', 'TOOL_ERROR', 'TIMEOUT')", name=op.f("ck_audit_events_execution_status")
        ),
        sa.CheckConstraint(
            "output_decision IN ('ALLOW', 'REDACT', 'APPROVAL_REQUIRED', 'DENY')",
            name=op.f("ck_audit_events_output_decision"),
        ),
        sa.CheckConstraint("latency_ms >= 0", name=op.f("ck_audit_events_latency_ms")),
        sa.CheckConstraint("length(raw_args_hash) = 64", name=op.f("ck_audit_events_raw_args_hash")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_events")),
        sa.UniqueConstraint("request_id", "org_id", name=op.f("uq_audit_events_request_id_org_id")),
    )
    op.create_index(
        op.f("ix_audit_events_caller_id_timestamp_id"), "audit_events", ["caller_id", "timestamp", "id"], unique=False
    )
    op.create_index(
        op.f("ix_audit_events_decision_timestamp_id"), "audit_events", ["decision", "timestamp", "id"], unique=False
    )
    op.create_index(
        op.f("ix_audit_events_org_id_timestamp_id"), "audit_events", ["org_id", "timestamp", "id"], unique=False
    )
    op.create_index(
        op.f("ix_audit_events_session_id_timestamp_id"), "audit_events", ["session_id", "timestamp", "id"], unique=False
    )
    op.create_index(op.f("ix_audit_events_timestamp_id"), "audit_events", ["timestamp", "id"], unique=False)
    op.create_index(
        op.f("ix_audit_events_tool_name_timestamp_id"), "audit_events", ["tool_name", "timestamp", "id"], unique=False
    )
    op.create_table(
        "notification_deliveries",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("delivery_id", sa.Uuid(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("approval_id", sa.Uuid(), nullable=False),
        sa.Column("notifier", sa.Text(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("payload", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("delivered_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("event IN ('pending', 'decision')", name=op.f("ck_notification_deliveries_event")),
        sa.CheckConstraint("status IN ('DUE', 'DELIVERED', 'DEAD')", name=op.f("ck_notification_deliveries_status")),
        sa.CheckConstraint("attempts >= 0", name=op.f("ck_notification_deliveries_attempts")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_notification_deliveries")),
        sa.UniqueConstraint("delivery_id", name=op.f("uq_notification_deliveries_delivery_id")),
    )
    op.create_index(
        op.f("ix_notification_deliveries_approval_id"), "notification_deliveries", ["approval_id"], unique=False
    )
    op.create_index(
        op.f("ix_notification_deliveries_org_id_created_at_id"),
        "notification_deliveries",
        ["org_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        op.f("ix_notification_deliveries_status_next_attempt_at_id"),
        "notification_deliveries",
        ["status", "next_attempt_at", "id"],
        unique=False,
    )
    op.create_table(
        "approval_votes",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("approval_id", sa.Uuid(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("approver_id", sa.Text(), nullable=False),
        sa.Column("decision", sa.Text(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("voted_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("decision IN ('APPROVED', 'DENIED', 'CANCELLED')", name=op.f("ck_approval_votes_decision")),
        sa.ForeignKeyConstraint(
            ["approval_id"],
            ["approval_requests.approval_id"],
            name=op.f("fk_approval_votes_approval_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_approval_votes")),
        sa.UniqueConstraint("approval_id", "approver_id", name=op.f("uq_approval_votes_approval_id_approver_id")),
    )


def downgrade() -> None:
    """Take back."""
    op.drop_table("approval_votes")
    op.drop_index(op.f("ix_notification_deliveries_status_next_attempt_at_id"), table_name="notification_deliveries")
    op.drop_index(op.f("ix_notification_deliveries_org_id_created_at_id"), table_name="notification_deliveries")
    op.drop_index(op.f("ix_notification_deliveries_approval_id"), table_name="notification_deliveries")
    op.drop_table("notification_deliveries")
    op.drop_index(op.f("ix_audit_events_tool_name_timestamp_id"), table_name="audit_events")
    op.drop_index(op.f("ix_audit_events_timestamp_id"), table_name="audit_events")
    op.drop_index(op.f("ix_audit_events_session_id_timestamp_id"), table_name="audit_events")
    op.drop_index(op.f("ix_audit_events_org_id_timestamp_id"), table_name="audit_events")
    op.drop_index(op.f("ix_audit_events_decision_timestamp_id"), table_name="audit_events")
    op.drop_index(op.f("ix_audit_events_caller_id_timestamp_id"), table_name="audit_events")
    op.drop_table("audit_events")
    op.drop_index(
        "uq_approval_requests_pending_call",
        table_name="approval_requests",
        postgresql_where=sa.text("status = 'PENDING'"),
        sqlite_where=sa.text("status = 'PENDING'"),
    )
    op.drop_index(op.f("ix_approval_requests_status_created_at_id"), table_name="approval_requests")
    op.drop_index(op.f("ix_approval_requests_request_id"), table_name="approval_requests")
    op.drop_index(op.f("ix_approval_requests_org_id_created_at_id"), table_name="approval_requests")
    op.drop_index(op.f("ix_approval_requests_created_at_id"), table_name="approval_requests")
    op.drop_table("approval_requests")
    op.drop_table("api_keys")
