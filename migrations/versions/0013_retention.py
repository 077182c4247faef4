"""Holds, and the runs of prunes

Revision: 0013_retention, after 0012_event_approval
"""

import sqlalchemy as sa
from alembic import op

revision = "0013_retention"
down_revision = "0012_event_approval"
branch_labels = None
depends_on = None

_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_JSON = sa.JSON().with_variant(sa.dialects.postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "audit_holds",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("placed_by", sa.Text(), nullable=False),
        sa.Column("placed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("filters", _JSON, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_audit_holds")),
        if_not_exists=True,
    )
    op.create_table(
        "audit_prunes",
        sa.Column("id", _KEY, nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("pruned_by", sa.Text(), nullable=False),
        sa.Column("pruned_before", sa.DateTime(timezone=True), nullable=False),
        sa.Column("archive", sa.Text(), nullable=True),
        sa.Column("events", sa.BigInteger(), nullable=False),
        sa.Column("result", sa.Text(), nullable=True),
        sa.Column("last_event_id", sa.BigInteger(), nullable=True),
        sa.Column("last_transaction_id", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("events >= 0", name=op.f("ck_audit_prunes_events")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_prunes")),
        if_not_exists=True,
    )


def downgrade() -> None:
    """Take back. Holds are gone with it: events that were kept by one can be pruned afterwards."""
    op.drop_table("audit_prunes")
    op.drop_table("audit_holds")
