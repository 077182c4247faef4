"""Find what is overdue, and what is old enough to be pruned, however many rows there are

Revision: 0011_deadlines, after 0010_acquire
"""

import sqlalchemy as sa
from alembic import op

from agent_gateway_store.storage.online import create_index

revision = "0011_deadlines"
down_revision = "0010_acquire"
branch_labels = None
depends_on = None

_INDEXES = (
    ("approval_requests", ["expires_at"], "PENDING"),
    ("approval_requests", ["use_before", "expires_at"], "APPROVED"),
    ("notification_deliveries", ["delivered_at"], "DELIVERED"),
)


def upgrade() -> None:
    """Apply."""
    for table, columns, status in _INDEXES:
        where = sa.text(f"status = '{status}'")
        create_index(_name(table, columns), table, columns, postgresql_where=where, sqlite_where=where)


def downgrade() -> None:
    """Take back."""
    for table, columns, _ in _INDEXES:
        op.drop_index(op.f(_name(table, columns)), table_name=table)


def _name(table: str, columns: list[str]) -> str:
    return f"ix_{table}_{'_'.join(columns)}"
