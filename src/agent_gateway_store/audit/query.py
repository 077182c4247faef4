"""Find audit events again: newest first, as objects that need no session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Unpack

from sqlalchemy import Dialect
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store.audit.filters import Criteria, Filters, criteria
from agent_gateway_store.audit.grouping import bucket_of, columns_of, grouped, stats_of
from agent_gateway_store.audit.reading import events_of
from agent_gateway_store.audit.selects import newest, parameters
from agent_gateway_store.encoding.sanitize import storable_key
from agent_gateway_store.models.audit import AuditEvent, Decision
from agent_gateway_store.results import Page, Stats
from agent_gateway_store.storage.database import SessionTransactions, Transactions
from agent_gateway_store.storage.pagination import decode_cursor, encode_cursor
from agent_gateway_store.storage.statements import CompiledStatement, dialect_of, fetch

__all__ = ["COLUMNS", "AuditQuery", "check_limit"]

COLUMNS = (
    "timestamp",
    "caller_id",
    "mcp_server",
    "tool_name",
    "decision",
    "sanitized_args",
    "execution_status",
    "latency_ms",
    "risk_labels",
    "request_id",
)
_MOST = 100_000
_NEVER = 2**62
_SECOND = timedelta(seconds=1)


class AuditQuery:
    """Reads audit events. Order: newest first by `timestamp`, ties broken by `id`.

    Args:
        session: A session of the caller's; it is neither committed nor closed. The events returned are detached.
        org_id: See only this organisation; None sees all.
    """

    def __init__(self, session: AsyncSession, *, org_id: str | None = None) -> None:
        self._transactions: Transactions = SessionTransactions(session)
        self._org_id = org_id

    @classmethod
    def over(cls, transactions: Transactions, *, org_id: str | None = None) -> AuditQuery:
        """Return a query that opens its own transactions."""
        query = cls.__new__(cls)
        query._transactions, query._org_id = transactions, org_id
        return query

    async def get_by_request_id(self, request_id: str) -> AuditEvent | None:
        """Return the event with this `request_id`, or None.

        Across organisations the id may be used several times; the newest is returned.
        """
        found = await self._newest({"request_id": storable_key(request_id)}, limit=1)
        return found[0] if found else None

    async def list_by_caller(self, caller_id: str, limit: int = 50, offset: int = 0) -> Page[AuditEvent]:
        """Return up to `limit` events of one caller, after skipping `offset`."""
        return await self._newest({"caller_id": caller_id}, limit=limit, offset=offset)

    async def list_by_decision(self, decision: Decision | str, limit: int = 50) -> Page[AuditEvent]:
        """Return up to `limit` events with this decision.

        Raises:
            ValueError: There is no such decision.
        """
        return await self._newest({"decision": decision}, limit=limit)

    async def list_recent(self, limit: int = 100) -> Page[AuditEvent]:
        """Return the `limit` newest events."""
        return await self._newest({}, limit=limit)

    async def search(
        self, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[Filters]
    ) -> Page[AuditEvent]:
        """Return events that match every filter (see `Filters`), newest first, ties broken by id.

        `next_cursor` leads on to older ones; events that are added meanwhile do not move it.

        Args:
            limit: At most so many, 1 to 100,000.
            cursor: `next_cursor` of the page before; the filters must be the same.
            filters: See `Filters`; a filter that is None does not narrow.

        Raises:
            InvalidCursorError: The cursor did not come from this search.
            TypeError: There is no such filter, or its value has the wrong type.
            ValueError: There is no such decision, status or time, or `limit` is out of range.
        """
        check_limit(limit)
        found = criteria(filters, org_id=self._org_id)
        place = None if cursor is None else decode_cursor(found.scope, cursor)
        events = await self._read(found, limit=limit + 1, after=place)
        if len(events) <= limit:
            return _page(events)
        last = events[limit - 1]
        return _page(events[:limit], encode_cursor(found.scope, last.timestamp, last.id or 0))

    async def stats(
        self,
        by: str | Sequence[str] | None = None,
        bucket: timedelta | str | None = None,
        **filters: Unpack[Filters],
    ) -> Stats:
        """Count events and their latencies, aggregated by the database.

        Each row has the columns of its group, then `calls`, `denials` (DENY), `approvals` (APPROVAL_REQUIRED),
        `errors` (TOOL_ERROR and TIMEOUT) and the latency percentiles 50, 95 and 99 in milliseconds: a latency that
        occurred, the first whose rank is at least that share (SQL's `percentile_disc`; the same on both databases).
        Rows come by time, then the largest group first.

        Args:
            by: Columns to group by: caller_id, tool_name, mcp_server, decision, risk_label, environment, ... An event
                counts once for each of its risk labels, and under None without one. None: one row over everything.
            bucket: Length of time buckets, such as "1h" or a timedelta of whole seconds; they begin with the UTC hour,
                day or (Monday) week.
            filters: See `Filters`.

        Raises:
            TypeError: There is no such filter, or a value has the wrong type.
            ValueError: There is no such column, decision, status or time.
        """
        names, length = columns_of(by), bucket_of(bucket)
        found = criteria(filters, org_id=self._org_id)
        rows = await self._fetch_long(
            lambda dialect: grouped(dialect, found, names, in_buckets=length is not None),
            {**found.values, **({} if length is None else {"p_bucket": length, "p_bucket_s": length // _SECOND})},
        )
        return stats_of(rows, names, length)

    async def _fetch_long(
        self, query: Callable[[Dialect], CompiledStatement], values: Mapping[str, Any]
    ) -> Sequence[Sequence[Any]]:
        async with self._transactions.connection("read") as connection:
            dialect = dialect_of(connection)
            return await fetch(connection, query(dialect), parameters(dialect, values))

    async def _newest(self, filters: Filters, *, limit: int, offset: int = 0) -> Page[AuditEvent]:
        for name, value in (("limit", limit), ("offset", offset)):
            if not 0 <= value < _NEVER:
                raise ValueError(f"{name} must be zero or more, not {value}.")
        return _page(await self._read(criteria(filters, org_id=self._org_id), limit=limit, offset=offset))

    async def _read(
        self, found: Criteria, *, limit: int, offset: int = 0, after: tuple[datetime, int] | None = None
    ) -> list[AuditEvent]:
        async with self._transactions.connection("read") as connection:
            dialect = dialect_of(connection)
            query = newest(dialect, found, limit=limit, offset=offset, is_after=after is not None)
            values = parameters(dialect, found.values)
            if after is not None:
                values["p_at"], values["p_id"] = after
            rows = await fetch(connection, query, values)
        return events_of(rows)


def check_limit(limit: int) -> int:
    """Return `limit`.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is not 1 to 100,000.
    """
    if not isinstance(limit, int):
        raise TypeError(f"limit must be a whole number, not {type(limit).__name__}.")
    if not 1 <= limit <= _MOST:
        raise ValueError(f"limit must be 1 to {_MOST:,}, not {limit:,}: for more, use stream() or to_arrow().")
    return limit


def _page(events: list[AuditEvent], following: str | None = None) -> Page[AuditEvent]:
    return Page(events, next_cursor=following, columns=COLUMNS, record_type=AuditEvent)
