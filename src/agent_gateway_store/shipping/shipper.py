"""Ships events to a sink: one process at a time, in order, and nothing skipped wherever it is killed.

A batch is a page of `changes`. The cursor behind it is committed once the sink has acknowledged it, so that what a
crash leaves in between is sent again. A batch that the sink refuses for good is read again in smaller pages, until the
event that it refuses is alone: that one becomes a dead letter in the transaction that moves the cursor.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

from sqlalchemy import BigInteger, Text, and_, bindparam, delete, false, null, select, update
from sqlalchemy.dialects import postgresql, sqlite

from agent_gateway_store._text import code_text, describe
from agent_gateway_store.audit.filters import criteria
from agent_gateway_store.audit.query import AuditQuery, changes_page, check_limit
from agent_gateway_store.clock import utc_now
from agent_gateway_store.delivery.policy import wait_s
from agent_gateway_store.errors import NotDeliveredError, SinkNotFoundError, StoreUnavailableError
from agent_gateway_store.hooks.executor import PluginExecutor, PluginFailure, run_in_thread
from agent_gateway_store.hooks.plugin import REGISTER_SINKS, name_of
from agent_gateway_store.hooks.specs import Sink
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.models.columns import UtcDateTime
from agent_gateway_store.models.shipping import EVERY_ORG, AuditSink, DeadLetter
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.exclusive import ExclusiveLock, StillHeld, key_of
from agent_gateway_store.storage.filters import Criteria
from agent_gateway_store.storage.statements import Statement, literal_number

sinks, letters = AuditSink.__table__, DeadLetter.__table__
# The dialects write ON CONFLICT alike.
_INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
T = TypeVar("T")

# As `follow` waits for a database by default: with `once`, no fault is waited out for longer.
_PATIENCE_S = 60.0
# Chosen: a process that waits for another one to end, or for the database, connects anew each time.
_RETRY_S = 5.0
_PRUNED = PluginFailure("The event was pruned before it was sent again: the archive has it.", is_permanent=True)

logger = logging.getLogger("agent_gateway_store.shipping")


def _text(name: str) -> Any:
    return bindparam(f"p_{name}", type_=Text())


_NOW = bindparam("p_now", type_=UtcDateTime())
_EVENT = bindparam("p_event_id", type_=BigInteger())
_SINK = and_(sinks.c.sink == _text("sink"), sinks.c.org_id == _text("org_id"))
_LETTER = and_(letters.c.sink == _text("sink"), letters.c.org_id == _text("org_id"))
_ERROR = {"last_error": _text("error")}

POSITION = Statement(select(sinks.c.cursor).where(_SINK))
BEGIN = Statement(
    lambda dialect: (
        _INSERT[dialect](sinks)
        .values(sink=_text("sink"), org_id=_text("org_id"), cursor=_text("cursor"), moved_at=_NOW)
        .on_conflict_do_nothing()
        .returning(sinks.c.cursor)
    )
)
# Compared and set: a shipper that was stopped for so long that another one took over moves nothing.
MOVE = Statement(
    update(sinks)
    .where(_SINK, sinks.c.cursor == _text("before"))
    .values(cursor=_text("cursor"), moved_at=_NOW, last_error=null())
    .returning(sinks.c.sink)
)
NOTE = Statement(update(sinks).where(_SINK, sinks.c.cursor == _text("before")).values(_ERROR).returning(sinks.c.sink))
# A batch that comes again after a crash is refused again.
REFUSE = Statement(
    lambda dialect: (
        _INSERT[dialect](letters)
        .values(
            sink=_text("sink"),
            org_id=_text("org_id"),
            event_id=_EVENT,
            error=_text("error"),
            is_due=false(),
            created_at=_NOW,
        )
        .on_conflict_do_update(
            index_elements=["sink", "org_id", "event_id"], set_={"error": _text("error"), "is_due": false()}
        )
        .returning(letters.c.id)
    )
)
FIRST_DUE = Statement(
    select(letters.c.event_id).where(_LETTER, letters.c.is_due).order_by(letters.c.id).limit(literal_number(1))
)
SENT = Statement(delete(letters).where(_LETTER, letters.c.event_id == _EVENT, letters.c.is_due).returning(letters.c.id))
FORGET = (
    Statement(delete(letters).where(_LETTER).returning(letters.c.id)),
    Statement(delete(sinks).where(_SINK).returning(sinks.c.sink)),
)


class Shipper:
    """`store.audit.ship`.

    Args:
        database: Whose events.
        offered: Asks the plugins for their sinks; may block.
        executor: Where sinks run.
        org_id: Ship only this organisation's events, under a cursor of its own; None: all.
    """

    def __init__(
        self,
        database: Database,
        offered: Callable[[], Mapping[str, Sink]],
        executor: PluginExecutor,
        *,
        org_id: str | None = None,
    ) -> None:
        self._database, self._offered, self._executor, self._org_id = database, offered, executor, org_id

    async def ship(
        self, sink: str | Sink, *, once: bool, start: Literal["beginning", "now"], batch: int, poll_s: float
    ) -> int:
        """Ship, as `AuditManager.ship` says."""
        self._database.check_owner()
        check_limit(batch)
        if start not in ("beginning", "now"):
            raise ValueError(f'start must be "beginning" or "now", not {start!r}.')
        if not poll_s > 0:
            raise ValueError(f"poll_s must be above zero, not {poll_s}.")
        if isinstance(sink, str):
            asked = run_in_thread(self._offered, name="gateway-store sinks")
            known = await asyncio.wrap_future(asked)
            if sink not in known:
                raise SinkNotFoundError(sink, tuple(sorted(known)))
            sink = known[sink]
        run = _Run(self._database, self._executor, sink, self._org_id, batch=batch)
        return await run.ship(once=once, start=start, poll_s=poll_s)


class _Run:
    """One call of `ship`."""

    def __init__(
        self, database: Database, executor: PluginExecutor, sink: Sink, org_id: str | None, *, batch: int
    ) -> None:
        self._database, self._executor, self._sink, self._org_id = database, executor, sink, org_id
        self._name = name_of(sink, REGISTER_SINKS)
        self._key = {"p_sink": self._name, "p_org_id": org_id or EVERY_ORG}
        self._found: Criteria = criteria({}, org_id=org_id, listing="changes")
        self._most = self._limit = batch
        self._cursor = ""
        self._sent = 0
        key = key_of(f"ship {org_id or EVERY_ORG}\0{self._name}")
        self._lock = ExclusiveLock(
            database,
            key=key,
            suffix=f".ship-{key:016x}.lock",
            wait_s=0,
            busy=f"Another process ships to the sink {code_text(self._name)}",
        )

    async def ship(self, *, once: bool, start: Literal["beginning", "now"], poll_s: float) -> int:
        said = ""
        while True:
            try:
                async with self._lock() as still_held:
                    self._cursor = await self._position(start)
                    said = ""
                    await self._ship(still_held, once=once, poll_s=poll_s)
                    return self._sent
            except StoreUnavailableError as exc:
                if once:
                    raise
                if said != (said := str(exc)):
                    logger.warning("Shipping to %s waits: %s", self._name, exc)
                await asyncio.sleep(_RETRY_S)

    async def _ship(self, still_held: StillHeld, *, once: bool, poll_s: float) -> None:
        """Ship until the end of the log, or without end."""
        attempt, well_at = 0, time.monotonic()
        while True:
            result = await _finished(self._round(still_held))
            if isinstance(result, PluginFailure):
                attempt += 1
                pause_s = wait_s(attempt, result.retry_after_s)
                if once and time.monotonic() + pause_s - well_at > _PATIENCE_S:
                    raise NotDeliveredError(
                        f"The sink {code_text(self._name)} takes no events ({result.text.rstrip('.')}): nothing is "
                        "skipped, ship again later.",
                        retry_after_s=result.retry_after_s,
                    )
                logger.warning("The sink %s takes no events: %s", self._name, result.text)
                await asyncio.sleep(pause_s)
                continue
            attempt, well_at = 0, time.monotonic()
            if not result:
                if once:
                    return
                await asyncio.sleep(poll_s)

    async def _round(self, still_held: StillHeld) -> bool | PluginFailure:
        """Send what was redriven and the next batch; return whether there is more, or why the sink takes nothing."""
        if (failure := await self._send_due(still_held)) is not None:
            return failure
        page, _ = await changes_page(self._database, self._found, self._cursor, self._limit)
        cursor, refused = page.next_cursor or self._cursor, None
        if page:
            failure = await self._send(still_held, list(page))
            if failure is not None and not failure.is_permanent:
                return failure
            if failure is not None and len(page) > 1:
                # The largest power of two below: few statements are kept for all the sizes of pages.
                self._limit = 1 << ((len(page) - 1).bit_length() - 1)
                return True
            refused = {"p_event_id": page[0].id, "p_error": failure.text} if failure else None
            self._sent += 0 if refused else len(page)
            self._limit = min(self._most, 2 * self._limit)
        if cursor == self._cursor:
            return False
        # Perhaps only the end of a snapshot that was taken long ago: the end of the log is where the cursor stays.
        await self._move(cursor, refused)
        return True

    async def _send_due(self, still_held: StillHeld) -> PluginFailure | None:
        """Send dead letters that were redriven, one by one: one of them was refused."""
        while True:
            async with self._database.connection("read") as connection:
                letter = await FIRST_DUE.first(connection, self._key)
            if letter is None:
                return None
            event_id = letter["event_id"]
            event = await AuditQuery(self._database, org_id=self._org_id).get(event_id)
            failure = await self._send(still_held, [event]) if event else _PRUNED
            if failure is None:
                await self._write(SENT, {"p_event_id": event_id})
                self._sent += 1
            elif failure.is_permanent:
                await self._write(REFUSE, {"p_event_id": event_id, "p_error": failure.text})
            else:
                return failure

    async def _send(self, still_held: StillHeld, events: Sequence[AuditEvent]) -> PluginFailure | None:
        await still_held()
        failure = await self._executor.run("sink", self._name, partial(_send, self._sink, events))
        if failure is not None and not failure.is_permanent:
            await self._write(NOTE, {"p_before": self._cursor, "p_error": failure.text})
        return failure

    @retry_conflicts
    async def _write(self, statement: Any, values: Mapping[str, Any]) -> None:
        async with self._database.connection("autocommit") as connection:
            await statement.rows(connection, {**self._key, "p_now": utc_now(), **values})

    async def _position(self, start: Literal["beginning", "now"]) -> str:
        """Return the cursor that is kept; the first time, keep the one to begin with."""
        for _ in range(2):
            async with self._database.connection("read") as connection:
                if (kept := await POSITION.first(connection, self._key)) is not None:
                    return str(kept["cursor"])
            # Not the word itself: what is pruned before the first batch has arrived would be missed without an error.
            page, _ = await changes_page(self._database, self._found, start, 0)
            await self._write(BEGIN, {"p_cursor": page.next_cursor})
        raise StoreUnavailableError(f"The sink {code_text(self._name)} was forgotten at this moment: ship again.")

    @retry_conflicts
    async def _move(self, cursor: str, refused: Mapping[str, Any] | None) -> None:
        """Commit the cursor, and the dead letter of the event before it that was refused, together."""
        values = {**self._key, "p_now": utc_now(), "p_before": self._cursor, "p_cursor": cursor}
        async with self._database.connection("transaction") as connection:
            if not await MOVE.rows(connection, values):
                raise StoreUnavailableError(
                    f"Another process has moved the cursor of the sink {code_text(self._name)}, or it was forgotten: "
                    "let one process ship."
                )
            if refused is not None:
                await REFUSE.rows(connection, {**values, **refused})
        self._cursor = cursor
        if refused is not None:
            logger.warning("The sink %s refuses an event for good: %s", self._name, refused["p_error"])


async def _send(sink: Sink, events: Sequence[AuditEvent]) -> None:
    """Hand events to a sink, in the plugin's thread."""
    result: object = sink.send(events)
    if not inspect.isawaitable(result):
        raise TypeError("the sink's send is not async")
    await result


async def _finished(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end what has begun, and raise a cancellation that came meanwhile afterwards; a second one at once."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        try:
            await asyncio.wait({task})
        finally:
            if not task.done():
                task.cancel()
            elif not task.cancelled() and (error := task.exception()) is not None:
                logger.warning("Shipping ended with an error: %s", describe(error))
        raise
