"""Note the transaction of each audit event, by which followers see them in the order of their commits

Revision: 0002_transaction_id, after 0001_initial
"""

import sqlalchemy as sa
from alembic import op

revision = "0002_transaction_id"
down_revision = "0001_initial"
branch_labels = None
depends_on = None

_NOT_NULL = sa.text("transaction_id IS NOT NULL")


def upgrade() -> None:
    """Apply. The column is added without a default first, so that no row is rewritten: old rows keep NULL."""
    op.add_column(
        "audit_events", sa.Column("transaction_id", sa.BigInteger(), server_default=sa.text("NULL"), nullable=True)
    )
    if op.get_context().dialect.name == "postgresql":
        op.execute(
            "ALTER TABLE audit_events ALTER COLUMN transaction_id SET DEFAULT (pg_current_xact_id()::text::bigint)"
        )
    op.create_index(
        op.f("ix_audit_events_transaction_id"),
        "audit_events",
        ["transaction_id"],
        unique=False,
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
