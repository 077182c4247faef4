"""Insert rows one by one through SQLAlchemy, and settle a used request_id. The way that works on every connection."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from agent_gateway_store.audit.outcomes import WriteOutcome
from agent_gateway_store.audit.row import EventRow
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.storage.database import Executor, dialect_of

__all__ = ["insert_event", "table"]

table = AuditEvent.__table__  # type: ignore[attr-defined]


async def insert_event(executor: Executor, row: EventRow) -> WriteOutcome:
    """Insert one row; does not commit.

    The same event again changes nothing (DUPLICATE). Another event under a used request_id becomes a row of its own
    with a derived id and the label REQUEST_ID_REUSED (STORED).
    """
    insert = postgresql.insert if dialect_of(executor) == "postgresql" else sqlite.insert
    while True:
        statement = insert(table).values(row.values).on_conflict_do_nothing().returning(table.c.id)
        if (await executor.execute(statement)).first() is not None:
            return WriteOutcome.STORED
        held = select(table.c.content_hash).where(
            table.c.request_id == row.values["request_id"], table.c.org_id == row.values["org_id"]
        )
        if (await executor.execute(held)).scalar() == row.content_hash:
            return WriteOutcome.DUPLICATE
        # Also where somebody took the derived id beforehand: the next one differs again.
        row = row.under_derived_id()
