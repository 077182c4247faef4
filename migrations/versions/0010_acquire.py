"""Approvals that are acquired, beside those asked for by token; indexes for calls inside calls and for intents

Revision: 0010_acquire, after 0008_sealed_log
"""

import sqlalchemy as sa
from alembic import op

from agent_gateway_store.storage.online import create_index

revision = "0010_acquire"
down_revision = "0008_sealed_log"
branch_labels = None
depends_on = None

_TABLE = "approval_requests"
_CALL = ["org_id", "caller_id", "request_id", "tool_call_hash"]


def upgrade() -> None:
    """Apply. The new unique index is there before the old one goes."""
    is_sqlite = op.get_context().dialect.name == "sqlite"
    op.add_column(_TABLE, sa.Column("acquire_key", sa.Text()), if_not_exists=None if is_sqlite else True)
    issued = sa.text("status = 'PENDING' AND acquire_key IS NULL")
    create_index(
        "uq_approval_requests_issued_call", _TABLE, _CALL, unique=True, postgresql_where=issued, sqlite_where=issued
    )
    standing = sa.text("status IN ('PENDING', 'APPROVED') AND acquire_key IS NOT NULL")
    create_index(
        "uq_approval_requests_acquired_call",
        _TABLE,
        ["org_id", "caller_id", "acquire_key"],
        unique=True,
        postgresql_where=standing,
        sqlite_where=standing,
    )
    acquired = sa.text("acquire_key IS NOT NULL")
    create_index(
        "ix_approval_requests_acquire_key_decision_at",
        _TABLE,
        ["acquire_key", "decision_at"],
        postgresql_where=acquired,
        sqlite_where=acquired,
    )
    op.drop_index(op.f("uq_approval_requests_pending_call"), table_name=_TABLE, if_exists=True)
    nested = sa.text("parent_request_id IS NOT NULL")
    create_index(
        "ix_audit_events_parent_request_id",
        "audit_events",
        ["parent_request_id"],
        postgresql_where=nested,
        sqlite_where=nested,
    )
    create_index(
        "ix_audit_events_intents",
        "audit_events",
        ["timestamp", "id"],
        postgresql_where=sa.text("extra ->> 'phase' = 'intent'"),
        sqlite_where=sa.text("json_extract(extra, '$.phase') = 'intent'"),
    )


def downgrade() -> None:
    """Take back. What was acquired and still stands is cancelled: the older schema would take it for asked by token."""
    for name in ("ix_audit_events_intents", "ix_audit_events_parent_request_id"):
        op.drop_index(op.f(name), table_name="audit_events")
    op.execute(
        "UPDATE approval_requests SET status = 'CANCELLED', version = version + 1"
        " WHERE status IN ('PENDING', 'APPROVED') AND acquire_key IS NOT NULL"
    )
    pending = sa.text("status = 'PENDING'")
    op.create_index(
        "uq_approval_requests_pending_call", _TABLE, _CALL, unique=True, postgresql_where=pending, sqlite_where=pending
    )
    for name in (
        "ix_approval_requests_acquire_key_decision_at",
        "uq_approval_requests_acquired_call",
        "uq_approval_requests_issued_call",
    ):
        op.drop_index(op.f(name), table_name=_TABLE)
    op.drop_column(_TABLE, "acquire_key")
