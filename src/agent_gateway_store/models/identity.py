"""The identity of a database: one row, which a migration makes."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Column, Integer, Table, Text

from agent_gateway_store.models.base import metadata

identity_table = Table(
    "database_identity",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("identity", Text, nullable=False),
    # The highest id of an event from before `db restored`, which followers take for history; None: it never ran.
    Column("history_id", BigInteger),
    CheckConstraint("id = 1", name="one_row"),
)
