"""The places of one notifier: what is put is sent, whenever it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from agent_gateway_store import Notice, StoreSettings, ToolCall
from agent_gateway_store.delivery.claims import Delivery
from agent_gateway_store.delivery.marks import Mark, Marks
from agent_gateway_store.delivery.policy import Policy
from agent_gateway_store.delivery.target import Target
from agent_gateway_store.hooks.dispatch import DeliveryReport, Dispatcher
from agent_gateway_store.models.delivery import DeliveryStatus
from agent_gateway_store.models.values import ApprovalStatus

POLICY = Policy.of(StoreSettings(notification_concurrency=1))


class Slow:
    """In place of the dispatcher: each delivery waits for `go`."""

    def __init__(self) -> None:
        self.go: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.given: list[UUID] = []

    async def deliver(self, name: str, notice: Notice) -> DeliveryReport:
        self.given.append(notice.delivery_id)
        await self.go
        return DeliveryReport(name, True, None, 0.0)


class Kept:
    """In place of the marks: keeps them."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []

    def add(self, mark: Mark) -> None:
        self.marks.append(mark)

    def is_delivered(self, delivery_id: UUID) -> bool:
        return False


def target_over(dispatcher: Any, marks: Any) -> Target:
    return Target("post", cast("Dispatcher", dispatcher), cast("Marks", marks), POLICY)


def delivery() -> Delivery:
    notice = Notice(
        event="pending",
        delivery_id=uuid4(),
        approval_id=uuid4(),
        org_id="default",
        request_id="r-1",
        caller_id="dev-agent",
        tool_call=ToolCall(server="files", tool="delete_file", arguments={}),
        risk_explanation="",
        status=ApprovalStatus.PENDING,
    )
    return Delivery(notice.delivery_id, "post", notice.approval_id, 1, notice, time.monotonic() + 60)


def ids(marks: Sequence[Mark]) -> list[tuple[UUID, str]]:
    return [(mark.delivery.delivery_id, mark.status.value) for mark in marks]


async def test_what_comes_the_moment_the_last_place_is_left_is_sent() -> None:
    """A place whose work has ended, and that is not counted as free yet, is no place that will send it."""
    dispatcher, marks = Slow(), Kept()
    target = target_over(dispatcher, marks)
    first, second = delivery(), delivery()
    target.put([first])
    await asyncio.sleep(0)
    dispatcher.go.set_result(None)
    asyncio.get_running_loop().call_soon(target.put, [second])  # after the last step of the place, before its end
    async with asyncio.timeout(2):
        await target.idle()

    assert ids(marks.marks) == [(first.delivery_id, "DELIVERED"), (second.delivery_id, "DELIVERED")]


async def test_a_place_that_breaks_leaves_what_waits_to_another() -> None:
    """What was in hand goes back as untried; the rest is sent."""
    marks = Kept()

    class Breaking(Slow):
        async def deliver(self, name: str, notice: Notice) -> DeliveryReport:
            if not self.given:
                self.given.append(notice.delivery_id)
                raise asyncio.CancelledError
            return await super().deliver(name, notice)

    dispatcher = Breaking()
    dispatcher.go.set_result(None)
    target = target_over(dispatcher, marks)
    first, second = delivery(), delivery()
    target.put([first, second])
    async with asyncio.timeout(2):
        await target.idle()

    assert ids(marks.marks) == [(first.delivery_id, "DUE"), (second.delivery_id, "DELIVERED")]


@pytest.mark.parametrize(("status", "is_freed"), [("DELIVERED", True), ("DEAD", True), ("DUE", False)])
async def test_what_is_behind_a_notice_may_go_once_that_has_ended(status: str, is_freed: bool) -> None:
    """Not behind one that goes back, for want of room say: it would be claimed and put back without a pause."""
    target = target_over(Slow(), Kept())
    given = delivery()
    target.put([given])
    target.held.add(given.approval_id)
    freed = target.written([Mark(given, DeliveryStatus(status), 1)])
    await target.close()

    assert freed == ({given.approval_id} if is_freed else set())
    assert not target.held
    assert not target.has_in_hand(given.approval_id)


async def test_what_waits_goes_back_when_it_is_closed() -> None:
    """No place is taken any more, neither for what is here nor for what comes."""
    dispatcher, marks = Slow(), Kept()
    target = target_over(dispatcher, marks)
    given = [delivery() for _ in range(3)]
    target.put(given[:2])
    async with asyncio.timeout(2):
        while not dispatcher.given:
            await asyncio.sleep(0.001)
    await target.close()
    target.put(given[2:])

    assert ids(marks.marks) == [(each.delivery_id, "DUE") for each in given]
    assert dispatcher.given == [given[0].delivery_id]
    assert target.is_idle
