"""The queries of the audit log, newest first; the whole of it as a stream; and new events as they are committed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Unpack

from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store.audit.calls import orphans
from agent_gateway_store.audit.changes import changes
from agent_gateway_store.audit.filters import Filters, criteria
from agent_gateway_store.audit.selects import COUNTED, GROUPS, SPAN, events_of, group_events, newest
from agent_gateway_store.encoding.sanitize import storable_key
from agent_gateway_store.errors import SchemaOutOfDateError, StoreUnavailableError
from agent_gateway_store.models.audit import AuditEvent, Decision
from agent_gateway_store.results import Page, Stats
from agent_gateway_store.results.page import METRICS
from agent_gateway_store.storage.database import AnyConnection, Database, SessionTransactions
from agent_gateway_store.storage.errors import OutageLog, retry_conflicts
from agent_gateway_store.storage.filters import Criteria
from agent_gateway_store.storage.grouping import grouping, stats_of
from agent_gateway_store.storage.identity import restored_identity
from agent_gateway_store.storage.pagination import decode, decode_cursor, encode_cursor
from agent_gateway_store.storage.streaming import read_all, streamed

# The default limit of `changes`.
_FOLLOWED_ROWS = 1_000
# Chosen: bounds of the caller's `poll_s` while the database is away, so that it is tried neither in a loop nor too
# late.
_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.1, 5.0
_logger = logging.getLogger("agent_gateway_store.audit")

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
"""The columns of an event that a page shows."""

# Chosen: with events of 5 kB half a gigabyte of memory.
_MAX_LIMIT = 100_000
# Beyond any number of rows, and within the 64 bits that both databases take as a LIMIT.
_NEVER = 2**62
# Of the 64 bits that `id` has in both databases.
_LARGEST_ID = 2**63 - 1


class AuditQuery:
    """Reads audit events, newest first by `timestamp`, ties broken by `id`. The events are detached.

    Args:
        session: A session of the caller's, which is neither committed nor closed; or a whole database.
        org_id: See only this organisation; None sees all.

    Raises:
        TypeError: `session` is not an AsyncSession.
        ValueError: The store cannot work in this session: the sentence says what to give in its place.
    """

    def __init__(self, session: AsyncSession | Database, *, org_id: str | None = None) -> None:
        self._source: Database | SessionTransactions = (
            session if isinstance(session, Database) else SessionTransactions(session, AuditEvent)
        )
        self._org_id = org_id

    async def get(self, event_id: int) -> AuditEvent | None:
        """Return the event of this row, or None."""
        if not 0 < event_id <= _LARGEST_ID:
            return None
        bound = criteria({}, org_id=self._org_id)
        found = replace(bound, shape=(*bound.shape, ("id", False)), values={**bound.values, "p_row_id": event_id})
        events = await self._read(found, limit=1)
        return events[0] if events else None

    async def get_by_request_id(self, request_id: str) -> AuditEvent | None:
        """Return the newest event with this id, or None."""
        found = await self._newest({"request_id": storable_key(request_id)}, limit=1)
        return found[0] if found else None

    async def list_by_caller(self, caller_id: str, limit: int = 50, offset: int = 0) -> Page[AuditEvent]:
        """Return up to `limit` events of one caller, after skipping `offset`."""
        return await self._newest({"caller_id": caller_id}, limit=limit, offset=offset)

    async def list_by_decision(self, decision: Decision | str, limit: int = 50) -> Page[AuditEvent]:
        """Return up to `limit` events with this decision. Raises ValueError if there is no such decision."""
        return await self._newest({"decision": decision}, limit=limit)

    async def list_recent(self, limit: int = 100) -> Page[AuditEvent]:
        """Return the `limit` newest events."""
        return await self._newest({}, limit=limit)

    async def search(
        self, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[Filters]
    ) -> Page[AuditEvent]:
        """Return events that match every filter, newest first; arguments and errors as of `store.audit.search`."""
        check_limit(limit)
        found = criteria(filters, org_id=self._org_id)
        if cursor is not None:
            # A text that is not a cursor of this listing is refused without asking the database.
            decode(found.scope, cursor)
        return await self._search(found, limit, cursor)

    @retry_conflicts
    async def _search(self, found: Criteria, limit: int, cursor: str | None) -> Page[AuditEvent]:
        async with self._source.connection("read") as connection:
            restored = None if cursor is None else await restored_identity(connection)
            place = None if cursor is None else decode_cursor(found.scope, cursor, restored)
            # One more than is wanted says whether there is a next page.
            events = await _events(connection, found, limit=limit + 1, after=place)
            if len(events) <= limit:
                return _page(events)
            restored = await restored_identity(connection) if cursor is None else restored
        last = events[limit - 1]
        return _page(events[:limit], encode_cursor(found.scope, last.timestamp, last.id or 0, restored))

    async def stats(
        self,
        by: str | Sequence[str] | None = None,
        bucket: timedelta | str | None = None,
        time_zone: str | None = None,
        **filters: Unpack[Filters],
    ) -> Stats:
        """Count events and their latencies; arguments, columns and errors are those of `store.audit.stats`."""
        grouped = grouping(by, bucket, time_zone, GROUPS)
        found = criteria(filters, org_id=self._org_id)
        values = {**found.values, **grouped.values}
        zone = grouped.offsets(*(await read_all(self._source, SPAN, values))[0]) if grouped.zone else ()
        statement = group_events(found.shape, grouped.by, zone, in_buckets=grouped.bucket is not None)
        rows = await read_all(self._source, statement, values)
        return stats_of(rows, grouped, COUNTED, METRICS)

    async def orphans(self, before: datetime, *, limit: int) -> Page[AuditEvent]:
        """Return the intents from before a time that have no outcome, newest first."""
        found = criteria({}, org_id=self._org_id)
        statement = orphans(found.shape, limit=limit)
        async with self._source.connection("read") as connection:
            return _page(events_of(await statement.tuples(connection, {**found.values, "p_before": before})))

    async def _newest(self, filters: Filters, *, limit: int, offset: int = 0) -> Page[AuditEvent]:
        for name, value in (("limit", limit), ("offset", offset)):
            if not 0 <= value < _NEVER:
                raise ValueError(f"{name} must be zero or more, not {value}.")
        return _page(await self._read(criteria(filters, org_id=self._org_id), limit=limit, offset=offset))

    @retry_conflicts
    async def _read(self, found: Criteria, *, limit: int, offset: int = 0) -> list[AuditEvent]:
        async with self._source.connection("read") as connection:
            return await _events(connection, found, limit=limit, offset=offset)


async def _events(
    connection: AnyConnection,
    found: Criteria,
    *,
    limit: int,
    offset: int = 0,
    after: tuple[datetime, int] | None = None,
) -> list[AuditEvent]:
    statement = newest(found.shape, limit=limit, offset=offset, is_after=after is not None)
    values = dict(found.values)
    if after is not None:
        values["p_at"], values["p_id"] = after
    return events_of(await statement.tuples(connection, values))


def check_limit(limit: int) -> int:
    """Return `limit`.

    Raises:
        TypeError: It is not a whole number.
        ValueError: It is not 1 to 100,000.
    """
    if not isinstance(limit, int):
        raise TypeError(f"limit must be a whole number, not {type(limit).__name__}.")
    if not 1 <= limit <= _MAX_LIMIT:
        raise ValueError(f"limit must be 1 to {_MAX_LIMIT:,}, not {limit:,}: for more, use stream() or to_arrow().")
    return limit


def _page(events: list[AuditEvent], following: str | None = None) -> Page[AuditEvent]:
    return Page(events, next_cursor=following, columns=COLUMNS, record_type=AuditEvent)


async def event_batches(database: Database, found: Criteria) -> AsyncGenerator[list[AuditEvent]]:
    """Yield the events that match in batches, newest first, by a server-side cursor."""
    statement = newest(found.shape, limit=None).compiled(database.engine.dialect)
    async with aclosing(streamed(database, statement, found.values)) as batches:
        async for rows in batches:
            yield events_of(rows)


@retry_conflicts
async def changes_page(database: Database, found: Criteria, cursor: str, limit: int) -> tuple[Page[AuditEvent], bool]:
    """Return the events committed since `cursor`, and whether there are more."""
    async with database.connection("read") as connection:
        events, following, is_more = await changes(connection, found, cursor, limit)
    return _page(events, following), is_more


async def followed(
    database: Database, found: Criteria, cursor: str, *, poll_s: float, patience_s: float
) -> AsyncGenerator[AuditEvent]:
    """Yield the events committed since `cursor`, without end; a database that is away is waited for.

    Raises:
        ValueError: `poll_s` is not above zero.
    """
    if not poll_s > 0:
        raise ValueError(f"poll_s must be above zero, not {poll_s}.")
    loop = asyncio.get_running_loop()
    answered, log = loop.time(), OutageLog(_logger)
    while True:
        try:
            page, is_more = await changes_page(database, found, cursor, _FOLLOWED_ROWS)
        except (StoreUnavailableError, SchemaOutOfDateError) as exc:
            # Tables are missing, too, while a restore fills a database that it has made anew.
            if loop.time() - answered > patience_s:
                raise
            log.away("Following the audit log waits for the database: %s", exc)
            await asyncio.sleep(min(max(poll_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S))
            continue
        log.back("Following the audit log goes on.")
        cursor = page.next_cursor or cursor
        for event in page:
            yield event
            database.check_owner()
        # Only now: the time that the consumer took over the page is not time without the database.
        answered = loop.time()
        if not is_more:
            await asyncio.sleep(poll_s)
