"""Who holds a row of the outbox says how its delivery went: a worker whose lease is over says nothing any more."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta

import pytest

from agent_gateway_store import GatewayStore, Notice, StoreSettings, clock
from agent_gateway_store.testing import RecordingNotifier
from builders import make_request

pytestmark = pytest.mark.unit


class Late(RecordingNotifier):
    """Fails once it may go on."""

    def __init__(self) -> None:
        super().__init__("post")
        self.begun, self.may_end = threading.Event(), threading.Event()

    async def notify_pending(self, notice: Notice) -> None:
        self.begun.set()
        while not self.may_end.is_set():
            await asyncio.sleep(0.01)
        raise ConnectionError("too late")


class Failing(RecordingNotifier):
    """Fails at once."""

    async def notify_pending(self, notice: Notice) -> None:
        raise ConnectionError("in time")


async def test_a_failure_after_the_lease_overwrites_nothing() -> None:
    """The row was claimed by another worker meanwhile, and stands as that one left it."""
    late, url = Late(), "sqlite:///gateway.db"
    patient, idle = StoreSettings(plugin_timeout_seconds=60), StoreSettings(notification_worker=False)
    async with (
        GatewayStore(url, redis_url="", plugins=[late], settings=patient) as first,
        GatewayStore(url, redis_url="", plugins=[Failing("post")], settings=idle) as second,
    ):
        await first.approvals.issue_token(make_request())
        assert await asyncio.to_thread(late.begun.wait, 10)
        clock.move(timedelta(hours=1))
        await second.notifications.run(once=True)
        late.may_end.set()
        await first.close()
        [row] = [each for each in await second.notifications.list() if each.notifier == "post"]

    assert (row.status, row.attempts, row.last_error) == ("DUE", 2, "ConnectionError: in time")
