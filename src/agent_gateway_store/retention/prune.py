"""Prune sealed events, the oldest first, out of the table and into the archive, in batches that can be killed anywhere.

Each batch goes through steps of which every one can be the last: its files are written, synced, read back and renamed;
the manifest names them and is synced; an event that says which positions go is sealed; then the rows go. So at any
moment an event is in the table or in the archive, and no row is missing without a sealed event that says why.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    bindparam,
    delete,
    func,
    insert,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_gateway_store.archive import files
from agent_gateway_store.archive.manifest import Manifest, Positions, runs_of
from agent_gateway_store.audit.doors import PRUNE, is_door, write_door
from agent_gateway_store.audit.selects import finite_timestamp, select_events, table
from agent_gateway_store.clock import utc_now
from agent_gateway_store.encoding.sanitize import storable_key
from agent_gateway_store.errors import LogMismatchError, StoreUnavailableError
from agent_gateway_store.evidence.sealer import Sealer, last_checkpoint
from agent_gateway_store.models.columns import UtcDateTime
from agent_gateway_store.models.evidence import AuditLeaf
from agent_gateway_store.models.retention import AuditPrune, Hold
from agent_gateway_store.results.arrow import arrow
from agent_gateway_store.results.cells import Column
from agent_gateway_store.retention.holds import is_held, lock_holds, read_holds
from agent_gateway_store.retention.ownership import open_own_archive, require_held
from agent_gateway_store.storage.append_only import open_door
from agent_gateway_store.storage.arrow import arrow_blocks, in_thread
from agent_gateway_store.storage.database import Database, changed
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.statements import Statement, is_one_of, literal_number

if TYPE_CHECKING:
    import pyarrow as pa

_leaves = AuditLeaf.__table__
_prunes = AuditPrune.__table__
_sealed = table.join(_leaves, _leaves.c.event_id == table.c.id)

# Chosen, of a file: large enough for readers, and written in a second, for which holds and erasures wait.
_BATCH_ROWS = 20_000
# Chosen: with events of 1 MB not more than memory holds; the next batch goes by the size of these.
_FIRST_ROWS = 200
# Chosen: bounds memory, where a batch is held as it was read and as it was read back.
_BATCH_BYTES = 5 * 2**20
# Rows of one DELETE: some 100 ms on PostgreSQL; on SQLite, where writers wait for it, some 20 ms.
DELETE_ROWS = {"postgresql": 10_000, "sqlite": 1_000}
# Chosen: nobody has a lock on these rows for long, and a DELETE that takes longer would keep others waiting.
_TIMEOUTS = "SELECT set_config('lock_timeout', '5s', true), set_config('statement_timeout', '30s', true)"
# Chosen: a block is held as text and as a table.
_BLOCK_BYTES = 2**19
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COLUMNS = (*files.COLUMNS, Column("transaction_id", "integer"))


class Place(NamedTuple):
    """Where the next batch begins: after this event."""

    timestamp: datetime
    id: int


class Doomed(NamedTuple):
    """Events that go, at least one, column by column: there are many of them."""

    ids: Sequence[int]
    positions: Sequence[int]
    transaction_ids: Sequence[int | None]
    last: Place
    # Others may come after it.
    has_more: bool


class _Newest(NamedTuple):
    """The newest event when a run began: it stays, as cursors are marked by it, and so does what came later."""

    id: int
    transaction_id: int | None
    last_of_transaction: int | None


class Step(NamedTuple):
    """What became of one batch."""

    events: int
    files: int
    next: Place | None


def archived_columns(dialect: str) -> Select[Any]:
    """Select events as the archive holds them, joined with their leaves."""
    secrets = (_leaves.c.salt, _leaves.c.leaf_hash)
    # SQLite's hex of NULL is an empty text.
    hexed = [
        func.encode(each, "hex") if dialect == "postgresql" else func.nullif(func.lower(func.hex(each)), "")
        for each in secrets
    ]
    hashes = (each.label(column.name) for each, column in zip(hexed, secrets, strict=True))
    columns = (_leaves.c.position, *hashes, table.c.transaction_id)
    return select_events(dialect, ()).add_columns(*columns).select_from(_sealed)


_DELETE = Statement(lambda dialect: delete(table).where(is_one_of(dialect, table.c.id, "p_ids", BigInteger())))


class Pruner:
    """Prunes one batch after the other; its user holds the lock of retention. Without `archive` it discards."""

    def __init__(
        self, database: Database, sealer: Sealer, *, by: str, environment: str, before: datetime, archive: Path | None
    ) -> None:
        self._database, self._sealer = database, sealer
        self._by, self._environment, self._before = by, environment, before
        self._manifest = None if archive is None else Manifest(archive)
        self._run_id = 0
        self._holds: list[Hold] = []
        self._newest: _Newest | None = None
        self._limit = _BATCH_ROWS if archive is None else min(_FIRST_ROWS, _BATCH_ROWS)

    async def start(self) -> None:
        """Note that a run began; make the archive, or remove what a killed run has left in it."""
        if self._manifest is not None:
            await open_own_archive(self._database, self._manifest)
        folder = None if self._manifest is None else str(self._manifest.folder.absolute())
        values = {"pruned_by": storable_key(self._by), "pruned_before": self._before, "archive": folder, "events": 0}
        async with self._database.write() as connection:
            started = insert(_prunes).values(started_at=utc_now(), **values).returning(_prunes.c.id)
            self._run_id = (await connection.execute(started)).scalar_one()
            self._newest = await self._read_newest(connection)

    async def end(self, result: str) -> None:
        """Note how the run ended."""
        ended = update(_prunes).where(_prunes.c.id == self._run_id)
        await changed(self._database, ended.values(ended_at=utc_now(), result=result))

    async def step(self, place: Place | None, still_locked: Any) -> Step:
        """Prune one batch after `place`."""
        manifest = self._manifest
        doomed, written = await (self._archive_next(manifest, place, still_locked) if manifest else self._next(place))
        if doomed is None:
            return Step(0, 0, None)
        await still_locked()
        await self._announce(doomed)
        size, count = DELETE_ROWS[self._database.dialect], len(doomed.ids)
        for start in range(0, count, size):
            await self._delete(doomed.ids[start : start + size], doomed.transaction_ids[start : start + size])
        return Step(count, written, doomed.last if doomed.has_more else None)

    async def counts(self) -> tuple[int, int]:
        """Return how many events are old enough and held, and how many could still be pruned."""
        async with self._database.read() as connection:
            self._newest = await self._read_newest(connection)
            held = is_held(self._database.dialect, await read_holds(connection))
            counted = select(func.count().filter(held), func.count().filter(~held)).select_from(_sealed)
            row = (await connection.execute(counted.where(*self._candidates()))).one()
        return row[0], row[1]

    def _candidates(self) -> list[ColumnElement[bool]]:
        found = [table.c.timestamp < self._before, ~is_door()]
        if self._newest is not None:
            at, transaction_id, last = self._newest
            found += [table.c.id < bindparam(None, at, BigInteger())]
            if transaction_id is not None:
                found += [
                    func.coalesce(table.c.transaction_id, 0) <= bindparam(None, transaction_id, BigInteger()),
                    table.c.id != bindparam(None, last, BigInteger()),
                ]
        return found

    async def _read_newest(self, connection: AsyncConnection) -> _Newest | None:
        # Once for a run: the last transaction may be an import of a million events, all of which are looked at.
        newest = (await connection.execute(select(func.max(table.c.id)))).scalar()
        if newest is None:
            return None
        if self._database.dialect == "sqlite":
            return _Newest(newest, None, None)
        last = select(table.c.transaction_id, table.c.id).where(table.c.transaction_id.is_not(None))
        last = last.order_by(table.c.transaction_id.desc(), table.c.id.desc()).limit(1)
        found = (await connection.execute(last)).first()
        return _Newest(newest, *(found or (None, None)))

    async def _next(self, place: Place | None) -> tuple[Doomed | None, int]:
        """Return the next events to discard."""
        async with self._database.read() as connection:
            self._holds = await read_holds(connection)
            stamp = finite_timestamp() if self._database.dialect == "postgresql" else table.c.timestamp
            columns = (table.c.id, _leaves.c.position, table.c.transaction_id, stamp.label("timestamp"))
            statement = self._narrowed(select(*columns).select_from(_sealed), place)
            rows = (await connection.execute(statement)).all()
        if not rows:
            return None, 0
        ids, positions, transaction_ids, stamps = zip(*rows, strict=True)
        last = Place(stamps[-1], ids[-1])
        return Doomed(ids, positions, transaction_ids, last, len(ids) == self._limit), 0

    async def _archive_next(
        self, manifest: Manifest, place: Place | None, still_locked: Any
    ) -> tuple[Doomed | None, int]:
        """Archive the next events, those that a killed run has archived left out; return them and the files written."""
        async with self._database.read() as connection:
            self._holds = await read_holds(connection)
        statement = Statement(lambda dialect: self._narrowed(archived_columns(dialect), place))
        tables: list[Any] = []
        has_more = False

        def take(block: pa.Table) -> None:
            nonlocal has_more
            if has_more:
                return
            # Rows may be far larger than those before them, by which their number was chosen.
            room = max(0, _BATCH_BYTES - sum(each.nbytes for each in tables))
            rows = block.num_rows * room // max(block.nbytes, 1)
            has_more = rows < block.num_rows
            tables.append(block.slice(0, max(rows, not tables)))

        await arrow_blocks(self._database, statement, {}, _COLUMNS, take, block_bytes=_BLOCK_BYTES, parallel=False)
        if not tables:
            return None, 0
        events = arrow().concat_tables(tables)
        has_more = has_more or events.num_rows == self._limit
        # The next batch takes as many rows as fit, as far as these tell.
        fitting = _BATCH_BYTES * events.num_rows // max(events.nbytes, 1)
        self._limit = max(1, min(fitting, 4 * self._limit, _BATCH_ROWS))
        ids, positions, transaction_ids = (
            events.column(name).to_pylist() for name in ("id", "position", "transaction_id")
        )
        # As a number, because Arrow imports pandas to make a datetime, which takes 40 MB.
        last = _EPOCH + timedelta(microseconds=events.column("timestamp")[-1].cast("int64").as_py())
        doomed = Doomed(ids, positions, transaction_ids, Place(last, ids[-1]), has_more)
        return doomed, await self._write(manifest, events.drop_columns(["transaction_id"]), positions, still_locked)

    def _narrowed(self, statement: Select[Any], place: Place | None) -> Select[Any]:
        """Return the SELECT of the next events, the oldest first."""
        found = statement.where(*self._candidates())
        if self._holds:
            found = found.where(~is_held(self._database.dialect, self._holds))
        if place is not None:
            after = bindparam(None, place.timestamp, UtcDateTime()), bindparam(None, place.id, BigInteger())
            found = found.where(tuple_(table.c.timestamp, table.c.id) > tuple_(*after))
        return found.order_by(table.c.timestamp, table.c.id).limit(literal_number(self._limit))

    async def _write(self, manifest: Manifest, events: pa.Table, positions: Sequence[int], still_locked: Any) -> int:
        await in_thread(manifest.read)
        entries = manifest.of_kind("events")
        known = Positions([list(run) for entry in entries for run in entry.positions])
        if known.meets(runs_of(positions)):
            archived = [position in known for position in positions]
            # A killed run wrote them. Only what is intact may take the place of the rows.
            again = Positions([[each, each] for each, is_there in zip(positions, archived, strict=True) if is_there])
            holding = [entry for entry in entries if again.meets(entry.positions)]
            await in_thread(lambda: files.require_intact(manifest.folder, holding))
            repeated = events.filter(arrow().array(archived))
            await in_thread(lambda: require_held(manifest, holding, repeated))
            events = events.filter(arrow().array([not each for each in archived]))
        if not events.num_rows:
            return 0
        async with self._database.read() as connection:
            last = await last_checkpoint(connection)
        note = None if last is None else last.note
        written = await in_thread(lambda: files.write_events(manifest, events, note))
        await still_locked()
        await in_thread(lambda: manifest.append(written))
        # Otherwise Arrow's allocator keeps the memory of each batch for some time.
        arrow().default_memory_pool().release_unused()
        return len(written)

    async def _announce(self, doomed: Doomed) -> None:
        """Write and seal the event that says which positions go."""
        facts = {
            "positions": runs_of(doomed.positions),
            "events": len(doomed.ids),
            "before": self._before.isoformat(),
            "archived": self._manifest is not None,
        }
        why = "Events older than the retention were pruned."
        event = partial(write_door, tool=PRUNE, facts=facts, by=self._by, environment=self._environment, why=why)
        await seal_door(self._database, self._sealer, event)

    @retry_conflicts
    async def _delete(self, ids: Sequence[int], transaction_ids: Sequence[int | None]) -> None:
        async with self._database.write() as connection:
            if self._database.dialect == "postgresql":
                await connection.execute(text(_TIMEOUTS))
            if await lock_holds(connection) != self._holds:
                raise StoreUnavailableError(
                    "The lock of retention was lost and holds have changed, so the rest was not pruned: run it again."
                )
            history = (await connection.execute(text("SELECT history_id FROM database_identity"))).scalar() or 0
            # Ids of transactions from before a restore are those of another server.
            pairs = zip(ids, transaction_ids, strict=True)
            known = [transaction_id for id_, transaction_id in pairs if transaction_id is not None and id_ > history]
            async with open_door(connection):
                compiled = _DELETE.compiled(connection.dialect)
                await connection.execute(compiled.statement, {"p_ids": list(ids)})
            run = _prunes.c
            values = {
                run.events: run.events + len(ids),
                run.last_event_id: _larger(self._database.dialect, run.last_event_id, max(ids)),
            }
            if known:
                values[run.last_transaction_id] = _larger(self._database.dialect, run.last_transaction_id, max(known))
            await connection.execute(update(_prunes).where(run.id == self._run_id).values(values))


def _larger(dialect: str, column: Any, value: int) -> ColumnElement[int]:
    both = func.coalesce(column, value), bindparam(None, value, BigInteger())
    return func.greatest(*both) if dialect == "postgresql" else func.max(*both)


async def seal_door(
    database: Database, sealer: Sealer, write_event: Callable[[AsyncConnection], Awaitable[int]]
) -> None:
    """Commit what `write_event` writes, whose id it returns, and seal it; LogMismatchError where that fails."""

    @retry_conflicts
    async def write() -> int:
        async with database.write() as connection:
            return await write_event(connection)

    event_id = await write()
    # The second time by comparing everything: ids of transactions are given out again after a crash of the server.
    for anew in (False, True):
        await sealer.seal(anew=anew)
        async with database.read() as connection:
            leaf = select(_leaves.c.position).where(_leaves.c.event_id == event_id)
            if (await connection.execute(leaf)).first() is not None:
                return
    raise LogMismatchError(
        "The event that says what is pruned could not be sealed, so nothing was: run `gateway-store evidence verify`."
    )
