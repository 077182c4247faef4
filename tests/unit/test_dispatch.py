"""Notices reach the good plugins, whatever the bad ones do."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dispatch_helpers import (
    BOUND,
    Blocker,
    Doing,
    Recorder,
    by_name,
    dispatching,
    make_notice,
    raising,
    stubborn,
    until_heard,
)

import agent_gateway_store
from agent_gateway_store import hookimpl
from agent_gateway_store.hooks.lane import MAX_ABANDONED
from agent_gateway_store.models.values import Notice

pytestmark = pytest.mark.unit


class TestIsolation:
    """Notifiers that do not work."""

    @pytest.mark.parametrize(
        ("action", "error"),
        [
            (raising(ValueError("no\nway")), "ValueError: no way"),
            (raising(SystemExit(1)), "SystemExit: 1"),
            (raising(KeyboardInterrupt()), "KeyboardInterrupt"),
            (raising(asyncio.CancelledError()), "CancelledError"),
            (
                raising(RuntimeError("https://hooks.slack.com/services/T/B/X")),
                "RuntimeError: https://hooks.slack.com/***",
            ),
            (raising(RuntimeError("x" * 9999)), "RuntimeError: xxx"),
            (lambda: asyncio.sleep(20), "TimeoutError: no answer within 0.2 seconds"),
            (lambda: time.sleep(1), "TimeoutError: no answer within 0.2 seconds"),
            (stubborn, "TimeoutError: no answer within 0.2 seconds"),
        ],
    )
    async def test_bad_notifier_costs_a_report(
        self, action: Callable[[], Any], error: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Every notice reaches the good ones; the bad one is reported and logged by name, in bounded time."""
        good, bad, last = Recorder("good"), Doing("bad", action), Recorder("last")

        with dispatching(good, bad, last) as dispatcher:
            started = time.monotonic()
            reports = [by_name(await dispatcher.deliver_all(make_notice())) for _ in range(2)]
            waited = time.monotonic() - started

        assert len(good.heard) == len(last.heard) == 2
        assert waited < 2 * BOUND
        for report in reports:
            assert list(report) == ["good", "bad", "last"]
            assert report["good"].ok
            assert report["last"].ok
            assert not report["bad"].ok
            assert (report["bad"].error or "").startswith(error)
            assert len(report["bad"].error or "") <= 500
        warnings = [r for r in caplog.records if r.name == "agent_gateway_store.hooks"]
        assert [r.levelno for r in warnings] == [logging.WARNING] * 2
        assert "Plugin bad did not take a notice: " in warnings[0].getMessage()

    async def test_all_kinds_of_bad_plugins_at_once(self) -> None:
        """Good notifiers among twenty bad ones get every notice in one bounded wait."""
        actions = [
            raising(ValueError()),
            raising(SystemExit()),
            lambda: asyncio.sleep(20),
            stubborn,
            lambda: time.sleep(1),
        ]
        bad = [Doing(f"bad-{number}", actions[number % 5]) for number in range(20)]
        good = [Recorder("good-1"), *bad, Recorder("good-2")]

        with dispatching(*good, None, 7, object()) as dispatcher:
            started = time.monotonic()
            reports = await dispatcher.deliver_all(make_notice())
            waited = time.monotonic() - started

        assert [report.notifier for report in reports if report.ok] == ["good-1", "good-2"]
        assert waited < BOUND

    async def test_blocked_notifier_stalls_neither_loop_nor_neighbours(self) -> None:
        """While one blocks its thread, the event loop turns and the others deliver at once."""
        blocker, neighbour = Blocker(), Recorder("neighbour")

        with dispatching(blocker, neighbour, timeout=20) as dispatcher:
            async with asyncio.timeout(10):  # half of what the blocker would take
                blocked = asyncio.create_task(dispatcher.deliver("blocker", make_notice()))
                await until_heard(blocker)
                reports = [await dispatcher.deliver("neighbour", make_notice()) for _ in range(10)]
            assert not blocked.done()
            blocker.release.set()
            assert (await blocked).ok

        assert all(report.ok for report in reports)

    async def test_blocked_threads_are_bounded_and_counted(self) -> None:
        """A notifier gets a few further threads; then it is refused at once until one comes back."""
        blocker = Blocker()

        with dispatching(blocker) as dispatcher:
            for count in range(1, MAX_ABANDONED + 1):
                report = await dispatcher.deliver("blocker", make_notice())
                assert report.error == "TimeoutError: no answer within 0.2 seconds"
                assert dispatcher.abandoned == {"blocker": count}
            refused = await dispatcher.deliver("blocker", make_notice())
            assert refused.error == f"still busy: {MAX_ABANDONED} earlier calls have not come back"
            assert len(blocker.heard) == MAX_ABANDONED

            blocker.release.set()
            for thread in {*blocker.threads}:
                await asyncio.to_thread(thread.join, 5)
            back = await dispatcher.deliver("blocker", make_notice())

            assert back.ok
            assert dispatcher.abandoned == {}

    async def test_cancelled_sleeper_keeps_its_thread(self) -> None:
        """A notifier that only waits too long is cancelled; nothing is abandoned."""
        cancelled = []

        async def sleep() -> None:
            try:
                await asyncio.sleep(20)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        with dispatching(Doing("sleeper", sleep)) as dispatcher:
            await dispatcher.deliver("sleeper", make_notice())
            assert dispatcher.abandoned == {}

        assert cancelled == [True]

    async def test_notice_behind_a_blocked_one_is_withdrawn(self) -> None:
        """What was given up while it waited for the thread is not told later."""
        blocker = Blocker()

        with dispatching(blocker) as dispatcher:
            first, second = await asyncio.gather(*(dispatcher.deliver("blocker", make_notice()) for _ in range(2)))
            blocker.release.set()

        assert not first.ok
        assert not second.ok
        assert len(blocker.heard) == 1

    async def test_cancelling_the_caller_cancels_the_call(self) -> None:
        """The only thing that gets out is the caller's own cancellation."""
        ended = threading.Event()

        async def sleep() -> None:
            try:
                await asyncio.sleep(20)
            finally:
                ended.set()

        sleeper = Doing("sleeper", sleep)
        with dispatching(sleeper, timeout=20) as dispatcher:
            task = asyncio.create_task(dispatcher.deliver("sleeper", make_notice()))
            await until_heard(sleeper)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(ended.wait, 5)

    def test_loop_that_closes_meanwhile(self) -> None:
        """A loop that ends while its notice is under way leaves nothing broken."""
        blocker = Blocker()

        async def begin() -> None:
            asyncio.get_running_loop().create_task(dispatcher.deliver("blocker", make_notice()))
            while not blocker.heard:
                await asyncio.sleep(0.01)

        with dispatching(blocker) as dispatcher:
            asyncio.run(begin())
            blocker.release.set()
            assert asyncio.run(dispatcher.deliver("blocker", make_notice())).ok

    async def test_stray_task_of_a_plugin(self, caplog: pytest.LogCaptureFixture) -> None:
        """What a plugin leaves running may fail, even with SystemExit: its thread goes on."""
        kept: list[asyncio.Task[None]] = []

        async def fail() -> None:
            raise SystemExit(3)

        def action() -> None:
            kept.append(asyncio.get_running_loop().create_task(fail()))

        with dispatching(Doing("stray", action), timeout=10) as dispatcher:
            reports = [await dispatcher.deliver("stray", make_notice()) for _ in range(3)]
            for task in kept:
                assert isinstance(task.exception(), SystemExit)

        assert all(report.ok for report in reports)
        assert "Plugin stray: stray error in its event loop: SystemExit: 3" in caplog.text

    async def test_plugin_that_stops_its_loop(self) -> None:
        """The loop is started again."""
        with dispatching(Doing("stopper", lambda: asyncio.get_running_loop().stop()), timeout=10) as dispatcher:
            assert all([(await dispatcher.deliver("stopper", make_notice())).ok for _ in range(3)])

    async def test_method_that_is_not_async_after_all(self) -> None:
        """A decorated method that returns nothing to await is reported."""

        class Liar(Recorder):
            notify_pending = Recorder.notify_pending

        liar = Liar("liar")
        with dispatching(liar) as dispatcher:
            await dispatcher.open()
            liar.notify_pending = lambda notice: None  # type: ignore[assignment,misc,return-value]
            report = await dispatcher.deliver("liar", make_notice())

        assert report.error == "TypeError: the notifier's method is not async"

    async def test_blocking_calls_in_to_thread_are_bounded(self) -> None:
        """`asyncio.to_thread` in a notifier uses daemon threads, so that none keeps the process alive."""
        seen: list[threading.Thread] = []
        action = Doing("threads", lambda: asyncio.to_thread(lambda: seen.append(threading.current_thread())))

        with dispatching(action, timeout=10) as dispatcher:
            reports = [await dispatcher.deliver("threads", make_notice()) for _ in range(40)]

        assert all(report.ok for report in reports)
        assert all(thread.daemon for thread in seen)


