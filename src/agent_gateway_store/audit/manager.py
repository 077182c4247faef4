"""`store.audit`: writes audit events, each stored once and without failing the caller, and reads them again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store.audit.calls import HashApproval, RecordedCall, argument_names, draft_event, shown_arguments
from agent_gateway_store.audit.filters import Filters, criteria
from agent_gateway_store.audit.hooks import AfterWriteHooks, BeforeWriteHooks
from agent_gateway_store.audit.outcomes import AuditCounters, WriteOutcome
from agent_gateway_store.audit.query import AuditQuery, changes_page, check_limit, event_batches, followed
from agent_gateway_store.audit.selects import newest, oldest
from agent_gateway_store.audit.writer import OpenWriter
from agent_gateway_store.audit.writes import EventWriter
from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.audit import AuditEvent, Decision
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import ToolCall
from agent_gateway_store.results import Page, Stats
from agent_gateway_store.results.cells import columns_of
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.filters import duration
from agent_gateway_store.storage.host import require_session
from agent_gateway_store.storage.streaming import ended_with, require_open
from agent_gateway_store.telemetry import current_trace_id

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow as pa

    from agent_gateway_store.hooks.specs import Sink
    from agent_gateway_store.storage.export import ExportResult


class AuditManager:
    """`store.audit`: writes and reads audit events.

    Args:
        database: Where they are kept.
        writer: Holds the group-commit writer while the store is open.
        org_id: Stamp this organisation on each event and see only it; None takes the event's own and sees all.
        before, after: The plugins that may change events before they are stored, and are notified afterwards.
        hash_args: Hashes the arguments of a call, as `GatewayStore.hash_args` does.
        hash_approval: Returns the hash of an approval and its votes.
        ship: Does what `ship` says.

    Attributes:
        event_writer: Writes events for this class and for the integrations.
    """

    def __init__(
        self,
        database: Database,
        writer: OpenWriter,
        *,
        org_id: str | None = None,
        before: BeforeWriteHooks,
        after: AfterWriteHooks,
        hash_args: Callable[[Mapping[str, Any]], str],
        hash_approval: HashApproval,
        ship: Callable[..., Awaitable[int]],
    ) -> None:
        self.event_writer = EventWriter(writer, before, org_id)
        self._database = database
        self._writer = writer
        self._org_id = org_id
        self._before = before
        self._after = after
        self._hash_args = hash_args
        self._hash_approval = hash_approval
        self._ship = ship
        self._queries = AuditQuery(database, org_id=org_id)
        self._lists = AuditQuery(database.replica, org_id=org_id)

    async def write(self, event: AuditEvent) -> WriteOutcome:
        """Store `event` and commit, together with other events that arrive meanwhile. Never raises in the default mode.

        Returns after the commit, or after fsync into the spool while the database is away. Safe to repeat: the same
        event again is a DUPLICATE. Cancelling the caller does not cancel the write. `event` itself is not changed.

        Raises:
            AuditUnavailableError: With AUDIT_MODE=strict, if the event could not be stored, or is not valid because a
                field was set without validation; in the default mode such an event is LOST. In both, if the store was
                opened on a standby, which takes no writes.
            StoreNotOpenError: The store is not open here.
            TypeError: `event` is not an AuditEvent.
        """
        # Taken before our own span, which differs from one attempt to the next: the same event stays the same.
        return await self.event_writer.write(event, current_trace_id())

    async def write_many(self, events: Iterable[AuditEvent] | AsyncIterable[AuditEvent]) -> Counter[WriteOutcome]:
        """Store many events, in order, in batches that are committed one by one; return the number of each outcome.

        Args:
            events: Any iterable, read in constant memory while its events are stored. If it raises, the events before
                are stored, and the caller gets the error. An event that is not valid is LOST and stops no other.

        Raises:
            AuditUnavailableError: With AUDIT_MODE=strict, if an event could not be stored, or is not valid.
            StoreNotOpenError: The store is not open here.
            TypeError: One is not an AuditEvent.
        """
        return await self.event_writer.write_many(events, current_trace_id())

    async def import_file(
        self,
        path: str | PathLike[str],
        *,
        format: Literal["jsonl", "parquet"] | None = None,  # noqa: A002  as `export` has it
        on_refused: Callable[[str], None] | None = None,
        progress: bool | Callable[[int], None] = False,
    ) -> Counter[WriteOutcome]:
        """Store the events of a file or dataset that `export` wrote: the same events, under ids of this store.

        Safe to repeat: an event that is stored already is a DUPLICATE. A store bound to an organisation stamps that.
        Returns how many events came to which outcome.

        Args:
            path: A JSONL file (also .gz or .zst), a Parquet file, or the folder of a dataset.
            format: None: by the suffix; a folder is Parquet.
            on_refused: Called with a sentence for each record that is refused, and the others are stored; None: the
                first one is raised.
            progress: True shows a progress bar; a function is called with the events read so far.

        Raises:
            FileNotFoundError, MissingExtraError: There is nothing at `path`; or pyarrow is needed, and not installed.
            ValueError: The format is not known; or the file is not whole, or a record is malformed or is not what its
                content_hash says: those before it are stored.
            AuditUnavailableError: With AUDIT_MODE=strict; the batches before were stored.
        """
        from agent_gateway_store.audit.files import importing

        with importing(Path(path), format, on_refused=on_refused, progress=progress) as events:
            # Without a trace: what is imported is what was exported.
            return await self.event_writer.write_many(events, None)

    def call(
        self,
        call: ToolCall,
        caller: CallerIdentity,
        *,
        decision: Decision | str,
        rule: str = "",
        rationale: str = "",
        approval_id: UUID | str | None = None,
        sanitize: Callable[[ToolCall], Mapping[str, Any]] = argument_names,
        intent: bool = False,
        **fields: Any,
    ) -> RecordedCall:
        """Record one tool call, which runs in the body: `async with store.audit.call(call, caller, ...) as event:`.

        On exit exactly one event is written, by `write`, with its latency and its status: SUCCESS; for what was raised
        TOOL_ERROR, TIMEOUT (TimeoutError) or CANCELLED; none where the decision lets nothing run (DENY, or
        APPROVAL_REQUIRED without `approval_id`). What was raised is raised on. What the body sets in `event` stands,
        its `execution_status`, too: None where its end is not known. The event is LOST if the store closes meanwhile.

        A process that is killed in the body leaves no event, unless `intent` is True: then an event with
        `extra["phase"]` "intent" is acknowledged before the body runs, and the event of the outcome names it in
        `parent_request_id`. `orphans` lists the intents without outcome.

        Args:
            call: The call as it runs; its arguments are hashed under this store's HASH_KEY.
            caller: Who makes it.
            decision: What the policy decided; `rule` and `rationale`: by which rule, and why.
            approval_id: The approval that released it. Its hash goes into `extra`, so that evidence proves it, too.
            sanitize: Returns the arguments that the log may show. Default: their names, each value hidden.
            fields: Other fields of `AuditEvent`; `request_id` is made if it is not given.

        Raises:
            AuditUnavailableError: The intent could not be stored, and the body did not run; or as for `write`.
            StoreNotOpenError, ValidationError: The store is not open here; a field is not valid. The body did not run.
        """
        decided = {"decision": decision, "matched_policy_rule": rule, "deterministic_rationale": rationale}
        given = {**decided, "approval_id": approval_id, **fields}

        def draft() -> AuditEvent:
            self._writer.get_here()
            shown, args_hash = shown_arguments(call, sanitize), self._hash_args(call.arguments)
            return draft_event(call, caller, shown=shown, args_hash=args_hash, fields=given)

        return RecordedCall(draft, self.event_writer.write_ended, intent=intent, hash_approval=self._hash_approval)

    async def orphans(self, *, older_than: timedelta | str = "1h", limit: int = 100) -> Page[AuditEvent]:
        """Return intents of `call` without outcome, newest first: calls that run still, or whose process was killed.

        Args:
            older_than: Only those from before so long ago, as in "10m": younger ones may run still.
            limit: At most so many, 1 to 100,000. Where there are fewer, every intent is looked at.
        """
        return await self._queries.orphans(utc_now() - duration("older_than", older_than), limit=check_limit(limit))

    async def record(self, event: AuditEvent, *, session: AsyncSession) -> WriteOutcome:
        """Store `event` in the transaction of `session`: it is committed or rolled back with the caller's work.

        Plugins may change it before (`gateway_store_before_audit_write`); none is notified afterwards, since only the
        caller knows when it commits. Returns STORED or DUPLICATE.

        Raises:
            StoreUnavailableError: The database could not take it.
            SessionInUseError: Another task uses the session at this moment.
            TransactionConflictError: The database ended the caller's transaction in favour of another one.
            TypeError, ValidationError: `session` is not an AsyncSession; a field was set to what is not valid.
            ValueError: The store cannot work in this session, say in AUTOCOMMIT, where nothing is rolled back.
        """
        require_session(session, AuditEvent, atomic=True)
        return await self.event_writer.record(session, event)

    async def flush(self) -> int:
        """Wait until every event written so far is acknowledged, and try to empty the spool.

        Returns how many events still wait in the spool: 0 unless the database is away.
        """
        writer = self._writer.get_here()
        await self._before.tasks.join()
        return await writer.flush()

    @property
    def counters(self) -> AuditCounters:
        """How many events came to which outcome in this process since the store was opened; a copy."""
        return replace(self._writer.get().counters, withheld=self._before.withheld, unnotified=self._after.unnotified)

    async def get(self, event_id: int) -> AuditEvent | None:
        """Return the event of this row (its `id`), or None; one of another organisation looks absent."""
        return await self._queries.get(event_id)

    async def get_by_request_id(self, request_id: str) -> AuditEvent | None:
        """Return the event with this `request_id`, or None; of several organisations' events the newest."""
        return await self._queries.get_by_request_id(request_id)

    async def list_by_caller(self, caller_id: str, limit: int = 50, offset: int = 0) -> Page[AuditEvent]:
        """Return up to `limit` events of one caller, after skipping `offset`."""
        return await self._lists.list_by_caller(caller_id, limit, offset)

    async def list_by_decision(self, decision: Decision | str, limit: int = 50) -> Page[AuditEvent]:
        """Return up to `limit` events with this decision; ValueError if there is no such decision."""
        return await self._lists.list_by_decision(decision, limit)

    async def list_recent(self, limit: int = 100) -> Page[AuditEvent]:
        """Return the `limit` newest events."""
        return await self._lists.list_recent(limit)

    async def search(
        self, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[Filters]
    ) -> Page[AuditEvent]:
        """Return events that match every filter (see `Filters`), newest first, ties broken by id.

        `next_cursor` continues with older ones; events that are added in between do not move it.

        Args:
            limit: The most events, 1 to 100,000.
            cursor: `next_cursor` of the page before; the filters must be the same.
            filters: See `Filters`; a filter that is None does not narrow.

        Raises:
            InvalidCursorError: The cursor did not come from this search.
            TypeError, ValueError: There is no such filter, or it takes no such value; or `limit` is out of range.
        """
        return await self._lists.search(limit=limit, cursor=cursor, **filters)

    async def stats(
        self,
        by: str | Sequence[str] | None = None,
        bucket: timedelta | str | None = None,
        time_zone: str | None = None,
        **filters: Unpack[Filters],
    ) -> Stats:
        """Count events and their latencies, aggregated by the database.

        Each row has the columns of its group, then `calls`, `denials` (DENY), `approvals` (APPROVAL_REQUIRED: a human
        was asked; those with an approver were released), `errors` (TOOL_ERROR and TIMEOUT) and the latency percentiles
        50, 95 and 99 in milliseconds: a latency that occurred, the first whose rank is at least that share (SQL's
        `percentile_disc`; the same on both databases). Rows come by time, then the largest group first.

        Args:
            by: Columns to group by: caller_id, tool_name, mcp_server, decision, risk_label, environment, ... An event
                counts once for each of its risk labels, and under None without one. Also hour_of_day (0 to 23) and
                weekday (1, a Monday, to 7). None: one row over everything.
            bucket: Length of time buckets, such as "1h", in whole seconds, from the hour, day or (Monday) week on.
            time_zone: Whose hours and days these are, such as "Europe/Berlin", by the rules on this machine. A day in
                which the clock changes has 23 or 25 hours; an hour that it shows twice is two buckets. None: UTC.

        Raises:
            TypeError, ValueError: As for `search`; or there is no such column or time zone.
        """
        return await self._lists.stats(by, bucket, time_zone, **filters)

    async def stream(self, **filters: Unpack[Filters]) -> AsyncGenerator[AuditEvent]:
        """Yield every event that matches (see `Filters`), newest first, as the log was when the first was asked for.

        Takes constant memory: the database is read by a server-side cursor, which holds a connection until the end.
        A caller that stops early closes it: `async with contextlib.aclosing(store.audit.stream()) as events`. Raises
        TypeError and ValueError as `search` does, and StoreNotOpenError at the first step after the store was closed.
        """
        database, found = self._database.replica, criteria(filters, org_id=self._org_id)
        async with ended_with(database, event_batches(database, found)) as batches:
            async for events in batches:
                for event in events:
                    yield event
                    require_open(database, batches)

    async def changes(
        self, cursor: str | None = "now", *, limit: int = 1_000, **filters: Unpack[Filters]
    ) -> Page[AuditEvent]:
        """Return the events that were committed since `cursor`, in the order of their commits.

        `next_cursor` is always there and continues from here, also after a restart. However long transactions stay
        open, no event is missed and none comes twice, also over a crash of the database or a failover. Events committed
        before one call come before those committed after it; within one call, in the order of their transactions.

        Args:
            cursor: `next_cursor` of the call before; "now" or None returns no event and the cursor to begin with;
                "beginning" reads what there is first, by id.
            limit: The most events, 1 to 100,000. The filters (see `Filters`) are the same at each call.

        Raises:
            InvalidCursorError: The cursor did not come from this method with these filters, or the newest event that it
                has passed is not in this database, as on a promoted standby that had not received it.
            TypeError, ValueError: As for `search`.
        """
        check_limit(limit)
        found = criteria(filters, org_id=self._org_id, listing="changes")
        return (await changes_page(self._database, found, "now" if cursor is None else cursor, limit))[0]

    async def follow(
        self, *, start: str | None = "now", poll_s: float = 0.5, patience_s: float = 60.0, **filters: Unpack[Filters]
    ) -> AsyncGenerator[AuditEvent]:
        """Yield new events as they are committed, without end, with the guarantees of `changes`.

        It waits for a database that is away. No connection is held between two reads.

        Args:
            start: "now" or None: events committed from the first iteration on; "beginning": all events; or a cursor of
                `changes` with the same filters.
            poll_s, patience_s: Seconds between two reads, and the longest wait for a database that is away.

        Raises:
            InvalidCursorError, TypeError, ValueError: As for `changes`; or `poll_s` is not above zero.
            StoreUnavailableError, SchemaOutOfDateError: The database was away for longer than `patience_s`.
        """
        found, cursor = criteria(filters, org_id=self._org_id, listing="changes"), "now" if start is None else start
        async with aclosing(followed(self._database, found, cursor, poll_s=poll_s, patience_s=patience_s)) as events:
            async for event in events:
                yield event

    async def ship(
        self,
        sink: str | Sink,
        *,
        once: bool = False,
        start: Literal["beginning", "now"] = "beginning",
        batch: int = 500,
        poll_s: float = 1.0,
    ) -> int:
        """Send the log to a sink, in the order of `changes`, each event at least once; return how many it took.

        How far the sink is stands in the database (`store.sinks`), and moves once it has acknowledged. One process at a
        time ships to it; others wait for their turn. Cancelled, it ends after the batch under way.

        Args:
            sink: The name of a plugin's; or a `Sink`.
            once: True returns at the end of the log, and raises a fault of more than a minute, which False waits out.
            start: Where a sink begins to which nothing was shipped before.
            batch: The most events at a time, 1 to 100,000.
            poll_s: Seconds between two reads at the end of the log.

        Raises:
            InvalidCursorError: As for `changes`; `store.sinks.forget` lets the sink begin anew.
            NotDeliveredError, StoreUnavailableError: With `once`: sink or database are away, or another process ships.
            SinkNotFoundError, TypeError, ValueError: There is no such sink; or another argument is out of range.
        """
        return await self._ship(sink, once=once, start=start, batch=batch, poll_s=poll_s)

    async def to_arrow(self, **filters: Unpack[Filters]) -> pa.Table:
        """Return every event that matches as an Arrow table, newest first, without making event objects.

        Columns and types are those of `Page.to_arrow()`; JSON columns hold the JSON text as the database writes it.
        Raises as `search` does, and MissingExtraError if pyarrow is not installed.
        """
        from agent_gateway_store.storage.arrow import whole_table

        database, found = self._database.replica, criteria(filters, org_id=self._org_id)
        return await whole_table(database, newest(found.shape, limit=None), found.values, columns_of(AuditEvent))

    async def to_pandas(self, **filters: Unpack[Filters]) -> pandas.DataFrame:
        """Return the table of `to_arrow` as a pandas DataFrame. Raises the same, also if pandas is missing."""
        from agent_gateway_store.results.arrow import pandas_converter

        return await asyncio.to_thread(pandas_converter(), await self.to_arrow(**filters))

    async def to_polars(self, **filters: Unpack[Filters]) -> polars.DataFrame:
        """Return the table of `to_arrow` as a Polars DataFrame. Raises the same, also if Polars is missing."""
        from agent_gateway_store.results.arrow import polars_converter

        return await asyncio.to_thread(polars_converter(), await self.to_arrow(**filters))

    async def export(
        self,
        path: str | PathLike[str],
        *,
        format: Literal["jsonl", "csv", "parquet"] | None = None,  # noqa: A002  the natural name
        compression: Literal["gzip", "zstd"] | None = None,
        partition_by: Literal["day"] | None = None,
        raw: bool = False,
        overwrite: bool = False,
        progress: bool | Callable[[int], None] = False,
        **filters: Unpack[Filters],
    ) -> ExportResult:
        """Write every event that matches to a file, oldest first, as the log was at one moment.

        Takes constant memory. The file is written under another name in the same folder, forced to disk and renamed at
        the end, so there is never a partial file at `path`. `import_file` reads JSONL and Parquet back.

        Args:
            path: The file; its folder must exist.
            format: None: by the suffix of `path` (.jsonl, .csv, .parquet, and .gz or .zst after the first two).
            compression: None: by the suffix; Parquet is compressed by zstd.
            partition_by: "day": `path` becomes a Parquet dataset with a folder `day=YYYY-MM-DD` for each UTC day.
            raw: CSV only. False puts an apostrophe before text that a spreadsheet could take for a formula.
            overwrite: Replace the file at `path`, or the dataset there by a dataset; of a link, what it leads to.
            progress: True shows a progress bar; a function is called with the rows written so far, also from a thread.

        Raises:
            FileExistsError: `path` exists, and `overwrite` is False; or it is a device, a pipe or another folder.
            OSError, MissingExtraError: The file cannot be written; Parquet or zstd, and pyarrow is not installed.
            TypeError, ValueError: As for `search`; or of the other arguments.
        """
        from agent_gateway_store.storage.export import ExportOptions, Source, export_rows

        found = criteria(filters, org_id=self._org_id)
        source = Source(oldest(found.shape), found.values, columns_of(AuditEvent), "timestamp")
        options = ExportOptions(format, compression, partition_by, raw, overwrite, progress)
        return await export_rows(self._database.replica, source, path, options)
