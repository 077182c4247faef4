"""Let an event hold the approval that released its call, and what has no column of its own

Revision: 0006_event_extra, after 0004_execution_status
"""

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError
from sqlalchemy.dialects import postgresql

revision = "0006_event_extra"
down_revision = "0005_database_identity"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply. With a constant as its default a column is added without a rewrite of the rows."""
    op.add_column("audit_events", sa.Column("approval_id", sa.Uuid(), nullable=True))
    json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
    op.add_column("audit_events", sa.Column("extra", json, server_default=sa.text("'{}'"), nullable=False))


def downgrade() -> None:
    """Take back, unless an event uses a column: without it the event would not fit its hash."""
    if not op.get_context().as_sql:
        used = "SELECT count(*) FROM audit_events WHERE approval_id IS NOT NULL OR extra <> '{}'"
        if count := op.get_bind().scalar(sa.text(used)):
            raise CommandError(
                f"{count} audit events have an approval_id or something in extra, which the older schema does not "
                "know: export them, go down to 0007_key_history, delete them there, and go on, or stay "
                "at this revision."
            )
    op.drop_column("audit_events", "extra")
    op.drop_column("audit_events", "approval_id")
