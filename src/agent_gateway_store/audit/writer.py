"""Group commit: rows that arrive while the connections are busy share the next commit.

A write is acknowledged after the commit, or after fsync into the spool while the database is away.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import TypeAlias

from agent_gateway_store import telemetry
from agent_gateway_store._concurrency import BatchQueue
from agent_gateway_store.audit.backends import Backend, RowResult, store_batch
from agent_gateway_store.audit.outcomes import AuditCounters, WriteOutcome, log_lost
from agent_gateway_store.audit.record import EncodedRow, size_of, to_values
from agent_gateway_store.audit.spool import Spool
from agent_gateway_store.errors import (
    AuditUnavailableError,
    GatewayStoreError,
    StoreNotOpenError,
    StoreUnavailableError,
    UnreadableRowError,
)
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.storage.database import NO_WRITES
from agent_gateway_store.storage.errors import conflict_of, translate_errors

# Chosen: about ten batches, so that the next one is full while one is committed, and memory is bounded.
MAX_QUEUED_ROWS, MAX_QUEUED_BYTES = 10_000, 64 * 2**20
# Chosen, of one commit: no row of a batch is acknowledged before all of it is on disk.
MAX_BATCH_ROWS, MAX_BATCH_BYTES = 1_000, 8 * 2**20
# Chosen: 16 rows take Python and the server half a millisecond, about as long as a commit takes an SSD. So from 32 rows
# on, one half is encoded while the other is committed; with fewer a second commit would cost more than it saves.
MIN_SHARE_ROWS = 16
# Chosen: between two attempts to reach a database that is away.
RETRY_AFTER_S = 0.5
# Chosen, of one commit: new events wait for it, to keep the order.
_REPLAY_ROWS = 500

_Answer: TypeAlias = WriteOutcome | AuditUnavailableError

_NOT_REPLAYED = "What waits in the spool %s cannot be brought in yet (%s): it stays there, and is tried again."
_REFUSED = "The database refuses an audit event (%s): %s."

_logger = logging.getLogger("agent_gateway_store.audit")


class OpenWriter:
    """Holds the writer of a store while the store is open.

    Args:
        check_owner: Raises outside the process and event loop that opened the store.
        strict: What cannot be written raises.

    Attributes:
        has_recorded: True once an event was stored past the writer, in a transaction of the caller's.
    """

    def __init__(self, check_owner: Callable[[], None], *, strict: bool) -> None:
        self._check_owner, self.is_strict = check_owner, strict
        self.writer: AuditWriter | None = None
        self.has_recorded = False

    @property
    def has_written(self) -> bool:
        """True once this store has added an event to the database."""
        counters = self.writer.counters if self.writer else None
        return self.has_recorded or (counters is not None and counters.stored + counters.replayed > 0)

    def get(self) -> AuditWriter:
        """Return the writer.

        Raises:
            StoreNotOpenError: The store is not open.
        """
        if self.writer is None:
            raise StoreNotOpenError("The store is not open: use `async with GatewayStore() as store:` or `open()`.")
        return self.writer

    def get_here(self) -> AuditWriter:
        """Return the writer, to write by.

        Raises:
            StoreNotOpenError: The store is not open in this process and event loop.
        """
        self._check_owner()
        return self.get()


class AuditWriter:
    """Takes rows from any number of tasks of one event loop and commits them in batches.

    Args:
        backend: Where rows are committed; closed with this.
        spool: Where rows wait while the database is away.
        strict: Writes raise instead; what an earlier mode left in the spool is brought in all the same.
        notify: Receives the rows that were committed; must not raise. None: there is no plugin for them.
        on_standby: The store was opened on a standby: until it takes a write, writes raise and nothing is spooled.
    """

    def __init__(
        self,
        backend: Backend,
        spool: Spool,
        *,
        strict: bool = False,
        notify: Callable[[Sequence[EncodedRow]], None] | None = None,
        on_standby: bool = False,
    ) -> None:
        self._on_standby = on_standby
        self.spool = spool
        self._is_strict = strict
        self._backend = backend
        self._notify = notify
        self._queue: BatchQueue[EncodedRow, WriteOutcome] = BatchQueue(
            self._commit,
            max_items=MAX_BATCH_ROWS,
            places=backend.places,
            min_share=MIN_SHARE_ROWS,
            max_bytes=MAX_BATCH_BYTES,
            size=size_of,
            max_queued=MAX_QUEUED_ROWS,
            max_queued_bytes=MAX_QUEUED_BYTES,
        )
        self._counts = Counter[WriteOutcome]()
        self._replayed = 0
        # One for each batch that the backend takes at once; all of them for what must be alone.
        self._commits = asyncio.Semaphore(backend.places)
        self._recovering = asyncio.Lock()
        self._recoverer: asyncio.Task[None] | None = None
        self._is_away = False
        self._is_closed = False
        self._is_stuck = False
        self._retry_at = 0.0

    @property
    def counters(self) -> AuditCounters:
        """How many events came to which outcome so far."""
        counts = {outcome.value.lower(): self._counts[outcome] for outcome in WriteOutcome}
        return AuditCounters(**counts, replayed=self._replayed, queue_depth=len(self._queue))

    @property
    def queue_age_s(self) -> float:
        """For how many seconds the oldest event has waited for its commit."""
        return self._queue.age_s

    async def open(self) -> None:
        """Start to replay what an earlier process left in the spool; log at once if nothing could be spooled."""
        if not self._is_strict:
            try:
                await self.spool.check()
            except StoreUnavailableError as exc:
                _logger.error("While the database is away events would be lost. %s", exc)
        if self.spool.exists:
            self._start_recovery(at_once=True)

    async def write(self, row: EncodedRow) -> WriteOutcome:
        """Commit `row` and return its outcome.

        While the queue is full this waits. Cancelling the caller does not cancel the write.

        Raises:
            AuditUnavailableError: In the strict mode, if the row could not be committed; in any, on a standby.
            StoreNotOpenError: The writer was closed.
        """
        self._check_open()
        return await self._queue.run(row)

    def reject(self, event: AuditEvent, cause: Exception) -> WriteOutcome:
        """Count and log an event that is not valid as LOST.

        Raises:
            AuditUnavailableError: In the strict mode.
        """
        if self._is_strict:
            raise AuditUnavailableError(
                "The event is not valid, so the call must not go through: see the cause for what is wrong."
            ) from cause
        log_lost(event, cause, request_id=str(event.request_id))
        self._counts[WriteOutcome.LOST] += 1
        return WriteOutcome.LOST

    def enqueue_detached(self, row: EncodedRow) -> None:
        """Commit `row` for a caller that was cancelled; `flush` and `close` wait for it."""
        self._queue.add(row).cancel()

    async def write_batch(self, rows: Sequence[EncodedRow]) -> list[WriteOutcome]:
        """Commit `rows` as one batch without the queue, for bulk.

        Raises:
            AuditUnavailableError: In the strict mode, if they could not be committed.
            StoreNotOpenError: The writer was closed.
        """
        self._check_open()
        return [_accepted(answer) for answer in await self._commit(rows)]

    async def flush(self) -> int:
        """Wait until everything queued is acknowledged and try to empty the spool; return how many rows still wait."""
        await self._queue.join()
        if not self.spool.exists:
            return 0
        with suppress(Exception):
            await self._replay_spool()
        return (await self.spool.counts())[0]

    async def close(self) -> None:
        """Acknowledge everything queued, then close the connections. Rows in the spool stay there."""
        self._is_closed = True
        await self._queue.join()
        if self._recoverer is not None:
            self._recoverer.cancel()
            await asyncio.wait([self._recoverer])
        # A replay or a bulk commit that is under way still uses the backend.
        async with self._recovering, self._no_commit():
            await self._backend.close()
            await self.spool.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreNotOpenError("The store was closed: open it again.")

    @asynccontextmanager
    async def _no_commit(self) -> AsyncIterator[None]:
        """Wait for the commits under way and let none begin. Only with `_recovering`: two that wait for each other."""
        async with AsyncExitStack() as stack:
            for _ in range(self._backend.places):
                await stack.enter_async_context(self._commits)
            yield

    async def _commit(self, rows: Sequence[EncodedRow]) -> list[_Answer]:
        """Write `rows` to the database or to the spool. Raises nothing but a cancellation of its own task."""
        async with self._commits:
            telemetry.record("audit.batch_size", len(rows))
            # With a spool only the replay finds that the database is back: rows that wait go before new ones.
            if self._is_away and (not self._is_strict or asyncio.get_running_loop().time() < self._retry_at):
                return await self._spool_or_fail(rows, None)
            try:
                with telemetry.timed("audit.commit_duration"):
                    results = await store_batch(self._backend, rows)
            except Exception as exc:
                return await self._failed(rows, exc)
            # One that was promoted is waited for like any other when it is away.
            self._on_standby = False
            if self._is_strict:
                self._is_away = False
            # With a spool another batch may have failed meanwhile, and its rows go before new ones.
            return await self._answers(rows, results)

    async def _failed(self, rows: Sequence[EncodedRow], cause: Exception) -> list[_Answer]:
        """Answer for rows of which the database has taken none."""
        if conflict_of(cause) is not None:
            _logger.error("Other transactions were in the way of audit events, also when tried again.")
        elif self._on_standby:
            refusal = AuditUnavailableError(NO_WRITES)
            refusal.__cause__ = cause
            return [refusal] * len(rows)
        else:
            if not self._is_away:
                _logger.error("The audit database is away (%s).", _reason(cause))
            self._is_away = True
            self._retry_at = asyncio.get_running_loop().time() + RETRY_AFTER_S
        return await self._spool_or_fail(rows, cause)

    async def _answers(self, rows: Sequence[EncodedRow], results: Sequence[RowResult]) -> list[_Answer]:
        answers: list[_Answer] = []
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, WriteOutcome):
                answers.append(result)
                continue
            fate = "its call must not go through" if self._is_strict else "it is quarantined"
            _logger.error(_REFUSED, _reason(result), fate)
            answers += await self._spool_or_fail([row], result, quarantined_for=type(result).__name__)
        for outcome in (WriteOutcome.STORED, WriteOutcome.DUPLICATE):
            self._counts[outcome] += results.count(outcome)
        self._notify_stored(rows, results)
        return answers

    async def _spool_or_fail(
        self, rows: Sequence[EncodedRow], cause: Exception | None, *, quarantined_for: str | None = None
    ) -> list[_Answer]:
        if self._is_strict:
            is_conflict = cause is not None and conflict_of(cause) is not None
            step = "other transactions were in its way, so try again" if is_conflict else "check the database"
            error = AuditUnavailableError(f"The event could not be recorded, so the call must not go through: {step}.")
            error.__cause__ = cause
            return [error] * len(rows)
        try:
            await self.spool.add([to_values(row) for row in rows], error=quarantined_for)
            outcome = WriteOutcome.SPOOLED
        except Exception as exc:
            for row in rows:
                log_lost(row, exc)
            outcome = WriteOutcome.LOST
        self._counts[outcome] += len(rows)
        if quarantined_for is None:
            self._start_recovery()
        return [outcome] * len(rows)

    def _start_recovery(self, *, at_once: bool = False) -> None:
        if self._recoverer is None or self._recoverer.done():
            self._recoverer = asyncio.get_running_loop().create_task(self._recover(at_once=at_once))

    async def _recover(self, *, at_once: bool) -> None:
        if not at_once:
            await asyncio.sleep(RETRY_AFTER_S)
        has_failed = is_said = False
        while True:
            try:
                with translate_errors("take what waits in the spool"):
                    return await self._replay_spool()
            except Exception as exc:
                # That the database is away was said when it went, and that the spool cannot be emptied, too.
                is_outage = isinstance(exc, GatewayStoreError | OSError | sqlite3.Error)
                is_known = self._is_stuck or (self._is_away and is_outage)
                is_new = has_failed and not (is_known or is_said)
                _logger.log(logging.ERROR if is_new else logging.DEBUG, _NOT_REPLAYED, self.spool.path, _reason(exc))
                has_failed, is_said = True, is_said or is_new
            await asyncio.sleep(RETRY_AFTER_S)

    async def _replay_spool(self) -> None:
        """Write the spool to the database, in order; then let new writes go there again. Raises while it is away."""
        # One at a time: a backend is not for two tasks at once.
        async with self._recovering:
            if self._is_closed:
                return
            if self._is_away:
                # Without the other lock: while a database hangs, rows must be spooled all the same.
                await self._backend.probe()
            while True:
                # With the lock, so that nothing is spooled between the last rows and the end of the outage.
                async with self._no_commit():
                    if await self._replay_some() < _REPLAY_ROWS:
                        if self._is_away:
                            _logger.warning("The audit database is back, and nothing in the spool waits for it.")
                        self._is_away = False
                        break
            await self._empty_spool()

    async def _replay_some(self) -> int:
        if not self.spool.exists:
            return 0
        # Before each batch: another server may answer under the same URL by now, and it must not get these rows.
        identity = await self._backend.probe()
        if identity != self.spool.identity:
            _logger.error("The URL of the database leads to another one now: `gateway-store doctor` lists what waits.")
            self.spool.identity = identity
        with self._spool_must_answer():
            waiting = await self.spool.waiting(_REPLAY_ROWS)
        if not waiting:
            return 0
        rows = {row_id: row for row_id, row in waiting if isinstance(row, tuple)}
        results = await store_batch(self._backend, list(rows.values()))
        fates = {row_id: row for row_id, row in waiting if row_id not in rows} | dict(zip(rows, results, strict=True))
        refused = {row_id: fate for row_id, fate in fates.items() if isinstance(fate, Exception)}
        done = [row_id for row_id in rows if row_id not in refused]
        self._replayed += len(done)
        self._notify_stored(list(rows.values()), results)
        with self._spool_must_answer():
            # A full disk keeps them there, and the next ones must be stored all the same.
            with suppress(StoreUnavailableError):
                await self.spool.remove(done)
            await self.spool.quarantine(refused)
        for error in refused.values():
            if isinstance(error, UnreadableRowError):
                _logger.error("%s", error)
            else:
                _logger.error(_REFUSED, _reason(error), "it is quarantined")
        return len(waiting)

    async def _empty_spool(self) -> None:
        """Remove what is stored and could not be removed. Raises as long as that fails."""
        if not self.spool.exists:
            return
        try:
            await self.spool.remove_stored()
        except StoreUnavailableError as exc:
            if not self._is_stuck:
                _logger.error(
                    "The spool %s cannot be emptied. %s Its events are in the database, and leave it then. "
                    "Until then an outage may lose others.",
                    self.spool.path,
                    exc,
                )
            self._is_stuck = True
            raise
        self._is_stuck = False

    def _notify_stored(self, rows: Sequence[EncodedRow], results: Sequence[RowResult]) -> None:
        if self._notify is not None:
            self._notify([row for row, result in zip(rows, results, strict=True) if result is WriteOutcome.STORED])

    @contextmanager
    def _spool_must_answer(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            # The database answers: a spool that fails must not keep new events from it.
            self._is_away = False
            raise


def _accepted(answer: _Answer) -> WriteOutcome:
    if isinstance(answer, WriteOutcome):
        return answer
    raise answer


def _reason(error: Exception) -> str:
    # A driver's own words may hold values of a row.
    return str(error).rstrip(".") if isinstance(error, StoreUnavailableError) else type(error).__name__
