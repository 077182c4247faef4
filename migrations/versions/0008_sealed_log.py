"""Make room for the sealed log: a leaf for each event, the hashes above them, and checkpoints

Revision: 0008_sealed_log, after 0007_key_history
"""

import sqlalchemy as sa
from alembic import op

revision = "0008_sealed_log"
down_revision = "0007_key_history"
branch_labels = None
depends_on = None

# On SQLite only INTEGER is the row's own key.
_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Apply."""
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


def downgrade() -> None:
    """Take back, and with it the log: a later upgrade begins another one."""
    for table in ("audit_checkpoints", "audit_tiles", "audit_leaves"):
        op.drop_table(table)
