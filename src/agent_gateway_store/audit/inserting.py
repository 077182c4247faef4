"""Insert rows one by one through SQLAlchemy, and settle a used request_id. The way that works on every connection."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from agent_gateway_store.audit.outcomes import WriteOutcome
from agent_gateway_store.audit.row import Record, hash_of, key_of, under_derived_id, values_of
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.storage.database import Executor, dialect_of

__all__ = ["insert_event", "table"]

table = AuditEvent.__table__  # type: ignore[attr-defined]


async def insert_event(executor: Executor, record: Record) -> WriteOutcome:
    """Insert one record; does not commit.

    The same event again changes nothing (DUPLICATE). Another event under a used request_id becomes a row of its own
    with a derived id and the label REQUEST_ID_REUSED (STORED).
    """
    insert = postgresql.insert if dialect_of(executor) == "postgresql" else sqlite.insert
    while True:
        statement = insert(table).values(values_of(record)).on_conflict_do_nothing().returning(table.c.id)
        if (await executor.execute(statement)).first() is not None:
            return WriteOutcome.STORED
        request_id, org_id = key_of(record)
        held = select(table.c.content_hash).where(table.c.request_id == request_id, table.c.org_id == org_id)
        if (await executor.execute(held)).scalar() == hash_of(record):
            return WriteOutcome.DUPLICATE
        # Also where somebody took the derived id beforehand: the next one differs again.
        record = under_derived_id(record)