class TestClosing:
    """The end of a dispatcher."""

    async def test_closed_dispatcher_reports(self) -> None:
        """After close nothing is delivered and nothing is raised."""
        recorder = Recorder()

        with dispatching(recorder) as dispatcher:
            await dispatcher.aclose()
            reports = await dispatcher.deliver_all(make_notice())

        assert [report.error for report in reports] == ["the dispatcher is closed"]
        assert recorder.heard == []

    async def test_calls_under_way_are_cancelled_and_reported(self) -> None:
        """Whoever waits for a notifier learns that the dispatcher closed."""
        sleeper = Doing("sleeper", lambda: asyncio.sleep(20))
        with dispatching(sleeper, timeout=20) as dispatcher:
            task = asyncio.create_task(dispatcher.deliver("sleeper", make_notice()))
            await until_heard(sleeper)
            await dispatcher.aclose(5)
            report = await asyncio.wait_for(task, 5)

        assert report.error == "the dispatcher was closed before it was done"

    async def test_close_does_not_wait_for_a_blocked_thread(self) -> None:
        """It waits as long as it was told, and not at all for threads known to be stuck."""
        blocker, fresh = Blocker(), Blocker("fresh")

        with dispatching(blocker, fresh) as dispatcher:
            await dispatcher.deliver("blocker", make_notice())
            task = asyncio.create_task(dispatcher.deliver("fresh", make_notice()))
            await until_heard(fresh)
            started = time.monotonic()
            dispatcher.close(0.1)
            waited = time.monotonic() - started
            assert not (await task).ok

        assert waited < 5

    def test_process_exits_while_plugins_are_stuck(self) -> None:
        """Neither a blocked thread nor a blocked `to_thread` holds up the end of the process."""
        code = f"""
import asyncio, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from dispatch_helpers import *

async def main():
    actions = [lambda: time.sleep(60), lambda: asyncio.to_thread(time.sleep, 60), stubborn]
    plugins = Plugins([Doing(f"n-{{i}}", action) for i, action in enumerate(actions)], environ={{LOAD_VARIABLE: ""}})
    dispatcher = Dispatcher(plugins, StoreSettings(plugin_timeout_seconds=0.2))
    print([report.ok for report in await dispatcher.deliver_all(make_notice())])
    await dispatcher.aclose()

asyncio.run(main())
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": str(Path(agent_gateway_store.__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

        assert done.stdout == "[False, False, False]\n", done.stderr
        assert done.returncode == 0


class Listener:
    """Hears every notice."""

    def __init__(self, name: str, action: Callable[[], Any] = lambda: None) -> None:
        self.name = name
        self.action = action
        self.heard: list[Notice] = []

    @hookimpl
    def gateway_store_approval_event(self, notice: Notice) -> Any:
        self.heard.append(notice)
        return self.action()


class TestEventHook:
    """`gateway_store_approval_event`."""

    async def test_sync_and_async_listeners_hear_everything(self) -> None:
        """Whatever the bad ones do, in one bounded wait."""
        done = []

        async def note() -> None:
            await asyncio.sleep(0)
            done.append("async")

        actions: dict[str, Callable[[], Any]] = {
            "sync": lambda: None,
            "raising": raising(ValueError("no")),
            "exiting": raising(SystemExit()),
            "garbage": lambda: 7,
            "blocking": lambda: time.sleep(1),
            "sleeping": lambda: asyncio.sleep(20),
            "async": note,
        }
        listeners = [Listener(name, action) for name, action in actions.items()]
        notice = make_notice("decision")

        with dispatching(*listeners, Recorder()) as dispatcher:
            started = time.monotonic()
            reports = by_name(await dispatcher.emit(notice))
            waited = time.monotonic() - started

        assert {name for name, report in reports.items() if report.ok} == {"sync", "garbage", "async"}
        assert reports["raising"].error == "ValueError: no"
        assert [listener.heard for listener in listeners] == [[notice]] * 7
        assert done == ["async"]
        assert waited < BOUND

    async def test_listener_and_notifier_of_one_name_do_not_share_a_thread(self) -> None:
        """A plugin whose hook blocks still notifies."""

        class Both(Recorder):
            release = threading.Event()

            @hookimpl
            def gateway_store_approval_event(self) -> None:
                self.release.wait(20)

        both = Both("both")
        with dispatching(both) as dispatcher:
            (heard,) = await dispatcher.emit(make_notice())
            (told,) = await dispatcher.deliver_all(make_notice())
            assert dispatcher.abandoned == {"both": 1}
            both.release.set()

        assert not heard.ok
        assert told.ok
