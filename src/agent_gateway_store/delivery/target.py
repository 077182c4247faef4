"""One notifier with its own places: however slow it is, it takes none of another's."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterable
from uuid import UUID

from agent_gateway_store.delivery.claims import Delivery
from agent_gateway_store.delivery.marks import Mark, Marks
from agent_gateway_store.delivery.policy import Policy
from agent_gateway_store.hooks.dispatch import Dispatcher
from agent_gateway_store.models.delivery import DeliveryStatus

__all__ = ["Target"]

_FAST_S = 0.25
_AHEAD = 16
_MOST_QUEUED = 1000
_GATHER_S = 0.02
"""How long after a hand-over the next may come: each wakes two threads, which costs as much as a statement. At 500
notices a second ten go together, and nobody reads faster."""


class Target:
    """Sends what it is given to one notifier, so many at once as the policy says, in the order it was given.

    Attributes:
        name: Of the notifier.
        held: Approvals with a notice that waits for one before it, which is in hand here.
    """

    def __init__(self, name: str, dispatcher: Dispatcher, marks: Marks, policy: Policy) -> None:
        self.name = name
        self.held: set[UUID] = set()
        self._dispatcher, self._marks, self._policy = dispatcher, marks, policy
        self._queue: deque[Delivery] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_hand: Counter[UUID] = Counter()
        self._eased = asyncio.Event()
        self._usual_s = _FAST_S
        self._closed = False
        self._gathering: asyncio.TimerHandle | None = None
        self._next_at = 0.0

    @property
    def room(self) -> int:
        """How many rows to claim now: a few ahead where the notifier is quick, else what can be begun at once."""
        places = self._policy.concurrency
        ahead = places * _AHEAD if self._usual_s < _FAST_S else 0
        return max(0, places + ahead - len(self._queue) - len(self._tasks))

    @property
    def is_idle(self) -> bool:
        """True if nothing waits and nothing is under way."""
        return not self._tasks and not self._queue

    def has_in_hand(self, approval_id: UUID) -> bool:
        """True if a notice of this approval is here and how it went is not written yet."""
        return self._in_hand[approval_id] > 0

    def put(self, given: Iterable[Delivery]) -> None:
        """Send these. What it has no room for goes back as untried."""
        for delivery in given:
            self._in_hand[delivery.approval_id] += 1
            if self._marks.is_delivered(delivery.delivery_id):
                self._marks.add(Mark(delivery, DeliveryStatus.DELIVERED, delivery.attempt))
            elif self._closed or len(self._queue) >= _MOST_QUEUED:
                self._marks.add(Mark.untried(delivery))
            else:
                self._queue.append(delivery)
        if self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_at(self._next_at, self._take_places)

    def written(self, marks: Iterable[Mark]) -> set[UUID]:
        """Take note of what was written; returns the approvals whose next notice may go now, none once it is closed."""
        freed = set()
        for mark in marks:
            approval_id = mark.delivery.approval_id
            self._in_hand[approval_id] -= 1
            if self._in_hand[approval_id] <= 0:
                del self._in_hand[approval_id]
                # Behind one that goes back nothing may go yet: a claim would bring that very one, again and again.
                if approval_id in self.held and mark.status is not DeliveryStatus.DUE:
                    freed.add(approval_id)
                self.held.discard(approval_id)
        return set() if self._closed else freed

    @property
    def _is_hungry(self) -> bool:
        return self.room > 0 and len(self._queue) <= self._policy.concurrency * _AHEAD // 2

    async def ease(self) -> None:
        """Wait until it is worth while to claim more."""
        while not self._is_hungry:
            self._eased.clear()
            await self._eased.wait()

    async def idle(self) -> None:
        """Wait until nothing waits and nothing is under way."""
        while not self.is_idle:
            self._eased.clear()
            await self._eased.wait()

    async def close(self) -> None:
        """Cancel what is under way; it goes back as untried, as does what waits."""
        self._closed = True
        if self._gathering is not None:
            self._gathering.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        while self._queue:
            self._marks.add(Mark.untried(self._queue.popleft()))

    def _take_places(self) -> None:
        self._gathering = None
        self._next_at = asyncio.get_running_loop().time() + _GATHER_S
        for _ in range(min(len(self._queue), self._policy.concurrency - len(self._tasks))):
            task = asyncio.get_running_loop().create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._leave)

    def _leave(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._closed and self._gathering is None:
            # What was put after the last step of this task found its place taken.
            self._take_places()
        self._eased.set()

    async def _work(self) -> None:
        while self._queue:
            delivery = self._queue.popleft()
            if self._is_hungry:
                self._eased.set()
            await self._send(delivery)

    async def _send(self, delivery: Delivery) -> None:
        attempt = delivery.attempt
        if delivery.notice is None:
            self._marks.add(Mark(delivery, DeliveryStatus.DEAD, attempt, error="the row holds no notice"))
            return
        if attempt > self._policy.max_attempts:
            error = f"given up: of {attempt - 1} tries none came to an end"
            self._marks.add(Mark(delivery, DeliveryStatus.DEAD, attempt - 1, error=error))
            return
        if time.monotonic() > delivery.send_before:
            self._marks.add(Mark.untried(delivery))
            return
        mark = Mark.untried(delivery)
        try:
            report = await self._dispatcher.deliver(self.name, delivery.notice)
            status, delay_s = self._policy.after(report, attempt)
            mark = Mark(delivery, status, attempt, delay_s, report.error)
            self._usual_s += (report.seconds - self._usual_s) / 8
        finally:
            self._marks.add(mark)
            if delivery.approval_id in self.held:
                self._marks.hurry()
