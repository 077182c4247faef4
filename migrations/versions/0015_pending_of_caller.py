"""An index for how many wait for one caller; those of what is overdue serve no other statement

PostgreSQL, on a table that is still small, takes any index for as good as another, and keeps that plan while it grows.

Revision: 0015_pending_of_caller, after 0014_shipping
"""

from collections.abc import Mapping

import sqlalchemy as sa
from alembic import op

from agent_gateway_store.storage.online import create_index

revision = "0015_pending_of_caller"
down_revision = "0014_shipping"
branch_labels = None
depends_on = None

_TABLE = "approval_requests"
_COUNTED = "ix_approval_requests_org_id_caller_id_expires_at"
_COLUMNS = {"PENDING": ["expires_at"], "APPROVED": ["use_before", "expires_at"]}


def upgrade() -> None:
    """Apply."""
    _build({status: f"status = '{status}' AND version > 0" for status in _COLUMNS})
    where = sa.text("status = 'PENDING' AND required_approvals > 0")
    create_index(_COUNTED, _TABLE, ["org_id", "caller_id", "expires_at"], postgresql_where=where, sqlite_where=where)


def downgrade() -> None:
    """Take back."""
    op.drop_index(op.f(_COUNTED), table_name=_TABLE, if_exists=True)
    _build({status: f"status = '{status}'" for status in _COLUMNS})


def _build(conditions: Mapping[str, str]) -> None:
    for status, columns in _COLUMNS.items():
        name, where = f"ix_{_TABLE}_{'_'.join(columns)}", sa.text(conditions[status])
        op.drop_index(op.f(name), table_name=_TABLE, if_exists=True)
        create_index(name, _TABLE, columns, postgresql_where=where, sqlite_where=where)
