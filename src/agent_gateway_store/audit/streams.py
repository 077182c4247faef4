"""What reads the audit log at length: streams, new events as they come, frames, exports."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from sqlalchemy import Dialect

from agent_gateway_store.audit.changes import changes
from agent_gateway_store.audit.filters import Filters, criteria
from agent_gateway_store.audit.progress import told
from agent_gateway_store.audit.query import COLUMNS, AuditQuery, check_limit
from agent_gateway_store.audit.reading import events_of
from agent_gateway_store.audit.selects import newest, parameters
from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.results import Page
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.statements import CompiledStatement
from agent_gateway_store.storage.streaming import fetched, streamed

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow as pa

    from agent_gateway_store.audit.exporting import ExportResult

__all__ = ["AuditReader"]

_FOLLOWED = 1_000
_LONGEST_PAUSE_S = 5.0
_logger = logging.getLogger("agent_gateway_store.audit")


class AuditReader(AuditQuery):
    """Reads audit events of a whole database, in any number."""

    _database: Database

    async def stream(self, **filters: Unpack[Filters]) -> AsyncGenerator[AuditEvent]:
        """Yield every event that matches (see `Filters`), newest first, as the log was when the first was asked for.

        Takes constant memory: the database is read by a server-side cursor, which holds a connection until the end.
        Who leaves early closes it: `async with contextlib.aclosing(store.audit.stream()) as events`.

        Raises:
            TypeError: There is no such filter, or its value has the wrong type.
            ValueError: There is no such decision, status or time.
        """
        found = criteria(filters, org_id=self._org_id)
        dialect = self._database.engine.dialect
        query = newest(dialect, found, limit=None)
        async with aclosing(streamed(self._database, query, parameters(dialect, found.values))) as batches:
            async for rows in batches:
                for event in events_of(rows):
                    yield event

    async def changes(
        self, cursor: str | None = "now", *, limit: int = 1_000, **filters: Unpack[Filters]
    ) -> Page[AuditEvent]:
        """Return the events that were committed since `cursor`, in the order of their commits.

        `next_cursor` is always there and leads on; kept somewhere, it survives a restart. However long transactions
        stay open, no event is missed and none comes twice, also over a crash of the database or a failover. What was
        committed before one call comes before what was committed after it; within one call the order is that of the
        transactions' beginnings.

        Args:
            cursor: `next_cursor` of the call before; "now" or None returns no event and the cursor to begin with;
                "beginning" goes through what there is first, by id.
            limit: At most so many, 1 to 100,000.
            filters: See `Filters`; the same at each call.

        Raises:
            InvalidCursorError: The cursor did not come from this method with these filters, or the newest event that it
                has passed is not in this database, as on a promoted standby that had not received it.
            TypeError: There is no such filter, or its value has the wrong type.
            ValueError: There is no such decision, status or time, or `limit` is out of range.
        """
        page, _ = await self._changes("now" if cursor is None else cursor, check_limit(limit), filters)
        return page

    async def follow(
        self, *, start: str | None = "now", poll_s: float = 0.5, patience_s: float = 60.0, **filters: Unpack[Filters]
    ) -> AsyncGenerator[AuditEvent]:
        """Yield new events as they are committed, without end; what `changes` promises holds.

        A database that is away is waited for. No connection is held between two looks.

        Args:
            start: "now" or None: what is committed from the first iteration on; "beginning": everything; or a cursor of
                `changes` with the same filters.
            poll_s: Seconds between two looks at the database.
            patience_s: For how many seconds a database that is away is waited for.
            filters: See `Filters`.

        Raises:
            InvalidCursorError: `start` is no cursor of `changes`, or the newest event passed is not in the database any
                more, as after a failover to a standby that had not received it.
            StoreUnavailableError: The database was away for longer than `patience_s`.
            TypeError: There is no such filter, or its value has the wrong type.
            ValueError: There is no such decision, status or time, or `poll_s` is not above zero.
        """
        if not poll_s > 0:
            raise ValueError(f"poll_s must be more than zero, not {poll_s}.")
        cursor = "now" if start is None else start
        loop = asyncio.get_running_loop()
        answered, is_away = loop.time(), False
        while True:
            try:
                page, is_more = await self._changes(cursor, _FOLLOWED, filters)
            except StoreUnavailableError as exc:
                if loop.time() - answered > patience_s:
                    raise
                if not is_away:
                    _logger.warning("Following the audit log waits for the database: %s", exc)
                is_away = True
                await asyncio.sleep(min(max(poll_s, 0.1), _LONGEST_PAUSE_S))
                continue
            answered, is_away, cursor = loop.time(), False, page.next_cursor or cursor
            for event in page:
                yield event
            answered = loop.time()
            if not is_more:
                await asyncio.sleep(poll_s)

    async def _changes(self, cursor: str, limit: int, filters: Filters) -> tuple[Page[AuditEvent], bool]:
        found = criteria(filters, org_id=self._org_id, listing="changes")
        async with self._database.connection("read") as connection:
            events, following, is_more = await changes(connection, found, cursor, limit)
        return Page(events, next_cursor=following, columns=COLUMNS, record_type=AuditEvent), is_more

    async def to_arrow(self, **filters: Unpack[Filters]) -> pa.Table:
        """Return every event that matches as an Arrow table, newest first; no event object is made.

        Columns and types are those of `Page.to_arrow()`; JSON columns hold the JSON text as the database spells it.

        Raises:
            MissingExtraError: pyarrow is not installed.
            TypeError: There is no such filter, or its value has the wrong type.
            ValueError: There is no such decision, status or time.
        """
        from agent_gateway_store.audit.bulk import whole_table

        return await whole_table(self._database, criteria(filters, org_id=self._org_id))

    async def to_pandas(self, **filters: Unpack[Filters]) -> pandas.DataFrame:
        """Return what `to_arrow` does as a pandas DataFrame. Raises what it raises, also where pandas is missing."""
        from agent_gateway_store.results.arrow import as_pandas

        return await asyncio.to_thread(as_pandas, await self.to_arrow(**filters))

    async def to_polars(self, **filters: Unpack[Filters]) -> polars.DataFrame:
        """Return what `to_arrow` does as a Polars DataFrame. Raises what it raises, also where Polars is missing."""
        from agent_gateway_store.results.arrow import as_polars

        return await asyncio.to_thread(as_polars, await self.to_arrow(**filters))

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
        the end: there is never a partial file at `path`. JSONL and Parquet can be read back by `import_file`.

        Args:
            path: Where to; its folder must exist.
            format: None: by the suffix of `path` (.jsonl, .csv, .parquet, and .gz or .zst behind the first two).
            compression: None: by the suffix; Parquet is packed by zstd.
            partition_by: "day": `path` becomes a Parquet dataset with a folder `day=YYYY-MM-DD` for each UTC day.
            raw: CSV only. False puts an apostrophe before what a spreadsheet could take for a formula, which alters
                the data; True leaves everything as it is.
            overwrite: Replace what is at `path`.
            progress: True shows a progress bar; a function is called with the rows written so far, also from a thread.
            filters: See `Filters`.

        Raises:
            FileExistsError: There is something at `path`, and `overwrite` is False.
            OSError: The file cannot be written.
            MissingExtraError: Parquet or zstd, and pyarrow is not installed.
            TypeError: There is no such filter, or its value has the wrong type.
            ValueError: The format is unknown or does not go with the other arguments, or a filter has no such value.
        """
        from agent_gateway_store.audit.exporting import export
        from agent_gateway_store.audit.targets import format_of

        target = Path(path)
        if partition_by not in (None, "day"):
            raise ValueError(f'partition_by must be "day" or None, not {partition_by!r}.')
        by_day = partition_by == "day"
        kind, packed = format_of(target, format, compression, default="parquet" if by_day else None)
        if by_day and kind != "parquet":
            raise ValueError('partition_by="day" needs format="parquet".')
        if raw and kind != "csv":
            raise ValueError('raw=True is for format="csv": the others alter nothing.')
        found = criteria(filters, org_id=self._org_id)
        with told(progress, f"Exporting to {target.name}") as tell:
            return await export(
                self._database,
                found,
                target,
                format=kind,
                compression=packed,
                by_day=by_day,
                raw=raw,
                overwrite=overwrite,
                tell=tell,
            )

    async def _fetch_long(
        self, query: Callable[[Dialect], CompiledStatement], values: Mapping[str, Any]
    ) -> Sequence[Sequence[Any]]:
        dialect = self._database.engine.dialect
        return await fetched(self._database, query(dialect), parameters(dialect, values))
