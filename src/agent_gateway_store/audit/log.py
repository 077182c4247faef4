"""Write audit events: stored once, never in the caller's way."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store.audit.lost import log_lost
from agent_gateway_store.audit.query import AuditQuery
from agent_gateway_store.audit.row import event_row, reused_row
from agent_gateway_store.errors import AuditUnavailableError
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.storage.database import Database, Executor, SessionWork, Work, dialect_of
from agent_gateway_store.storage.faults import database_errors

__all__ = ["AuditLog", "AuditLogger", "WriteOutcome", "insert_event"]

_table = AuditEvent.__table__  # type: ignore[attr-defined]


class WriteOutcome(StrEnum):
    """What became of a write.

    STORED: committed. DUPLICATE: the same event was there already. SPOOLED: kept in the local spool, on disk, until
    the database is back. LOST: neither could be had; the event was logged at CRITICAL.
    """

    STORED = "STORED"
    DUPLICATE = "DUPLICATE"
    SPOOLED = "SPOOLED"
    LOST = "LOST"


async def insert_event(executor: Executor, row: dict[str, Any]) -> WriteOutcome:
    """Insert one row of `event_row`, settling a used request_id; does not commit.

    The same event again changes nothing (DUPLICATE). Another event under a used request_id becomes a row of its own
    with a derived id and the label REQUEST_ID_REUSED (STORED).
    """
    if await _insert(executor, row):
        return WriteOutcome.STORED
    if await _is_stored(executor, row):
        return WriteOutcome.DUPLICATE
    return WriteOutcome.STORED if await _insert(executor, reused_row(row)) else WriteOutcome.DUPLICATE


async def _insert(executor: Executor, row: dict[str, Any]) -> bool:
    postgres = dialect_of(executor) == "postgresql"
    insert = (postgresql.insert if postgres else sqlite.insert)(_table).values(row).on_conflict_do_nothing()
    return (await executor.execute(insert.returning(_table.c.id))).first() is not None


async def _is_stored(executor: Executor, row: dict[str, Any]) -> bool:
    same = select(_table.c.content_hash).where(
        _table.c.request_id == row["request_id"], _table.c.org_id == row["org_id"]
    )
    return bool((await executor.execute(same)).scalar() == row["content_hash"])


class AuditLogger:
    """Writes audit events through a session that the caller owns.

    Args:
        session: Committed by each write, and left usable whatever happens. There is no spool behind it.
    """

    def __init__(self, session: AsyncSession) -> None:
        self._work: Work = SessionWork(session)

    async def write(self, event: AuditEvent) -> WriteOutcome:
        """Store `event` and commit the session. Never raises: what cannot be stored is logged as LOST.

        Returns:
            STORED, DUPLICATE or LOST.
        """
        row: dict[str, Any] | None = None
        try:
            row = event_row(event)
            async with self._work.write() as session:
                return await insert_event(session, row)
        except Exception as exc:
            log_lost(row, event, exc)
            return WriteOutcome.LOST


class AuditLog(AuditQuery):
    """`store.audit`: writes and reads audit events.

    Args:
        database: Where they are kept.
        org_id: Stamp this organisation on what is written and see only it; None takes the event's own and sees all.
        strict: Whether `write` raises rather than lose an event.
    """

    def __init__(self, database: Database, *, org_id: str | None = None, strict: bool = False) -> None:
        self._database = database
        self._work = database
        self._org_id = org_id
        self._strict = strict

    async def write(self, event: AuditEvent) -> WriteOutcome:
        """Store `event` and commit. In the default mode this never raises.

        Safe to repeat: the same event again is a DUPLICATE and changes nothing.

        Returns:
            STORED, DUPLICATE or LOST.

        Raises:
            AuditUnavailableError: With AUDIT_MODE=strict, if the event could not be stored.
            StoreNotOpenError: The store is not open here.
        """
        self._database.check_home()
        row: dict[str, Any] | None = None
        try:
            row = event_row(event, org_id=self._org_id)
            async with self._database.write() as connection:
                return await insert_event(connection, row)
        except Exception as exc:
            if self._strict:
                raise AuditUnavailableError(
                    "The event could not be recorded, so the call must not go through: check the database."
                ) from exc
            log_lost(row, event, exc)
            return WriteOutcome.LOST

    async def record(self, event: AuditEvent, *, session: AsyncSession) -> WriteOutcome:
        """Store `event` in the transaction of `session`: it is committed or rolled back with the caller's work.

        Returns:
            STORED or DUPLICATE.

        Raises:
            StoreUnavailableError: The database could not take it.
        """
        with database_errors("record the event"):
            return await insert_event(session, event_row(event, org_id=self._org_id))
