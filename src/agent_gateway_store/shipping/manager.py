"""`store.sinks`: how far each sink is, what it has refused, and how to send that again."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, case, func, select, update

from agent_gateway_store.audit.filters import criteria
from agent_gateway_store.audit.query import changes_page
from agent_gateway_store.audit.selects import table as events
from agent_gateway_store.clock import utc_now
from agent_gateway_store.encoding.sanitize import storable_key
from agent_gateway_store.errors import InvalidCursorError
from agent_gateway_store.models.base import repaired
from agent_gateway_store.models.shipping import EVERY_ORG
from agent_gateway_store.results import Page
from agent_gateway_store.shipping.shipper import FORGET, letters, sinks
from agent_gateway_store.storage.database import Database, changed
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.filters import require_between
from agent_gateway_store.storage.statements import Statement

_COLUMNS = ("sink", "org_id", "lag_s", "dead", "due", "moved_at", "last_error")
_LETTER = ("created_at", "sink", "org_id", "request_id", "error", "is_due", "event_id")


class SinkManager:
    """The sinks to which `store.audit.ship` has shipped from an open store. `store.for_org` sees its own alone."""

    def __init__(self, database: Database, *, org_id: str | None = None) -> None:
        self._database, self._org_id = database, org_id

    async def list(self) -> Page[dict[str, Any]]:
        """Return how far each sink is, by name.

        `lag_s` is the age in seconds of the oldest event that it has not taken, 0 where there is none; None where its
        cursor leads nowhere, as `last_error` says then. `dead` are the events that it has refused for good, `due` those
        of them that were redriven and wait to be sent again. `moved_at` is when it took something last, `last_error`
        why it has not since. `org_id` is "" for one that takes the events of all organisations.
        """
        counted = (
            select(
                letters.c.sink,
                letters.c.org_id,
                func.count().label("dead"),
                func.sum(case((letters.c.is_due, 1), else_=0)).label("due"),
            )
            .where(*self._own(letters))
            .group_by(letters.c.sink, letters.c.org_id)
        )
        listed = select(sinks).where(*self._own(sinks)).order_by(sinks.c.sink, sinks.c.org_id)
        async with self._database.read() as connection:
            kept = list(map(repaired, await Statement(listed).rows(connection, {})))
            counts = {(row.sink, row.org_id): row for row in await connection.execute(counted)}
        found = []
        for row in kept:
            count = counts.get((row["sink"], row["org_id"]))
            line = {name: row[name] for name in ("sink", "org_id", "moved_at", "last_error")}
            try:
                lag_s = await self._lag_s(row["org_id"], row["cursor"])
            except InvalidCursorError as exc:
                lag_s, line["last_error"] = None, str(exc)
            found.append({**line, "lag_s": lag_s, "dead": count.dead if count else 0, "due": count.due if count else 0})
        return Page(found, columns=_COLUMNS)

    async def _lag_s(self, org_id: str, cursor: str) -> float:
        found = criteria({}, org_id=org_id or None, listing="changes")
        page, _ = await changes_page(self._database, found, cursor, 1)
        return max(0.0, (utc_now() - page[0].timestamp).total_seconds()) if page else 0.0

    async def dead_letters(self, sink: str | None = None, limit: int = 50) -> Page[dict[str, Any]]:
        """Return events that were refused for good, newest first; `request_id` is None for one that was pruned.

        Args:
            sink: Only those of this one.
            limit: At most so many.

        Raises:
            ValueError: `limit` is below 1 or above 2^31 - 1.
        """
        require_between("limit", limit, 1, hint="for more, redrive or forget some")
        statement = (
            select(letters, events.c.request_id)
            .join_from(letters, events, events.c.id == letters.c.event_id, isouter=True)
            .where(*self._own(letters, sink))
            .order_by(letters.c.id.desc())
            .limit(limit)
        )
        async with self._database.read() as connection:
            rows = map(repaired, await Statement(statement).rows(connection, {}))
        return Page([{name: row[name] for name in _LETTER} for row in rows], columns=_LETTER)

    async def redrive(self, sink: str | None = None) -> int:
        """Send dead letters again: those of one sink, or all. The process that ships there does it, before new events.

        Returns:
            How many there were.
        """
        statement = update(letters).where(~letters.c.is_due, *self._own(letters, sink)).values(is_due=True)

        return await changed(self._database, statement)

    @retry_conflicts
    async def forget(self, sink: str) -> bool:
        """Forget how far a sink is, and what it has refused: the next `ship` begins anew. False: nothing was known."""
        key = {"p_sink": storable_key(sink), "p_org_id": self._org_id or EVERY_ORG}
        async with self._database.connection("transaction") as connection:
            rows = [await statement.rows(connection, key) for statement in FORGET]
        return any(rows)

    def _own(self, table: Any, sink: str | None = None) -> tuple[ColumnElement[bool], ...]:
        own = () if self._org_id is None else (table.c.org_id == self._org_id,)
        return own if sink is None else (*own, table.c.sink == storable_key(sink))
