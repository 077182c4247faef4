"""Find what is overdue by its deadline, however many approvals there are

Revision: 0009_deadlines, after 0007_key_history
"""

import sqlalchemy as sa
from alembic import op

from agent_gateway_store.storage.online import create_index

revision = "0009_deadlines"
down_revision = "0007_key_history"
branch_labels = None
depends_on = None

_INDEXES = {
    "ix_approval_requests_expires_at": (["expires_at"], sa.text("status = 'PENDING'")),
    "ix_approval_requests_use_before_expires_at": (["use_before", "expires_at"], sa.text("status = 'APPROVED'")),
}


def upgrade() -> None:
    """Apply."""
    for name, (columns, where) in _INDEXES.items():
        create_index(name, "approval_requests", columns, postgresql_where=where, sqlite_where=where)


def downgrade() -> None:
    """Take back."""
    for name in _INDEXES:
        op.drop_index(op.f(name), table_name="approval_requests")
