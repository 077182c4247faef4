"""Notices reach the notifiers that work: each in its own thread, from any event loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time

import pytest
from dispatch_helpers import BOUND, Doing, Recorder, dispatching, make_notice

from agent_gateway_store import hookimpl
from agent_gateway_store.hooks import DeliveryReport
from agent_gateway_store.models.values import Notice

pytestmark = pytest.mark.unit


class TestDelivery:
    """A notifier that works."""

    async def test_each_event_has_its_method(self) -> None:
        """Pending and decision go to the method of that name, and are reported."""
        recorder = Recorder()
        pending, decision = make_notice(), make_notice("decision")

        with dispatching(recorder) as dispatcher:
            reports = [await dispatcher.deliver("recorder", notice) for notice in (pending, decision)]

        assert recorder.heard == [("pending", pending), ("decision", decision)]
        assert [(report.notifier, report.ok, report.error) for report in reports] == [("recorder", True, None)] * 2
        assert all(0 <= report.seconds < BOUND for report in reports)

    async def test_one_thread_per_notifier(self) -> None:
        """All notices of a notifier meet in one daemon thread, and no other notifier is in it."""
        one, two = Recorder("one"), Recorder("two")

        with dispatching(one, two, timeout=10) as dispatcher:
            for _ in range(3):
                await dispatcher.deliver_all(make_notice())

        assert len({*one.threads}) == len({*two.threads}) == 1
        assert not {*one.threads} & {*two.threads, threading.current_thread()}
        assert one.threads[0].daemon

    async def test_no_thread_before_the_first_notice(self) -> None:
        """Construction starts nothing; close without use is fine, and so is closing twice."""
        before = set(threading.enumerate())

        with dispatching(Recorder()) as dispatcher:
            assert not [thread for thread in set(threading.enumerate()) - before if "gateway-store" in thread.name]
            dispatcher.close()

    async def test_names(self) -> None:
        """`open` and `names` tell who is there, in order."""
        with dispatching(Recorder("b"), Recorder("a")) as dispatcher:
            assert await dispatcher.open() == dispatcher.names == ("b", "a")

    async def test_notifiers_are_collected_once(self) -> None:
        """However many deliveries begin at once, a plugin is asked once."""
        asked = []

        class Source:
            @hookimpl
            def gateway_store_register_notifiers(self) -> list[Recorder]:
                asked.append(self)
                return [Recorder()]

        with dispatching(Source()) as dispatcher:
            await asyncio.gather(*(dispatcher.deliver_all(make_notice()) for _ in range(5)))

        assert len(asked) == 1

    async def test_many_notices_at_once(self) -> None:
        """Notices of one notifier run side by side in its loop."""
        sleeper = Doing("sleeper", lambda: asyncio.sleep(0.1))

        with dispatching(sleeper, timeout=10) as dispatcher:
            started = time.monotonic()
            reports = await asyncio.gather(*(dispatcher.deliver("sleeper", make_notice()) for _ in range(50)))

        assert all(report.ok for report in reports)
        assert time.monotonic() - started < 4

    async def test_every_plugin_has_its_own_copy(self) -> None:
        """A plugin that changes what it was given changes it for nobody else."""

        class Vandal(Recorder):
            async def hear(self, event: str, notice: Notice) -> None:
                notice.tool_call.arguments["path"].append("/etc")

        recorder, notice = Recorder("z"), make_notice()

        with dispatching(Vandal("a"), recorder, timeout=10) as dispatcher:
            await dispatcher.deliver("a", notice)
            await dispatcher.deliver("z", notice)

        assert recorder.heard[0][1].tool_call.arguments == notice.tool_call.arguments == {"path": ["/tmp/x"]}

    async def test_context_reaches_the_notifier(self) -> None:
        """Context variables, such as a trace, are those of the caller."""
        variable: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="none")
        seen: list[str] = []

        with dispatching(Doing("doing", lambda: seen.append(variable.get())), timeout=10) as dispatcher:
            variable.set("trace-1")
            await dispatcher.deliver("doing", make_notice())

        assert seen == ["trace-1"]

    async def test_unknown_name_is_a_report(self) -> None:
        """Nothing is raised for a notifier that is gone."""
        with dispatching() as dispatcher:
            report = await dispatcher.deliver("gone", make_notice())

        assert report == DeliveryReport("gone", False, "no notifier of this name is loaded", 0.0)

    def test_usable_from_one_loop_after_another(self) -> None:
        """The dispatcher belongs to no event loop."""
        recorder = Recorder()

        with dispatching(recorder, timeout=10) as dispatcher:
            for _ in range(3):
                asyncio.run(dispatcher.deliver("recorder", make_notice()))

        assert len(recorder.heard) == 3
        assert len({*recorder.threads}) == 1

    def test_usable_from_several_loops_at_once(self) -> None:
        """Threads with loops of their own share it."""
        recorder = Recorder()

        with dispatching(recorder, timeout=10) as dispatcher:
            threads = [
                threading.Thread(target=lambda: asyncio.run(dispatcher.deliver("recorder", make_notice())))
                for _ in range(8)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)

        assert len(recorder.heard) == 8
