"""The queue of one notifier: what is put is sent, whenever it comes; and what a worker claims after a result."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any, cast
from uuid import UUID

import pytest

from agent_gateway_store import Notice, StoreSettings
from agent_gateway_store.delivery import DeliveryWorker, attempts, worker
from agent_gateway_store.delivery.attempts import AttemptResult, Delivery, ResultRecorder
from agent_gateway_store.delivery.policy import Policy
from agent_gateway_store.delivery.worker import NotifierQueue
from agent_gateway_store.hooks.dispatch import DeliveryReport, Dispatcher
from agent_gateway_store.models.delivery import Leased
from agent_gateway_store.testing import make_notice

POLICY = Policy.of(StoreSettings(notification_concurrency=1))


class Slow:
    """In place of the dispatcher: each delivery waits for `go`, and then ends as `report` says."""

    def __init__(self, **report: Any) -> None:
        self.go: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.given: list[UUID] = []
        self.report = {"ok": True, "error": None, "seconds": 0.0, **report}

    async def deliver(self, name: str, notice: Notice) -> DeliveryReport:
        self.given.append(notice.delivery_id)
        await self.go
        return DeliveryReport(name, **self.report)


class Kept:
    """In place of the recorder: keeps the results."""

    def __init__(self) -> None:
        self.results: list[AttemptResult] = []

    def add(self, result: AttemptResult) -> None:
        self.results.append(result)


def queue_over(dispatcher: Any, recorder: Any) -> NotifierQueue:
    return NotifierQueue("post", cast("Dispatcher", dispatcher), cast("ResultRecorder", recorder), POLICY)


def delivery(*, seconds_left: float = 60) -> Delivery:
    notice = make_notice()
    leased_at = time.monotonic() + seconds_left - POLICY.send_within_s
    return Delivery(notice.delivery_id, "post", notice.approval_id, 1, notice, leased_at)


def ids(results: Sequence[AttemptResult]) -> list[tuple[UUID, str]]:
    return [(result.delivery.delivery_id, result.status.value) for result in results]


async def joined(queue: NotifierQueue) -> None:
    async with asyncio.timeout(2):
        await queue.join()


async def test_what_comes_the_moment_the_last_attempt_ends_is_sent() -> None:
    """An attempt that has ended, and is not counted as ended yet, keeps no other from beginning."""
    dispatcher, recorder = Slow(), Kept()
    queue = queue_over(dispatcher, recorder)
    first, second = delivery(), delivery()
    queue.put(first)
    await asyncio.sleep(0)
    dispatcher.go.set_result(None)
    asyncio.get_running_loop().call_soon(queue.put, second)  # after the last step of the attempt, before its end
    await joined(queue)

    assert ids(recorder.results) == [(first.delivery_id, "DELIVERED"), (second.delivery_id, "DELIVERED")]


async def test_an_attempt_that_breaks_leaves_the_others_their_turn() -> None:
    recorder = Kept()

    class Breaking(Slow):
        async def deliver(self, name: str, notice: Notice) -> DeliveryReport:
            if not self.given:
                self.given.append(notice.delivery_id)
                raise asyncio.CancelledError
            return await super().deliver(name, notice)

    dispatcher = Breaking()
    dispatcher.go.set_result(None)
    queue = queue_over(dispatcher, recorder)
    first, second = delivery(), delivery()
    queue.put(first)
    queue.put(second)
    await joined(queue)

    assert ids(recorder.results) == [(first.delivery_id, "DUE"), (second.delivery_id, "DELIVERED")]


async def test_what_outlived_its_lease_in_the_queue_is_not_sent() -> None:
    """Another worker may be sending it by now; it goes back as untried, if it is still ours."""
    dispatcher, recorder = Slow(), Kept()
    dispatcher.go.set_result(None)
    queue = queue_over(dispatcher, recorder)
    late = delivery(seconds_left=-0.001)
    queue.put(late)
    await joined(queue)

    assert dispatcher.given == []
    assert [(result.status, result.attempts) for result in recorder.results] == [("DUE", 0)]


@pytest.mark.parametrize(
    ("report", "may_go"),
    [({}, True), ({"ok": False, "is_permanent": True}, True), ({"ok": False}, False)],
    ids=["delivered", "given up", "due again"],
)
async def test_what_is_behind_a_notice_may_go_once_that_has_ended(
    report: dict[str, Any], may_go: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not behind one that is due again: it would be claimed and put back without a pause."""
    looked_for: list[tuple[str, UUID]] = []

    async def record(_transactions: Any, _results: Any, _policy: Any) -> None:
        """Record nothing."""

    async def claim_next(_transactions: Any, approvals: Iterable[tuple[str, UUID]], _policy: Any) -> list[Delivery]:
        looked_for.extend(approvals)
        return []

    monkeypatch.setattr(attempts, "record", record)
    monkeypatch.setattr(worker, "claim_next", claim_next)
    dispatcher = Slow(**report)
    dispatcher.go.set_result(None)
    sending = DeliveryWorker(cast("Any", None), cast("Dispatcher", dispatcher), ["post"], StoreSettings())
    given = delivery()
    assert given.notice is not None
    sending.send(given.notice, Leased({"post": given.delivery_id}, time.monotonic()))
    assert not sending.is_idle
    async with asyncio.timeout(2):
        await sending.join()

    assert looked_for == ([("post", given.approval_id)] if may_go else [])
    assert sending.is_idle
