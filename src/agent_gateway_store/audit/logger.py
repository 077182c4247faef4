"""`AuditLogger(session)`: writes audit events for a gateway that owns its session."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store.audit.backends import insert_event
from agent_gateway_store.audit.outcomes import WriteOutcome, log_lost
from agent_gateway_store.audit.record import EncodedRow
from agent_gateway_store.audit.writes import encode_aside
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.storage.database import SessionTransactions
from agent_gateway_store.telemetry import current_trace_id


class AuditLogger:
    """Writes audit events through a session that the caller owns.

    Args:
        session: Committed by each write, and left usable whatever happens. Events that fail are not spooled.

    Raises:
        TypeError: `session` is not an AsyncSession.
        ValueError: The store cannot work in this session: the sentence says what to give in its place.
    """

    def __init__(self, session: AsyncSession) -> None:
        self._transactions = SessionTransactions(session, AuditEvent)

    async def write(self, event: AuditEvent) -> WriteOutcome:
        """Store `event` and commit the session. Never raises: what cannot be stored is logged as LOST.

        Returns:
            STORED, DUPLICATE or LOST.
        """
        row: EncodedRow | None = None
        try:
            row = await encode_aside(event, trace_id=current_trace_id())
            async with self._transactions.write() as connection:
                return await insert_event(connection, row)
        except Exception as exc:
            log_lost(row, exc, request_id=event.request_id if issubclass(type(event), AuditEvent) else "")
            return WriteOutcome.LOST
