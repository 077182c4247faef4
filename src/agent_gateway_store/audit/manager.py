"""Write audit events: stored once, never in the caller's way."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store.audit.inserting import insert_event
from agent_gateway_store.audit.lost import log_lost
from agent_gateway_store.audit.outcomes import AuditCounters, WriteOutcome
from agent_gateway_store.audit.preparing import Preparing
from agent_gateway_store.audit.progress import counted, told
from agent_gateway_store.audit.record import EncodedRow, encode_event
from agent_gateway_store.audit.streams import AuditReader
from agent_gateway_store.audit.telling import Telling
from agent_gateway_store.audit.writer import AuditWriter
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.storage.database import Database, SessionTransactions
from agent_gateway_store.storage.errors import translate_errors

__all__ = ["AuditLogger", "AuditManager"]

_BULK_ROWS = 2_000
_SLICE_ROWS = 50


class AuditLogger:
    """Writes audit events through a session that the caller owns.

    Args:
        session: Committed by each write, and left usable whatever happens. There is no spool behind it.
    """

    def __init__(self, session: AsyncSession) -> None:
        self._transactions = SessionTransactions(session)

    async def write(self, event: AuditEvent) -> WriteOutcome:
        """Store `event` and commit the session. Never raises: what cannot be stored is logged as LOST.

        Returns:
            STORED, DUPLICATE or LOST.
        """
        record: EncodedRow | None = None
        try:
            record = encode_event(event)
            async with self._transactions.write() as session:
                return await insert_event(session, record)
        except Exception as exc:
            log_lost(record, exc, request_id=event.request_id)
            return WriteOutcome.LOST


class AuditManager(AuditReader):
    """`store.audit`: writes and reads audit events.

    Args:
        database: Where they are kept.
        writer: Gives the group-commit writer of the open store.
        org_id: Stamp this organisation on what is written and see only it; None takes the event's own and sees all.
        preparing: The plugins that see events before they are stored.
        telling: The plugins that hear of them afterwards.
    """

    def __init__(
        self,
        database: Database,
        writer: Callable[[], AuditWriter],
        *,
        org_id: str | None = None,
        preparing: Preparing,
        telling: Telling,
    ) -> None:
        self._database = database
        self._transactions = database
        self._writer = writer
        self._org_id = org_id
        self._preparing = preparing
        self._telling = telling

    async def write(self, event: AuditEvent) -> WriteOutcome:
        """Store `event` and commit, together with whatever else is being written. In the default mode never raises.

        Returns after the commit, or after fsync into the spool while the database is away. Safe to repeat: the same
        event again is a DUPLICATE. Cancelling the caller does not cancel the write. `event` itself is not changed.

        Raises:
            AuditUnavailableError: With AUDIT_MODE=strict, if the event could not be stored, or is not valid since a
                field was set past the validation; in the default mode that is LOST.
            StoreNotOpenError: The store is not open here.
            TypeError: It is no AuditEvent.
        """
        self._database.check_owner()
        writer = self._writer()
        try:
            record = encode_event(event, org_id=self._org_id)
        except ValidationError as exc:
            return writer.refuse(event, exc)
        if self._preparing.is_wanted:
            return await self._preparing.detached(self._write_prepared(writer, record))
        return await writer.write(record)

    async def _write_prepared(self, writer: AuditWriter, record: EncodedRow) -> WriteOutcome:
        try:
            (prepared,) = await self._preparing.prepare([record])
        except asyncio.CancelledError:
            # Somebody cancels every task there is; the event is kept all the same.
            writer.take(self._preparing.give_up(record))
            raise
        return await writer.write(prepared)

    async def write_many(self, events: Iterable[AuditEvent] | AsyncIterable[AuditEvent]) -> Counter[WriteOutcome]:
        """Store many events, in order, in batches that are committed one after the other. Takes constant memory.

        Args:
            events: Any iterable, also an endless one that ends some day; it is read as it is stored. If it raises,
                what it gave before is stored, and the error goes on to the caller.

        Returns:
            How many events came to which outcome.

        Raises:
            AuditUnavailableError: With AUDIT_MODE=strict; the batches before were stored.
            StoreNotOpenError: The store is not open here.
            TypeError: One is no AuditEvent.
            ValidationError: A field of one was set past the validation, and is not valid.
        """
        self._database.check_owner()
        writer = self._writer()
        outcomes: Counter[WriteOutcome] = Counter()
        under_way: asyncio.Task[list[WriteOutcome]] | None = None
        try:
            async for batch in self._batches(events):
                rows = await self._preparing.prepare(batch) if self._preparing.is_wanted else batch
                # While one batch is committed the next one is made ready.
                if under_way is not None:
                    await asyncio.wait([under_way])  # cancelling the caller does not cancel what was begun
                    outcomes.update(under_way.result())
                under_way = asyncio.create_task(writer.write_batch(rows))
        finally:
            if under_way is not None:
                await asyncio.wait([under_way])
                outcomes.update(under_way.result())
        return outcomes

    async def import_file(
        self,
        path: str | PathLike[str],
        *,
        format: Literal["jsonl", "parquet"] | None = None,  # noqa: A002  as `export` has it
        progress: bool | Callable[[int], None] = False,
    ) -> Counter[WriteOutcome]:
        """Store the events of a file or dataset that `export` wrote: the same events, under ids of this store.

        Safe to repeat: what is stored already is a DUPLICATE. A store that is bound to an organisation stamps its own.

        Args:
            path: A JSONL file (also .gz or .zst), a Parquet file, or the folder of a dataset.
            format: None: by the suffix; a folder is Parquet.
            progress: True shows a progress bar; a function is called with the events read so far.

        Returns:
            How many events came to which outcome.

        Raises:
            FileNotFoundError: There is nothing at `path`.
            ValueError: The format is not known; or the file is not whole, or a record is malformed or is not what its
                content_hash says: those before it are stored.
            MissingExtraError: Parquet or zstd, and pyarrow is not installed.
            AuditUnavailableError: With AUDIT_MODE=strict; the batches before were stored.
        """
        from agent_gateway_store.audit.importing import events_in, importable

        source = Path(path)
        kind = importable(source, format)
        with told(progress, f"Importing {source.name}") as tell:
            return await self.write_many(counted(events_in(source, kind), tell))

    async def _batches(
        self, events: Iterable[AuditEvent] | AsyncIterable[AuditEvent]
    ) -> AsyncIterator[list[EncodedRow]]:
        rows: list[EncodedRow] = []
        record = partial(encode_event, org_id=self._org_id)
        try:
            async for some in _slices(events):
                rows.extend(map(record, some))
                if len(rows) >= _BULK_ROWS:
                    yield rows
                    rows = []
        except Exception:
            if rows:
                yield rows
            raise
        if rows:
            yield rows

    async def record(self, event: AuditEvent, *, session: AsyncSession) -> WriteOutcome:
        """Store `event` in the transaction of `session`: it is committed or rolled back with the caller's work.

        Plugins see it before (`gateway_store_before_audit_write`); none is told of it afterwards, since only the caller
        knows of the commit.

        Returns:
            STORED or DUPLICATE.

        Raises:
            StoreUnavailableError: The database could not take it.
            ValidationError: A field was set past the validation, and is not valid.
        """
        record = encode_event(event, org_id=self._org_id)
        if self._preparing.is_wanted:
            (record,) = await self._preparing.prepare([record])
        with translate_errors("record the event"):
            return await insert_event(session, record)

    async def flush(self) -> int:
        """Wait until every event written so far is acknowledged, and try to empty the spool.

        Returns:
            How many events still wait in the spool: 0 unless the database is away.
        """
        self._database.check_owner()
        await self._preparing.settle()
        return await self._writer().flush()

    @property
    def counters(self) -> AuditCounters:
        """What became of the events written in this process since the store was opened; a copy."""
        told = {"withheld": self._preparing.withheld, "untold": self._telling.untold}
        return replace(self._writer().counters, **told)


async def _slices(events: Iterable[AuditEvent] | AsyncIterable[AuditEvent]) -> AsyncIterator[Sequence[AuditEvent]]:
    if isinstance(events, AsyncIterable):
        async for event in events:
            yield (event,)
        return
    source = iter(events)
    while True:
        some: list[AuditEvent] = []
        try:
            some.extend(islice(source, _SLICE_ROWS))
        except Exception:
            yield some
            raise
        if not some:
            return
        yield some
        # A plain iterable never lets the loop run by itself.
        await asyncio.sleep(0)
