"""Find the due deliveries of one notifier, however many wait for another

Revision: 0003_due_by_notifier, after 0002_transaction_id
"""

from alembic import op

from agent_gateway_store.storage.online import create_index

revision = "0003_due_by_notifier"
down_revision = "0002_transaction_id"
branch_labels = None
depends_on = None

_INDEX = "ix_notification_deliveries_status_notifier_next_attempt_at_id"


def upgrade() -> None:
    """Apply."""
    create_index(_INDEX, "notification_deliveries", ["status", "notifier", "next_attempt_at", "id"])


def downgrade() -> None:
    """Take back."""
    op.drop_index(op.f(_INDEX), table_name="notification_deliveries")
