"""Let an event say that its call was cancelled, or that its output was released by an approval

Revision: 0004_execution_status, after 0003_due_by_notifier
"""

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError

from agent_gateway_store.storage.online import create_check

revision = "0004_execution_status"
down_revision = "0003_due_by_notifier"
branch_labels = None
depends_on = None

_NAME = "ck_audit_events_execution_status"
_OLD = "execution_status IN ('SUCCESS', 'TOOL_ERROR', 'TIMEOUT')"
_NEW = "execution_status IN ('SUCCESS', 'TOOL_ERROR', 'TIMEOUT', 'CANCELLED', 'APPROVED_OUTPUT_RELEASE')"
_JSON = sa.JSON()


def _events(check: str) -> sa.Table:
    """The table as it stands on SQLite, which changes a constraint only by copying its table."""
    columns: tuple[tuple[str, sa.types.TypeEngine, bool], ...] = (
        ("request_id", sa.Text(), False),
        ("org_id", sa.Text(), False),
        ("trace_id", sa.Text(), True),
        ("session_id", sa.Text(), True),
        ("parent_request_id", sa.Text(), True),
        ("timestamp", sa.DateTime(timezone=True), False),
        ("caller_id", sa.Text(), False),
        ("caller_role", sa.Text(), False),
        ("key_id", sa.Text(), True),
        ("environment", sa.Text(), False),
        ("mcp_server", sa.Text(), False),
        ("tool_name", sa.Text(), False),
        ("raw_args_hash", sa.Text(), False),
        ("sanitized_args", _JSON, False),
        ("risk_labels", _JSON, False),
        ("risk_score", sa.Float(precision=53), False),
        ("matched_policy_rule", sa.Text(), False),
        ("policy_version", sa.Text(), True),
        ("decision", sa.Text(), False),
        ("approver_id", sa.Text(), True),
        ("execution_status", sa.Text(), True),
        ("latency_ms", sa.BigInteger(), False),
        ("output_hash", sa.Text(), True),
        ("output_decision", sa.Text(), False),
        ("output_policy_rationale", sa.Text(), True),
        ("redaction_flags", _JSON, False),
        ("llm_explanation", sa.Text(), True),
        ("deterministic_rationale", sa.Text(), False),
        ("content_hash", sa.Text(), True),
    )
    table = sa.Table(
        "audit_events",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), nullable=False),
        *(sa.Column(name, kind, nullable=nullable) for name, kind, nullable in columns),
        sa.Column("transaction_id", sa.BigInteger(), server_default=sa.text("NULL"), nullable=True),
        sa.CheckConstraint(
            "decision IN ('ALLOW', 'DENY', 'APPROVAL_REQUIRED', 'SANITIZE_AND_ALLOW')",
            name="ck_audit_events_decision",
        ),
        sa.CheckConstraint(check, name=_NAME),
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


def _change(old: str, new: str) -> None:
    if op.get_context().dialect.name == "sqlite":
        with op.batch_alter_table("audit_events", copy_from=_events(old), recreate="always") as batch:
            batch.drop_constraint(op.f(_NAME), type_="check")
            batch.create_check_constraint(op.f(_NAME), new)
        return
    create_check(_NAME, "audit_events", new)


def upgrade() -> None:
    """Apply. PostgreSQL reads the table once, a large one while others write to it; SQLite copies it."""
    _change(_OLD, _NEW)


def downgrade() -> None:
    """Take back, unless an event has one of the new words: what was recorded is not rewritten."""
    if not op.get_context().as_sql:
        count = op.get_bind().scalar(
            sa.text(
                "SELECT count(*) FROM audit_events WHERE execution_status IN ('CANCELLED', 'APPROVED_OUTPUT_RELEASE')"
            )
        )
        if count:
            raise CommandError(
                f"{count} audit events have the execution_status CANCELLED or APPROVED_OUTPUT_RELEASE, which the older "
                "schema does not know: export them, go down to 0007_key_history, delete them there, and go on, or stay "
                "at this revision."
            )
    _change(_NEW, _OLD)
