"""What was shipped to sinks, and what they refused

Revision: 0014_shipping, after 0013_retention
"""

import sqlalchemy as sa
from alembic import op

revision = "0014_shipping"
down_revision = "0013_retention"
branch_labels = None
depends_on = None

_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "audit_sinks",
        sa.Column("sink", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("cursor", sa.Text(), nullable=False),
        sa.Column("moved_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("sink", "org_id", name=op.f("pk_audit_sinks")),
        if_not_exists=True,
    )
    op.create_table(
        "audit_dead_letters",
        sa.Column("id", _KEY, nullable=False),
        sa.Column("sink", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("event_id", sa.BigInteger(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("is_due", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_dead_letters")),
        sa.UniqueConstraint("sink", "org_id", "event_id", name=op.f("uq_audit_dead_letters_sink_org_id_event_id")),
        if_not_exists=True,
    )


def downgrade() -> None:
    """Take back. Every sink begins anew afterwards, and nothing tells what was refused."""
    op.drop_table("audit_dead_letters")
    op.drop_table("audit_sinks")
