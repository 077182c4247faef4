"""Note the transaction of each audit event, by which followers see them in the order of their commits

Revision: 0002_transaction_id, after 0001_initial
"""

import sqlalchemy as sa
from alembic import op

from agent_gateway_store.storage.online import create_index

revision = "0002_transaction_id"
down_revision = "0001_initial"
branch_labels = None
depends_on = None

_NOT_NULL = sa.text("transaction_id IS NOT NULL")


def upgrade() -> None:
    """Apply. The column is added without a default first, so that no row is rewritten: old rows keep NULL."""
    on_postgresql = op.get_context().dialect.name == "postgresql"
    op.add_column(
        "audit_events",
        sa.Column("transaction_id", sa.BigInteger(), server_default=sa.text("NULL"), nullable=True),
        # SQLite does not know it, and needs it not: see `create_index`.
        if_not_exists=True if on_postgresql else None,
    )
    if on_postgresql:
        op.execute(
            "ALTER TABLE audit_events ALTER COLUMN transaction_id SET DEFAULT (pg_current_xact_id()::text::bigint)"
        )
    create_index(
        "ix_audit_events_transaction_id",
        "audit_events",
        ["transaction_id"],
        postgresql_where=_NOT_NULL,
        sqlite_where=_NOT_NULL,
    )


def downgrade() -> None:
    """Take back."""
    op.drop_index(
        op.f("ix_audit_events_transaction_id"),
        table_name="audit_events",
        postgresql_where=_NOT_NULL,
        sqlite_where=_NOT_NULL,
    )
    op.drop_column("audit_events", "transaction_id")
