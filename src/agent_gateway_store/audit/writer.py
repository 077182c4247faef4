"""Group commit: what arrives during a commit goes together in the next one.

The first write starts at once and waits for nobody; throughput comes from the batches that form by themselves while a
commit is under way. A write is acknowledged after the commit, or after fsync into the spool while the database is away.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeAlias

from agent_gateway_store._text import describe
from agent_gateway_store.audit.backends import RowResult, Sink
from agent_gateway_store.audit.batch import store_batch
from agent_gateway_store.audit.lost import log_lost
from agent_gateway_store.audit.outcomes import AuditCounters, WriteOutcome
from agent_gateway_store.audit.record import COLUMNS, EncodedRow, from_values, size_of, to_values
from agent_gateway_store.audit.spool import Spool
from agent_gateway_store.errors import AuditUnavailableError, StoreNotOpenError
from agent_gateway_store.models.audit import AuditEvent

__all__ = ["AuditWriter"]

_MAX_QUEUED_ROWS = 10_000
_MAX_QUEUED_BYTES = 64 * 2**20
_MAX_BATCH_ROWS = 1_000
_MAX_BATCH_BYTES = 8 * 2**20
_REPLAY_ROWS = 500
_RETRY_AFTER_S = 0.5

_Answer: TypeAlias = WriteOutcome | AuditUnavailableError

_logger = logging.getLogger("agent_gateway_store.audit")


class AuditWriter:
    """Takes rows from any number of tasks of one event loop and commits them in batches.

    Args:
        sink: Where they are committed; closed with this.
        spool: Where they are kept while the database is away; None is the strict mode, in which writes raise.
        tell: Hears of what was committed; must not raise. None: nobody wants to.
    """

    def __init__(
        self, sink: Sink, spool: Spool | None, *, tell: Callable[[Sequence[EncodedRow]], None] | None = None
    ) -> None:
        self.counters = AuditCounters()
        self.spool = spool
        self._sink = sink
        self._tell = tell
        self._queue: deque[tuple[EncodedRow, asyncio.Future[WriteOutcome]]] = deque()
        self._queued_bytes = 0
        self._room = asyncio.Event()
        self._waiting_for_room = 0
        self._queued = 0
        self._settled = 0
        self._progress = asyncio.Event()
        self._committing = asyncio.Lock()
        self._recovering = asyncio.Lock()
        self._drainer: asyncio.Task[None] | None = None
        self._is_leading = False
        self._recoverer: asyncio.Task[None] | None = None
        self._is_away = False
        self._is_closed = False
        self._retry_at = 0.0

    async def open(self) -> None:
        """Start to replay what an earlier process left in the spool."""
        if self.spool is not None and self.spool.exists:
            self._start_recovery(at_once=True)

    async def write(self, row: EncodedRow) -> WriteOutcome:
        """Have `row` committed and return what became of it.

        While too much is queued this waits. Cancelling the caller does not cancel the write.

        Raises:
            AuditUnavailableError: In the strict mode, if the row could not be committed.
            StoreNotOpenError: The writer was closed.
        """
        self._check_open()
        if self._is_full:
            await self._wait_for_room(row)
        elif self._drainer is None and not self._is_leading and not self._queue:
            return await self._lead(row)
        return await self._enqueue(row)

    async def _lead(self, row: EncodedRow) -> WriteOutcome:
        """Commit a row that waits for nobody in the caller's own task: a task of its own would cost a lone writer."""
        self._is_leading = True
        self._queued += 1
        self.counters.queue_depth += 1
        try:
            answer = (await self._commit([row]))[0]
        except asyncio.CancelledError:
            # The caller is gone, its event is not. If it was committed all the same, it is found to be a duplicate.
            future: asyncio.Future[WriteOutcome] = asyncio.get_running_loop().create_future()
            future.cancel()
            self._put_back([(row, future)])
            raise
        else:
            self.counters.queue_depth -= 1
            self._note_progress(1)
        finally:
            self._is_leading = False
            self._start_draining()
        return _accepted(answer)

    def refuse(self, event: AuditEvent, cause: Exception) -> WriteOutcome:
        """Count and log an event that is not valid as LOST.

        Raises:
            AuditUnavailableError: In the strict mode.
        """
        if self.spool is None:
            raise AuditUnavailableError(
                "The event is not valid, so the call must not go through: see the cause for what is wrong."
            ) from cause
        _logger.error("An audit event is not valid: %s", describe(cause))
        log_lost({name: getattr(event, name) for name in COLUMNS}, cause, request_id=str(event.request_id))
        self.counters.count(WriteOutcome.LOST, 1)
        return WriteOutcome.LOST

    def take(self, row: EncodedRow) -> None:
        """Have `row` committed for a caller that is gone; `flush` and `close` wait for it."""
        self._enqueue(row).cancel()

    async def write_batch(self, rows: Sequence[EncodedRow]) -> list[WriteOutcome]:
        """Commit `rows` as one batch, past the queue; for bulk.

        Raises:
            AuditUnavailableError: In the strict mode, if they could not be committed.
            StoreNotOpenError: The writer was closed.
        """
        self._check_open()
        return [_accepted(outcome) for outcome in await self._commit(rows)]

    async def flush(self) -> int:
        """Wait until everything queued is acknowledged and try to empty the spool; return how many rows still wait."""
        until = self._queued + self._waiting_for_room
        while self._settled < until:
            self._start_draining()
            await self._progress.wait()
        if self.spool is None or not self.spool.exists:
            return 0
        with suppress(Exception):
            await self._bring_back()
        return (await self.spool.counts())[0]

    async def close(self) -> None:
        """Acknowledge everything queued, then let go of the connections. What is in the spool stays there."""
        self._is_closed = True
        while self._settled < self._queued or self._waiting_for_room:
            self._start_draining()
            await self._progress.wait()
        if self._recoverer is not None:
            self._recoverer.cancel()
            await asyncio.wait([self._recoverer])
        async with self._recovering, self._committing:
            await self._sink.close()
            if self.spool is not None:
                await self.spool.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreNotOpenError("The store was closed: open it again.")

    @property
    def _is_full(self) -> bool:
        return len(self._queue) >= _MAX_QUEUED_ROWS or self._queued_bytes >= _MAX_QUEUED_BYTES

    async def _wait_for_room(self, row: EncodedRow) -> None:
        self._waiting_for_room += 1
        try:
            while self._is_full:
                self._room.clear()
                await self._room.wait()
        except asyncio.CancelledError:
            # The caller is gone, its event is not.
            self.take(row)
            raise
        finally:
            self._waiting_for_room -= 1

    def _enqueue(self, row: EncodedRow) -> asyncio.Future[WriteOutcome]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[WriteOutcome] = loop.create_future()
        self._queue.append((row, future))
        self._queued += 1
        self._queued_bytes += size_of(row)
        self.counters.queue_depth += 1
        self._start_draining()
        return future

    def _start_draining(self) -> None:
        if self._queue and self._drainer is None and not self._is_leading:
            self._drainer = asyncio.get_running_loop().create_task(self._drain())
            self._drainer.add_done_callback(self._stop_draining)

    def _stop_draining(self, drainer: asyncio.Task[None]) -> None:
        # A task that is cancelled before its first step has not run at all, not even its `finally`.
        if self._drainer is drainer:
            self._drainer = None
        self._note_progress(0)

    def _note_progress(self, rows: int) -> None:
        self._settled += rows
        progress, self._progress = self._progress, asyncio.Event()
        progress.set()

    async def _drain(self) -> None:
        try:
            while self._queue:
                batch = self._next_batch()
                try:
                    outcomes = await self._commit([row for row, _ in batch])
                except asyncio.CancelledError:
                    # Somebody cancels every task there is; `flush` and `close` go on with what is left.
                    self._put_back(batch)
                    raise
                self.counters.queue_depth -= len(batch)
                for (_, future), outcome in zip(batch, outcomes, strict=True):
                    if future.done():
                        continue
                    if isinstance(outcome, WriteOutcome):
                        future.set_result(outcome)
                    else:
                        future.set_exception(outcome)
                self._note_progress(len(batch))
        finally:
            self._drainer = None

    def _put_back(self, batch: Sequence[tuple[EncodedRow, asyncio.Future[WriteOutcome]]]) -> None:
        self._queue.extendleft(reversed(batch))
        self._queued_bytes += sum(size_of(row) for row, _ in batch)

    def _next_batch(self) -> list[tuple[EncodedRow, asyncio.Future[WriteOutcome]]]:
        batch: list[tuple[EncodedRow, asyncio.Future[WriteOutcome]]] = []
        size = 0
        while self._queue and len(batch) < _MAX_BATCH_ROWS and size < _MAX_BATCH_BYTES:
            item = self._queue.popleft()
            size += size_of(item[0])
            batch.append(item)
        self._queued_bytes -= size
        if not self._is_full:
            self._room.set()
        return batch

    async def _commit(self, rows: Sequence[EncodedRow]) -> list[_Answer]:
        """Settle `rows` one way or another. Raises nothing but a cancellation of this very task."""
        async with self._committing:
            if self._is_away and (self.spool is not None or asyncio.get_running_loop().time() < self._retry_at):
                return await self._keep(rows, None)
            try:
                settled = await store_batch(self._sink, rows)
            except Exception as exc:
                self._note_outage(exc)
                return await self._keep(rows, exc)
            self._is_away = False
            return await self._answers(rows, settled)

    async def _answers(self, rows: Sequence[EncodedRow], settled: Sequence[RowResult]) -> list[_Answer]:
        answers: list[_Answer] = []
        for row, outcome in zip(rows, settled, strict=True):
            if isinstance(outcome, WriteOutcome):
                answers.append(outcome)
                continue
            name = type(outcome).__name__
            _logger.error("The database refuses an audit event (%s): it is set aside.", name)
            answers += await self._keep([row], outcome, quarantined_for=name)
        for outcome in (WriteOutcome.STORED, WriteOutcome.DUPLICATE):
            self.counters.count(outcome, settled.count(outcome))
        self._tell_stored(rows, settled)
        return answers

    async def _keep(
        self, rows: Sequence[EncodedRow], cause: Exception | None, *, quarantined_for: str | None = None
    ) -> list[_Answer]:
        if self.spool is not None:
            return [await self._spooled(rows, quarantined_for)] * len(rows)
        error = AuditUnavailableError(
            "The event could not be recorded, so the call must not go through: check the database."
        )
        error.__cause__ = cause
        return [error] * len(rows)

    async def _spooled(self, rows: Sequence[EncodedRow], error: str | None) -> WriteOutcome:
        assert self.spool is not None  # noqa: S101
        try:
            await self.spool.add([to_values(row) for row in rows], error=error)
            outcome = WriteOutcome.SPOOLED
        except Exception as exc:
            for row in rows:
                log_lost(row, exc)
            outcome = WriteOutcome.LOST
        self.counters.count(outcome, len(rows))
        if error is None:
            self._start_recovery()
        return outcome

    def _note_outage(self, exc: Exception) -> None:
        if not self._is_away:
            _logger.error("The audit database is away (%s).", type(exc).__name__)
        self._is_away = True
        self._retry_at = asyncio.get_running_loop().time() + _RETRY_AFTER_S

    def _start_recovery(self, *, at_once: bool = False) -> None:
        if self._recoverer is None or self._recoverer.done():
            self._recoverer = asyncio.get_running_loop().create_task(self._recover(at_once=at_once))

    async def _recover(self, *, at_once: bool) -> None:
        try:
            if not at_once:
                await asyncio.sleep(_RETRY_AFTER_S)
            while True:
                try:
                    await self._bring_back()
                    return
                except Exception as exc:
                    _logger.debug("The spool cannot be replayed yet (%s).", type(exc).__name__)
                await asyncio.sleep(_RETRY_AFTER_S)
        finally:
            self._recoverer = None

    async def _bring_back(self) -> None:
        """Replay the spool if the database answers; raise if not. One at a time, as the sink must be used."""
        async with self._recovering:
            if self._is_closed:
                return
            if self._is_away:
                # Outside the other lock: a database that hangs must not hold up what goes to the spool meanwhile.
                await self._sink.probe()
            await self._replay()

    async def _replay(self) -> None:
        """Bring the spool to the database, in order; then let writes go there again. Raises while it is away."""
        while True:
            # Under the lock, so that nothing is spooled between the last rows and the way back.
            async with self._committing:
                if await self._replay_some() < _REPLAY_ROWS:
                    if self._is_away:
                        _logger.warning("The audit database is back, the spool is empty.")
                    self._is_away = False
                    return

    async def _replay_some(self) -> int:
        assert self.spool is not None  # noqa: S101
        if not self.spool.exists:
            return 0
        with self._spool_at_fault():
            waiting = await self.spool.waiting(_REPLAY_ROWS)
        if not waiting:
            return 0
        settled = await store_batch(self._sink, [from_values(values) for _, values in waiting])
        done = []
        with self._spool_at_fault():
            for (row_id, _), outcome in zip(waiting, settled, strict=True):
                if isinstance(outcome, Exception):
                    await self.spool.quarantine(row_id, type(outcome).__name__)
                else:
                    done.append(row_id)
            await self.spool.remove(done)
        self.counters.replayed += len(done)
        if self._tell is not None:
            self._tell_stored([from_values(values) for _, values in waiting], settled)
        return len(waiting)

    def _tell_stored(self, rows: Sequence[EncodedRow], settled: Sequence[RowResult]) -> None:
        if self._tell is not None:
            stored = [row for row, outcome in zip(rows, settled, strict=True) if outcome is WriteOutcome.STORED]
            self._tell(stored)

    @contextmanager
    def _spool_at_fault(self) -> Iterator[None]:
        """The database answers, so that a spool which does not must keep nothing from it."""
        try:
            yield
        except Exception:
            self._is_away = False
            raise


def _accepted(answer: _Answer) -> WriteOutcome:
    if isinstance(answer, WriteOutcome):
        return answer
    raise answer
