"""Find audit events again: newest first, as objects that need no session."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store.models.audit import AuditEvent, Decision
from agent_gateway_store.models.scrub import storable_key
from agent_gateway_store.results import Page
from agent_gateway_store.storage.database import SessionWork, Work

__all__ = ["COLUMNS", "AuditQuery"]

COLUMNS = (
    "timestamp",
    "request_id",
    "caller_id",
    "mcp_server",
    "tool_name",
    "decision",
    "execution_status",
    "latency_ms",
    "risk_labels",
)
_table = AuditEvent.__table__  # type: ignore[attr-defined]


class AuditQuery:
    """Reads audit events. Order: newest first by `timestamp`, ties broken by `id`.

    Args:
        session: A session of the caller's; it is neither committed nor closed. The events returned are detached.
        org_id: See only this organisation; None sees all.
    """

    def __init__(self, session: AsyncSession, *, org_id: str | None = None) -> None:
        self._work: Work = SessionWork(session)
        self._org_id = org_id

    @classmethod
    def over(cls, work: Work, *, org_id: str | None = None) -> AuditQuery:
        """Return a query that opens its own transactions."""
        query = cls.__new__(cls)
        query._work, query._org_id = work, org_id
        return query

    async def get_by_request_id(self, request_id: str) -> AuditEvent | None:
        """Return the event with this `request_id`, or None.

        Across organisations the id may be used several times; the newest is returned.
        """
        found = await self._page(self._newest().where(_table.c.request_id == storable_key(request_id)).limit(1))
        return found[0] if found else None

    async def list_by_caller(self, caller_id: str, limit: int = 50, offset: int = 0) -> Page[AuditEvent]:
        """Return up to `limit` events of one caller, after skipping `offset`."""
        statement = self._newest().where(_table.c.caller_id == storable_key(caller_id))
        return await self._page(
            statement.limit(_at_least_zero(limit, "limit")).offset(_at_least_zero(offset, "offset"))
        )

    async def list_by_decision(self, decision: Decision | str, limit: int = 50) -> Page[AuditEvent]:
        """Return up to `limit` events with this decision.

        Raises:
            ValueError: There is no such decision.
        """
        statement = self._newest().where(_table.c.decision == Decision(decision))
        return await self._page(statement.limit(_at_least_zero(limit, "limit")))

    async def list_recent(self, limit: int = 100) -> Page[AuditEvent]:
        """Return the `limit` newest events."""
        return await self._page(self._newest().limit(_at_least_zero(limit, "limit")))

    def _newest(self) -> Select[Any]:
        statement = select(_table).order_by(_table.c.timestamp.desc(), _table.c.id.desc())
        return statement if self._org_id is None else statement.where(_table.c.org_id == self._org_id)

    async def _page(self, statement: Select[Any]) -> Page[AuditEvent]:
        async with self._work.read() as executor:
            rows = (await executor.execute(statement)).mappings().all()
        return Page((AuditEvent.from_row(row) for row in rows), columns=COLUMNS, record_type=AuditEvent)


def _at_least_zero(value: int, name: str) -> int:
    if value < 0:
        raise ValueError(f"{name} must be zero or more, not {value}.")
    return value
