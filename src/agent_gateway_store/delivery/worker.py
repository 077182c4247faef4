"""The worker of an open store: first tries at once, and whatever is due."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

from agent_gateway_store._text import describe
from agent_gateway_store.delivery.claims import Delivery, claim, notifiers_with_due_rows
from agent_gateway_store.delivery.marks import Mark, Marks
from agent_gateway_store.delivery.policy import Policy
from agent_gateway_store.delivery.target import Target
from agent_gateway_store.hooks.dispatch import Dispatcher
from agent_gateway_store.models.delivery import DeliveryStatus
from agent_gateway_store.models.values import Notice
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.storage.database import Transactions

__all__ = ["DeliveryWorker"]

_LAST_MARKS_S = 2.0

_logger = logging.getLogger("agent_gateway_store.notifications")


class DeliveryWorker:
    """Sends the rows of the outbox. Any number of workers, in any number of processes, share the work.

    A notice arrives at least once, always under the same `delivery_id`. To one notifier, the decision about an approval
    is not sent before the notice that asked for it has arrived or was given up; beyond that there is no order.

    Args:
        transactions: Where the rows are.
        dispatcher: To the notifiers; open.
        names: Of the notifiers that are loaded here; the rows of others are left alone.
        settings: The NOTIFICATION settings, and PLUGIN_TIMEOUT_SECONDS.
    """

    def __init__(
        self, transactions: Transactions, dispatcher: Dispatcher, names: Sequence[str], settings: StoreSettings
    ) -> None:
        self.policy = Policy.of(settings)
        self._arrived: Counter[str] = Counter()
        self._transactions = transactions
        self._marks = Marks(transactions, self._written)
        self._targets = {name: Target(name, dispatcher, self._marks, self.policy) for name in names}
        self._fed: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_faulty = False
        self._closing = asyncio.Event()
        self._is_closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """The notifiers that are loaded here."""
        return tuple(self._targets)

    def start(self) -> None:
        """Look for due rows from now on, in the background."""
        if self._targets:
            self._begin(self._poll(None, at_once=False))

    def send(self, notice: Notice, mine: Mapping[str, UUID]) -> None:
        """Try to deliver a notice at once, in the background.

        Args:
            notice: What to tell; its `delivery_id` means nothing.
            mine: Notifier to delivery id, of rows that were just committed with a lease. What another notifier of this
                process is to be told waits for an earlier notice about the same approval. After `close` they are sent
                when their lease ends.
        """
        if self._is_closed:
            return
        send_before = time.monotonic() + self.policy.send_within_s
        for name, target in self._targets.items():
            if (delivery_id := mine.get(name)) is not None:
                told = notice.model_copy(update={"delivery_id": delivery_id})
                target.put([Delivery(delivery_id, name, notice.approval_id, 1, told, send_before)])
            elif target.has_in_hand(notice.approval_id):
                target.held.add(notice.approval_id)
                self._marks.hurry()
            else:
                self._begin(self._follow(target, {notice.approval_id}))

    async def run(self, *, once: bool, org_id: str | None = None) -> int:
        """Send what is due.

        Args:
            once: True returns when nothing is due any more; False goes on until it is cancelled.
            org_id: Only this organisation's; None: all.

        Returns:
            How many notices arrived meanwhile.

        Raises:
            StoreUnavailableError: With `once`: the database is away.
        """
        before = self._arrivals(org_id)
        if once:
            try:
                async with asyncio.TaskGroup() as tasks:
                    for target in self._targets.values():
                        tasks.create_task(self._empty(target, org_id))
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
        else:
            await self._poll(org_id, at_once=True)
        return self._arrivals(org_id) - before

    async def close(self, timeout_s: float) -> None:
        """Claim no more, let what is here arrive, and put back what has not within `timeout_s` seconds.

        Notices that wait for one of those are sent, too. If the database cannot be told, rows are sent again when their
        lease ends.
        """
        self._closing.set()
        try:
            async with asyncio.timeout(timeout_s):
                while not self._is_quiet:
                    for target in self._targets.values():
                        await target.idle()
                    await self._marks.flush()
                    if self._tasks:
                        await asyncio.wait(self._tasks)
        except TimeoutError:
            pass
        finally:
            self._is_closed = True
            for target in self._targets.values():
                await target.close()
            await _end(list(self._tasks))
            try:
                async with asyncio.timeout(_LAST_MARKS_S):
                    await self._marks.flush()
            except TimeoutError:
                await self._marks.drop()

    def _arrivals(self, org_id: str | None) -> int:
        return self._arrived.total() if org_id is None else self._arrived[org_id]

    @property
    def _is_quiet(self) -> bool:
        return self._marks.is_empty and not self._tasks and all(each.is_idle for each in self._targets.values())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _poll(self, org_id: str | None, *, at_once: bool) -> None:
        if not at_once:
            await self._pause()
        while not self._closing.is_set():
            try:
                for name in await notifiers_with_due_rows(self._transactions, self._targets.keys() - self._fed, org_id):
                    self._fed.add(name)
                    self._begin(self._feed_once(self._targets[name], org_id))
                self._note_fault(None)
            except Exception as exc:
                self._note_fault(exc)
            await self._pause()

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self.policy.poll_s):
                await self._closing.wait()

    async def _feed_once(self, target: Target, org_id: str | None) -> None:
        try:
            await self._feed(target, org_id)
        except Exception as exc:
            self._note_fault(exc)
        finally:
            self._fed.discard(target.name)

    async def _feed(self, target: Target, org_id: str | None) -> int:
        """Claim and send until nothing more is due for this notifier; returns how many were claimed."""
        total, is_more = 0, True
        while is_more:
            await target.ease()
            if self._closing.is_set():
                break
            room = target.room
            claimed = await claim(self._transactions, target.name, room, self.policy, org_id=org_id)
            target.put(claimed)
            total, is_more = total + len(claimed), len(claimed) == room
        return total

    async def _empty(self, target: Target, org_id: str | None) -> None:
        """Feed, wait until all is sent and written down, and look again: a notice may have waited for another one."""
        has_claimed = True
        while has_claimed:
            # Also what this process tries just now can have kept a row from being due.
            was_busy = not target.is_idle
            has_claimed = await self._feed(target, org_id) > 0 or was_busy
            await target.idle()
            await self._marks.flush(patient=False)

    async def _follow(self, target: Target, approval_ids: set[UUID]) -> None:
        """Claim what waited for notices of these approvals, and once that has arrived what waits behind it."""
        try:
            claimed = await claim(
                self._transactions, target.name, len(approval_ids), self.policy, approval_ids=approval_ids
            )
        except Exception as exc:
            self._note_fault(exc)
        else:
            target.held.update(delivery.approval_id for delivery in claimed)
            target.put(claimed)

    def _written(self, marks: Sequence[Mark]) -> None:
        by_notifier: dict[str, list[Mark]] = {}
        for mark in marks:
            if mark.status is DeliveryStatus.DELIVERED and mark.delivery.notice is not None:
                self._arrived[mark.delivery.notice.org_id] += 1
            by_notifier.setdefault(mark.delivery.notifier, []).append(mark)
        for name, written in by_notifier.items():
            if freed := self._targets[name].written(written):
                self._begin(self._follow(self._targets[name], freed))

    def _note_fault(self, error: Exception | None) -> None:
        """Log the first of a row of faults; the worker goes on after any."""
        if error is not None and not self._is_faulty:
            _logger.warning("Notices wait: %s", describe(error))
        self._is_faulty = error is not None


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
