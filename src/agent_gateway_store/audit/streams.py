"""The whole audit log as a stream, and new events as they are committed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from agent_gateway_store.audit.changes import changes
from agent_gateway_store.audit.filters import Criteria
from agent_gateway_store.audit.query import COLUMNS
from agent_gateway_store.audit.selects import events_of, newest
from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.results import Page
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.streaming import streamed

# The default limit of `changes`.
_FOLLOWED_ROWS = 1_000
# Chosen: bounds of the caller's `poll_s` while the database is away, so that it is tried neither in a loop nor too
# late.
_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.1, 5.0
_logger = logging.getLogger("agent_gateway_store.audit")


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
    return Page(events, next_cursor=following, columns=COLUMNS, record_type=AuditEvent), is_more


async def follow_pages(
    database: Database, found: Criteria, cursor: str, *, poll_s: float, patience_s: float
) -> AsyncGenerator[Page[AuditEvent]]:
    """Yield the events committed since `cursor`, without end; a database that is away is waited for."""
    loop = asyncio.get_running_loop()
    answered, is_away = loop.time(), False
    while True:
        try:
            page, is_more = await changes_page(database, found, cursor, _FOLLOWED_ROWS)
        except StoreUnavailableError as exc:
            if loop.time() - answered > patience_s:
                raise
            if not is_away:
                _logger.warning("Following the audit log waits for the database: %s", exc)
            is_away = True
            await asyncio.sleep(min(max(poll_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S))
            continue
        is_away, cursor = False, page.next_cursor or cursor
        yield page
        # Only now: the time that the consumer took over the page is not time without the database.
        answered = loop.time()
        if not is_more:
            await asyncio.sleep(poll_s)
