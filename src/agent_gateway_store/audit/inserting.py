"""Insert rows one by one through SQLAlchemy, and settle a used request_id. The way that works on every connection."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from agent_gateway_store.audit.outcomes import WriteOutcome
from agent_gateway_store.audit.record import EncodedRow, hash_of, key_of, to_values, with_derived_id
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.storage.database import SqlConnection, dialect_of

__all__ = ["insert_event", "table"]

table = AuditEvent.__table__  # type: ignore[attr-defined]


async def insert_event(connection: SqlConnection, record: EncodedRow) -> WriteOutcome:
    """Insert one record; does not commit.

    The same event again changes nothing (DUPLICATE). Another event under a used request_id becomes a row of its own
    with a derived id and the label REQUEST_ID_REUSED (STORED).
    """
    insert = postgresql.insert if dialect_of(connection) == "postgresql" else sqlite.insert
    while True:
        statement = insert(table).values(to_values(record)).on_conflict_do_nothing().returning(table.c.id)
        if (await connection.execute(statement)).first() is not None:
            return WriteOutcome.STORED
        request_id, org_id = key_of(record)
        held = select(table.c.content_hash).where(table.c.request_id == request_id, table.c.org_id == org_id)
        if (await connection.execute(held)).scalar() == hash_of(record):
            return WriteOutcome.DUPLICATE
        # Also where somebody took the derived id beforehand: the next one differs again.
        record = with_derived_id(record)
