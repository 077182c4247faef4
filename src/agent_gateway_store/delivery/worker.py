"""The worker of an open store: one plain loop for each notifier claims, sends, records, and begins again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from uuid import UUID

from agent_gateway_store import telemetry
from agent_gateway_store._concurrency import BackgroundTasks
from agent_gateway_store._text import describe
from agent_gateway_store.delivery.attempts import AttemptResult, Delivery, ResultRecorder, claim, claim_next, is_any_due
from agent_gateway_store.delivery.policy import Policy
from agent_gateway_store.hooks.dispatch import Dispatcher
from agent_gateway_store.models.delivery import DeliveryStatus, Leased
from agent_gateway_store.models.values import Notice
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.storage.database import Transactions
from agent_gateway_store.storage.errors import OutageLog

# A notice takes some KB, so a queue holds a few MB of first attempts while its notifier hangs.
_MOST_QUEUED = 1000
# What closing takes beyond its own bound: a commit on a busy disk takes tenths of that.
_LAST_RESULTS_S = 2.0

_logger = logging.getLogger("agent_gateway_store.notifications")


class NotifierQueue:
    """The deliveries leased for one notifier: sent in their order, as many at once as the policy says."""

    def __init__(self, name: str, dispatcher: Dispatcher, recorder: ResultRecorder, policy: Policy) -> None:
        self.name = name
        self._dispatcher, self._recorder, self._policy = dispatcher, recorder, policy
        self._waiting: deque[Delivery] = deque()
        self._attempts = BackgroundTasks()
        self._has_room, self._is_closed = asyncio.Event(), False

    @property
    def is_idle(self) -> bool:
        """True if nothing waits and no attempt is under way."""
        return not self._waiting and not self._attempts

    @property
    def room(self) -> int:
        """How many rows to claim now, so that as many wait as are sent at once.

        However slow the notifier is, those begin before their lease ends.
        """
        return max(0, 2 * self._policy.concurrency - len(self._waiting) - len(self._attempts))

    def put(self, delivery: Delivery) -> None:
        """Send it when its turn comes. Where there is no place for it, it goes back as untried."""
        if self._is_closed or len(self._waiting) >= _MOST_QUEUED:
            self._recorder.add(AttemptResult.untried(delivery))
        else:
            self._waiting.append(delivery)
            self._begin()

    async def wait_for_room(self) -> None:
        """Wait until it is worth while to claim: a claim for each place would cost more than the sending."""
        while self.room < self._policy.concurrency:
            self._has_room.clear()
            await self._has_room.wait()

    async def join(self) -> None:
        """Wait until nothing waits and no attempt is under way."""
        while not self.is_idle:
            await self._attempts.join()

    async def close(self) -> None:
        """Cancel what is under way; it goes back as untried, as does what waits."""
        self._is_closed = True
        await self._attempts.cancel()
        while self._waiting:
            self._recorder.add(AttemptResult.untried(self._waiting.popleft()))

    def _begin(self) -> None:
        while self._waiting and len(self._attempts) < self._policy.concurrency and not self._is_closed:
            delivery = self._waiting.popleft()
            self._attempts.start(self._attempt(delivery)).add_done_callback(partial(self._end, delivery))

    def _end(self, delivery: Delivery, attempt: asyncio.Task[AttemptResult]) -> None:
        # Here and not at the end of the attempt: a task that is cancelled before its first step runs nothing at all.
        try:
            self._recorder.add(AttemptResult.untried(delivery) if attempt.cancelled() else attempt.result())
        finally:
            self._begin()
            self._has_room.set()

    async def _attempt(self, delivery: Delivery) -> AttemptResult:
        attempt = delivery.attempt
        if delivery.notice is None:
            return AttemptResult(delivery, DeliveryStatus.DEAD, attempt, error="the row holds no notice")
        if attempt > self._policy.max_attempts:
            error = f"given up: of {attempt - 1} tries none came to an end"
            return AttemptResult(delivery, DeliveryStatus.DEAD, attempt - 1, error=error)
        if time.monotonic() > delivery.leased_at + self._policy.send_within_s:
            return AttemptResult.untried(delivery)
        # The task may have been started in the context of another notice.
        with telemetry.span(
            "notice.deliver", is_root=True, link=delivery.cause, agent_gateway_store__notifier=self.name
        ) as current:
            report = await self._dispatcher.deliver(self.name, delivery.notice)
            status, delay_s = self._policy.after(report, attempt)
            telemetry.note(current, status=str(status), error="delivery_failed" if report.error else None)
        telemetry.record("delivery.duration", report.seconds, notifier=self.name, status=str(status))
        return AttemptResult(delivery, status, attempt, delay_s, report.error)


class DeliveryWorker:
    """Sends the rows of the outbox. Any number of workers, in any number of processes, share the work.

    A notice arrives at least once, always under the same `delivery_id`. To one notifier, the decision about an approval
    is not sent before the notice that asked for it has arrived or was given up; beyond that there is no order. The rows
    of notifiers that are not among `names` are left alone.
    """

    def __init__(
        self, transactions: Transactions, dispatcher: Dispatcher, names: Sequence[str], settings: StoreSettings
    ) -> None:
        self.policy, self._transactions = Policy.of(settings), transactions
        self._recorder = ResultRecorder(transactions, self.policy, self._continue)
        self._queues = {name: NotifierQueue(name, dispatcher, self._recorder, self.policy) for name in names}
        self._arrived: Counter[str] = Counter()
        self._loops, self._claims = BackgroundTasks(), BackgroundTasks()
        self._closing = asyncio.Event()
        self._log = OutageLog(_logger)
        self._is_closed = False

    @property
    def is_idle(self) -> bool:
        """True if nothing is to be sent or recorded of what was handed over or claimed."""
        return self._recorder.is_empty and not self._claims and all(each.is_idle for each in self._queues.values())

    def start(self) -> None:
        """Look for due rows from now on, in the background."""
        for queue in self._queues.values():
            self._loops.start(self._loop(queue, None, at_once=False))

    def send(self, notice: Notice, leased: Leased) -> None:
        """Try to deliver a notice at once, in the background, by the rows that were just committed with a lease.

        What the other notifiers of this process are to get waits for an earlier notice about the same approval.
        """
        if self._is_closed:
            return
        cause = telemetry.current_span()
        for name, delivery_id in leased.ids.items():
            if (queue := self._queues.get(name)) is not None:
                sent = notice.model_copy(update={"delivery_id": delivery_id})
                queue.put(Delivery(delivery_id, name, notice.approval_id, 1, sent, leased.since, cause))
        self._claim_next([(name, notice.approval_id) for name in self._queues if name not in leased.ids])

    async def run(self, *, once: bool, org_id: str | None = None) -> int:
        """Send what is due, of one organisation or of all, and return how many notices arrived meanwhile.

        With `once` it returns when nothing is due any more, else when it is cancelled.

        Raises:
            StoreUnavailableError: With `once`: the database is away.
        """
        before = self._arrivals(org_id)
        if once:
            await self._send_all(org_id)
        else:
            async with asyncio.TaskGroup() as loops:
                for queue in self._queues.values():
                    loops.create_task(self._loop(queue, org_id, at_once=True))
                await self._closing.wait()
        return self._arrivals(org_id) - before

    async def join(self) -> None:
        """Wait until what was handed over or claimed is sent and recorded, and what waited behind that, too."""
        while not self.is_idle:
            for queue in self._queues.values():
                await queue.join()
            await self._recorder.join()
            await self._claims.join()

    async def close(self, timeout_s: float) -> None:
        """Claim no more, let what is here arrive, and put back what has not within `timeout_s` seconds.

        Notices that wait for one of those are sent, too. Where the database is away rows are sent again when their
        lease ends.
        """
        self._closing.set()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._loops.join()
                    await self.join()
        finally:
            self._is_closed = True
            await self._loops.cancel()
            await self._claims.cancel()
            for queue in self._queues.values():
                await queue.close()
            await self._recorder.close(_LAST_RESULTS_S)

    def _arrivals(self, org_id: str | None) -> int:
        return self._arrived.total() if org_id is None else self._arrived[org_id]

    async def _loop(self, queue: NotifierQueue, org_id: str | None, *, at_once: bool) -> None:
        if not at_once:
            await self._pause()
        while not self._closing.is_set():
            try:
                await self._send_due(queue, org_id)
                self._log.back("Notices are sent again.")
            except Exception as exc:
                self._log.away("Notices wait: %s", describe(exc))
            await self._pause()

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self.policy.poll_s):
                await self._closing.wait()

    async def _send_due(self, queue: NotifierQueue, org_id: str | None) -> int:
        """Claim and send until nothing more is due for this notifier; returns how many were claimed."""
        total, is_more = 0, await is_any_due(self._transactions, queue.name, org_id=org_id)
        while is_more:
            await queue.wait_for_room()
            if self._closing.is_set():
                break
            room = queue.room
            claimed = await claim(self._transactions, queue.name, room, self.policy, org_id=org_id)
            self._put(claimed)
            total, is_more = total + len(claimed), len(claimed) == room
        return total

    async def _send_all(self, org_id: str | None) -> None:
        """Send what is due and wait for the results, until nothing is: a notice may have waited for another one."""
        is_more = True
        while is_more:
            # Also what is under way here can have kept a row from being due.
            was_idle = self.is_idle
            try:
                async with asyncio.TaskGroup() as tasks:
                    sending = [tasks.create_task(self._send_due(queue, org_id)) for queue in self._queues.values()]
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            joining, failing = asyncio.create_task(self.join()), asyncio.create_task(self._recorder.failure())
            try:
                await asyncio.wait({joining, failing}, return_when=asyncio.FIRST_COMPLETED)
                if not joining.done():
                    raise failing.result()
            finally:
                joining.cancel()
                failing.cancel()
            is_more = not was_idle or any(task.result() for task in sending)

    def _put(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            self._queues[delivery.notifier].put(delivery)

    def _continue(self, results: Sequence[AttemptResult]) -> None:
        """Count what arrived, and claim the notices that waited behind what was recorded."""
        for result in results:
            if result.status is DeliveryStatus.DELIVERED and result.delivery.notice is not None:
                self._arrived[result.delivery.notice.org_id] += 1
        # Not behind one that is DUE again: where it went back for want of room, the claim would bring that very one.
        ended = (result.delivery for result in results if result.status is not DeliveryStatus.DUE)
        self._claim_next([(delivery.notifier, delivery.approval_id) for delivery in ended])

    def _claim_next(self, approvals: Sequence[tuple[str, UUID]]) -> None:
        if approvals and not self._is_closed:
            self._claims.start(self._put_next(approvals))

    async def _put_next(self, approvals: Sequence[tuple[str, UUID]]) -> None:
        try:
            self._put(await claim_next(self._transactions, approvals, self.policy))
        except Exception as exc:
            self._log.away("Notices wait: %s", describe(exc))
