"""Keep the rows of revoked API keys: a caller has one active key, and any number of revoked ones

Revision: 0007_key_history, after 0006_event_extra
"""

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError

revision = "0007_key_history"
down_revision = "0006_event_extra"
branch_labels = None
depends_on = None

_OLD = "uq_api_keys_caller_id_org_id"
_ACTIVE = sa.text("is_active")
_PAIR = ["caller_id", "org_id"]


def _keys(*more: sa.UniqueConstraint) -> sa.Table:
    """The table as it stands on SQLite, which changes a constraint only by copying its table."""
    return sa.Table(
        "api_keys",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("caller_id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("key_hash", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("trust_level", sa.Integer(), nullable=False),
        sa.Column("environment", sa.Text(), nullable=False),
        sa.Column("is_active", sa.Boolean(), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("(CURRENT_TIMESTAMP)"), nullable=False
        ),
        *(
            sa.Column(name, sa.DateTime(timezone=True), nullable=True)
            for name in ("last_used_at", "expires_at", "revoked_at")
        ),
        sa.Column("previous_key_hash", sa.Text(), nullable=True),
        sa.Column("previous_key_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("trust_level BETWEEN 0 AND 4", name="ck_api_keys_trust_level"),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("key_id", name="uq_api_keys_key_id"),
        *more,
    )


def upgrade() -> None:
    """Apply. On PostgreSQL the new index is there before the constraint goes."""
    if op.get_context().dialect.name == "sqlite":
        old = _keys(sa.UniqueConstraint(*_PAIR, name=_OLD))
        with op.batch_alter_table("api_keys", copy_from=old, recreate="always") as batch:
            batch.drop_constraint(op.f(_OLD), type_="unique")
    op.create_index(
        "uq_api_keys_active_caller",
        "api_keys",
        _PAIR,
        unique=True,
        postgresql_where=_ACTIVE,
        sqlite_where=_ACTIVE,
    )
    op.create_index(op.f("ix_api_keys_caller_id_org_id"), "api_keys", _PAIR, unique=False)
    if op.get_context().dialect.name != "sqlite":
        op.drop_constraint(op.f(_OLD), "api_keys", type_="unique")


def downgrade() -> None:
    """Take back, unless a caller has several keys: which one goes is not for us to say."""
    if not op.get_context().as_sql:
        several = "SELECT caller_id, org_id FROM api_keys GROUP BY caller_id, org_id HAVING count(*) > 1"
        if count := op.get_bind().scalar(sa.text(f"SELECT count(*) FROM ({several}) AS found")):  # noqa: S608
            raise CommandError(
                f"{count} callers have revoked API keys beside another one, which the older schema cannot hold: delete "
                "the revoked rows first, or stay at this revision."
            )
    op.drop_index(op.f("ix_api_keys_caller_id_org_id"), table_name="api_keys")
    op.drop_index("uq_api_keys_active_caller", table_name="api_keys", postgresql_where=_ACTIVE, sqlite_where=_ACTIVE)
    if op.get_context().dialect.name == "sqlite":
        with op.batch_alter_table("api_keys", copy_from=_keys(), recreate="always") as batch:
            batch.create_unique_constraint(op.f(_OLD), _PAIR)
        return
    op.create_unique_constraint(op.f(_OLD), "api_keys", _PAIR)
