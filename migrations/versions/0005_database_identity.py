"""Give each database an identity of its own, whatever its URL is

Revision: 0005_database_identity, after 0004_execution_status
"""

import sqlalchemy as sa
from alembic import op

revision = "0005_database_identity"
down_revision = "0004_execution_status"
branch_labels = None
depends_on = None

# By the database, so that a printed script gives a new identity wherever it is run: 128 random bits in hex.
_RANDOM = {"postgresql": "replace(gen_random_uuid()::text, '-', '')", "sqlite": "lower(hex(randomblob(16)))"}


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "database_identity",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("identity", sa.Text(), nullable=False),
        sa.Column("history_id", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("id = 1", name=op.f("ck_database_identity_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_database_identity")),
    )
    random = _RANDOM[op.get_context().dialect.name]
    op.execute(f"INSERT INTO database_identity (id, identity) SELECT 1, {random}")


def downgrade() -> None:
    """Take back. A later upgrade gives another identity."""
    op.drop_table("database_identity")
