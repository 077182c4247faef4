"""An index for the calls that an approval released

Revision: 0012_event_approval, after 0011_deadlines
"""

import sqlalchemy as sa
from alembic import op

from agent_gateway_store.storage.online import create_index

revision = "0012_event_approval"
down_revision = "0011_deadlines"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    released = sa.text("approval_id IS NOT NULL")
    create_index(
        "ix_audit_events_approval_id",
        "audit_events",
        ["approval_id"],
        postgresql_where=released,
        sqlite_where=released,
    )


def downgrade() -> None:
    """Take back."""
    op.drop_index(op.f("ix_audit_events_approval_id"), table_name="audit_events")
