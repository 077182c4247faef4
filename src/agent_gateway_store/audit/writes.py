"""Events on their way to the writer, one by one and in batches, or through a session of the caller's."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from contextlib import aclosing
from itertools import islice

from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store.audit.backends import insert_event
from agent_gateway_store.audit.hooks import BeforeWriteHooks
from agent_gateway_store.audit.outcomes import WriteOutcome, log_lost
from agent_gateway_store.audit.record import EncodedRow, encode_event, encode_light
from agent_gateway_store.audit.writer import AuditWriter, OpenWriter
from agent_gateway_store.errors import AuditUnavailableError, StoreNotOpenError
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.storage.database import SessionTransactions
from agent_gateway_store.storage.errors import translate_errors
from agent_gateway_store.storage.host import session_connection, sole_use
from agent_gateway_store.telemetry import current_trace_id, traced

# Chosen, of a commit of `write_many`: twice the batch of single writes, as no caller waits for one event of it.
BULK_ROWS = 2_000
# Chosen: a few milliseconds of work, after which other tasks may run.
_SLICE_EVENTS = 50


async def encode_aside(event: AuditEvent, *, org_id: str | None = None, trace_id: str | None = None) -> EncodedRow:
    """Return the row for `event` as `encode_event` does; other tasks run meanwhile."""
    row = encode_light(event, org_id=org_id, trace_id=trace_id)
    if row is None:
        try:
            row = await asyncio.to_thread(encode_event, event, org_id=org_id, trace_id=trace_id)
        except RuntimeError:
            # Another task has edited the event's values meanwhile, which it cannot do here.
            row = encode_event(event, org_id=org_id, trace_id=trace_id)
    return row


class EventWriter:
    """Hands events to the writer of a store, through the plugins that may change them.

    Args:
        writer: Holds the writer while the store is open.
        hooks: The plugins.
        org_id: Stamp this organisation on each event; None takes the event's own.
    """

    def __init__(self, writer: OpenWriter, hooks: BeforeWriteHooks, org_id: str | None) -> None:
        self._writer = writer
        self._hooks = hooks
        self._org_id = org_id

    @traced("audit.write", lambda _self, event, _trace_id: event.tool_name)
    async def write(self, event: AuditEvent, trace_id: str | None) -> WriteOutcome:
        """Write one event, as `AuditManager.write` says."""
        writer = self._writer.get_here()
        try:
            row = encode_light(event, org_id=self._org_id, trace_id=trace_id)
        except ValidationError as exc:
            return writer.reject(event, exc)
        if row is not None and not self._hooks.is_wanted:
            return await writer.write(row)
        # In another task, so that cancelling the caller does not cancel the write.
        return await self._hooks.tasks.shielded(self._write_aside(writer, event, row, trace_id))

    async def _write_aside(
        self, writer: AuditWriter, event: AuditEvent, row: EncodedRow | None, trace_id: str | None
    ) -> WriteOutcome:
        """Write an event that plugins may change, or that takes long to encode: `row` is None then."""
        try:
            if row is None:
                row = await encode_aside(event, org_id=self._org_id, trace_id=trace_id)
            prepared = (await self._hooks.prepare([row]))[0] if self._hooks.is_wanted else row
        except ValidationError as exc:
            return writer.reject(event, exc)
        except asyncio.CancelledError:
            # The host cancels every task there is; the event is stored all the same.
            writer.enqueue_detached(self._unseen(row or encode_event(event, org_id=self._org_id, trace_id=trace_id)))
            raise
        return await writer.write(prepared)

    async def write_ended(self, event: AuditEvent) -> WriteOutcome:
        """Write the event of a call that has run; it is logged as LOST if the store was closed meanwhile.

        Raises:
            AuditUnavailableError: In the strict mode, if it could not be stored.
        """
        trace_id = current_trace_id()
        try:
            return await self.write(event, trace_id)
        except StoreNotOpenError as exc:
            if self._writer.is_strict:
                raise AuditUnavailableError(
                    "The store was closed before the call was recorded, so its result must not be used: open the store"
                    " again."
                ) from exc
            try:
                log_lost(self._unseen(encode_event(event, org_id=self._org_id, trace_id=trace_id)), exc)
            except ValidationError as invalid:
                log_lost(event, invalid, request_id=str(event.request_id))
            return WriteOutcome.LOST

    def _unseen(self, row: EncodedRow) -> EncodedRow:
        """Return a row as it may be kept, though no plugin has looked at it."""
        return self._hooks.withhold(row) if self._hooks.is_wanted else row

    async def write_many(
        self, events: Iterable[AuditEvent] | AsyncIterable[AuditEvent], trace_id: str | None
    ) -> Counter[WriteOutcome]:
        """Write many events; result and errors as for `AuditManager.write_many`."""
        writer = self._writer.get_here()
        outcomes: Counter[WriteOutcome] = Counter()

        def reject(event: AuditEvent, cause: Exception) -> None:
            outcomes[writer.reject(event, cause)] += 1

        under_way: asyncio.Task[list[WriteOutcome]] | None = None
        try:
            async with aclosing(encode_batches(events, self._org_id, trace_id, reject=reject)) as batches:
                async for batch in batches:
                    rows = await self._hooks.prepare(batch) if self._hooks.is_wanted else batch
                    # While one batch is committed the next one is encoded.
                    if under_way is not None:
                        # `wait`, because cancelling the caller must not cancel a commit that has begun.
                        await asyncio.wait([under_way])
                        outcomes.update(under_way.result())
                    under_way = asyncio.create_task(writer.write_batch(rows))
        finally:
            if under_way is not None:
                await asyncio.wait([under_way])
                outcomes.update(under_way.result())
        return outcomes

    async def record(self, session: AsyncSession, event: AuditEvent) -> WriteOutcome:
        """Store an event in the transaction of the caller's session, as `AuditManager.record` says."""
        row = await encode_aside(event, org_id=self._org_id, trace_id=current_trace_id())
        if self._hooks.is_wanted:
            (row,) = await self._hooks.prepare([row])
        self._writer.has_recorded = True
        with translate_errors("record the event", in_session=True), sole_use(session):
            connection = await session_connection(session, AuditEvent, writing=True, atomic=True)
            return await insert_event(connection, row)


async def encode_batches(
    events: Iterable[AuditEvent] | AsyncIterable[AuditEvent],
    org_id: str | None,
    trace_id: str | None,
    *,
    reject: Callable[[AuditEvent, Exception], None],
) -> AsyncGenerator[list[EncodedRow]]:
    """Yield the rows of `events` in batches of about `BULK_ROWS`; other tasks run meanwhile.

    An event that is not valid goes to `reject`. If that raises, or `events` does, those before it are yielded first.
    """
    rows: list[EncodedRow] = []
    try:
        async with aclosing(_slices(events)) as slices:
            async for some in slices:
                for event in some:
                    try:
                        rows.append(
                            encode_light(event, org_id=org_id, trace_id=trace_id)
                            or await encode_aside(event, org_id=org_id, trace_id=trace_id)
                        )
                    except ValidationError as exc:
                        reject(event, exc)
                if len(rows) >= BULK_ROWS:
                    yield rows
                    rows = []
    except Exception:
        if rows:
            yield rows
        raise
    if rows:
        yield rows


async def _slices(events: Iterable[AuditEvent] | AsyncIterable[AuditEvent]) -> AsyncGenerator[Sequence[AuditEvent]]:
    if isinstance(events, AsyncIterable):
        async for event in events:
            yield (event,)
        return
    source = iter(events)
    while True:
        some: list[AuditEvent] = []
        try:
            some.extend(islice(source, _SLICE_EVENTS))
        except Exception:
            yield some
            raise
        if not some:
            return
        yield some
        # A plain iterable never lets the event loop run.
        await asyncio.sleep(0)


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
