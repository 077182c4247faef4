"""Notices reach the notifiers, each in a thread of its own, from any event loop; a thread that is stuck is replaced."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest

from agent_gateway_store import ToolCall, errors, hookimpl
from agent_gateway_store.hooks.executor import MAX_ABANDONED
from agent_gateway_store.models.values import Notice
from agent_gateway_store.testing import make_notice
from dispatch_helpers import BOUND, Blocker, Doing, Recorder, dispatching, raising, until_called

pytestmark = pytest.mark.unit


def threads_of(name: str) -> int:
    return [thread.name for thread in threading.enumerate()].count(f"gateway-store {name}")


class TestDelivery:
    """A notifier that works."""

    async def test_each_event_has_its_method(self) -> None:
        """Pending and decision go to the method of that name, and are reported."""
        recorder = Recorder()
        pending, decision = make_notice(), make_notice("decision")

        with dispatching(recorder) as dispatcher:
            reports = [await dispatcher.deliver("recorder", notice) for notice in (pending, decision)]

        assert recorder.received == [("pending", pending), ("decision", decision)]
        assert [(report.notifier, report.ok, report.error) for report in reports] == [("recorder", True, None)] * 2
        assert all(0 <= report.seconds < BOUND for report in reports)

    async def test_one_thread_per_notifier(self) -> None:
        """All notices of a notifier meet in one daemon thread, started by the first; no other is in it."""
        one, two = Recorder("one"), Recorder("two")

        with dispatching(one, two, timeout=10) as dispatcher:
            assert await dispatcher.open() == ("one", "two")
            assert threads_of("one") == 0
            for _ in range(3):
                await dispatcher.deliver_all(make_notice())
            dispatcher.close()  # as often as one likes

        assert len({*one.threads}) == len({*two.threads}) == 1
        assert not {*one.threads} & {*two.threads, threading.current_thread()}
        assert one.threads[0].daemon

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

    async def test_every_plugin_has_its_own_copy(self) -> None:
        """A plugin that changes what it was given changes it for nobody else."""

        class Vandal(Recorder):
            async def receive(self, event: str, notice: Notice) -> None:
                notice.tool_call.arguments["path"].append("/etc")

        call = ToolCall(server="files", tool="delete", arguments={"path": ["/tmp/x"]})
        recorder, notice = Recorder("z"), make_notice(tool_call=call)

        with dispatching(Vandal("a"), recorder, timeout=10) as dispatcher:
            await dispatcher.deliver("a", notice)
            await dispatcher.deliver("z", notice)

        assert recorder.received[0][1].tool_call.arguments == notice.tool_call.arguments == {"path": ["/tmp/x"]}

    async def test_context_reaches_the_notifier(self) -> None:
        """Context variables, such as a trace, are those of the caller."""
        variable: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="none")
        seen: list[str] = []

        with dispatching(Doing("doing", lambda: seen.append(variable.get())), timeout=10) as dispatcher:
            variable.set("trace-1")
            await dispatcher.deliver("doing", make_notice())

        assert seen == ["trace-1"]

    def test_usable_from_several_loops_at_once(self) -> None:
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

        assert len(recorder.received) == 8

    async def test_listener_and_notifier_of_one_name_do_not_share_a_thread(self) -> None:
        class Both(Recorder):
            release = threading.Event()

            @hookimpl
            def gateway_store_approval_event(self) -> None:
                self.release.wait(20)

        both = Both("both")
        with dispatching(both) as dispatcher:
            (by_hook,) = await dispatcher.emit(make_notice())
            (by_method,) = await dispatcher.deliver_all(make_notice())
            assert threads_of("both") == 2
            both.release.set()

        assert not by_hook.ok
        assert by_method.ok


@pytest.mark.parametrize(
    ("error", "retry_after_s", "is_permanent"),
    [
        (errors.NotDeliveredError("429", retry_after_s=30), 30.0, False),
        (errors.NotDeliveredError("429", retry_after_s=0.5), 0.5, False),
        (errors.NotDeliveredError("410", is_permanent=True), None, True),
        (errors.NotDeliveredError("503"), None, False),
        (OSError("no route"), None, False),
    ],
)
async def test_report_says_when_to_come_back_and_whether(
    error: Exception, retry_after_s: float | None, is_permanent: bool
) -> None:
    """Both as the notifier gave them; any other exception says neither."""
    with dispatching(Doing("n", raising(error))) as dispatcher:
        report = await dispatcher.deliver("n", make_notice())

    assert (report.ok, report.retry_after_s, report.is_permanent) == (False, retry_after_s, is_permanent)
    assert report.error == f"{type(error).__name__}: {error}"


async def test_a_time_that_is_none_is_left_out() -> None:
    """A notifier may hand on what a stranger's server sent."""
    for asked in (float("nan"), float("inf"), -1, 10**400, "soon", True, object()):
        error = errors.NotDeliveredError("429", retry_after_s=asked, is_permanent=asked)  # type: ignore[arg-type]
        with dispatching(Doing("n", raising(error))) as dispatcher:
            report = await dispatcher.deliver("n", make_notice())

        assert (report.retry_after_s, report.is_permanent) == (None, asked is True)


class TestIsolation:
    """Notifiers that do not work."""

    async def test_blocked_notifier_stalls_neither_loop_nor_neighbours(self) -> None:
        """While one blocks its thread, the event loop turns and the others deliver at once."""
        blocker, neighbour = Blocker(), Recorder("neighbour")

        with dispatching(blocker, neighbour, timeout=20) as dispatcher:
            async with asyncio.timeout(10):  # half of what the blocker would take
                blocked = asyncio.create_task(dispatcher.deliver("blocker", make_notice()))
                await until_called(blocker)
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
                assert threads_of("blocker") == count
            refused = await dispatcher.deliver("blocker", make_notice())
            assert refused.error == f"still busy: {MAX_ABANDONED} earlier calls have not come back"
            assert len(blocker.received) == MAX_ABANDONED

            blocker.release.set()
            for thread in {*blocker.threads}:
                await asyncio.to_thread(thread.join, 5)
            back = await dispatcher.deliver("blocker", make_notice())

            assert back.ok
            assert threads_of("blocker") == 1

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
            for _ in range(2):
                await dispatcher.deliver("sleeper", make_notice())
            assert threads_of("sleeper") == 1

        assert cancelled == [True, True]

    async def test_notice_behind_a_blocked_one_is_withdrawn(self) -> None:
        """What was given up while it waited for the thread is not delivered later."""
        blocker = Blocker()

        with dispatching(blocker) as dispatcher:
            first, second = await asyncio.gather(*(dispatcher.deliver("blocker", make_notice()) for _ in range(2)))
            blocker.release.set()

        assert not first.ok
        assert not second.ok
        assert len(blocker.received) == 1

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
            await until_called(sleeper)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(ended.wait, 5)

    def test_loop_that_closes_meanwhile(self) -> None:
        """A loop that ends while its notice is under way leaves nothing broken."""
        blocker = Blocker()

        async def begin() -> None:
            asyncio.get_running_loop().create_task(dispatcher.deliver("blocker", make_notice()))
            while not blocker.received:
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
        with dispatching(Doing("stopper", lambda: asyncio.get_running_loop().stop()), timeout=10) as dispatcher:
            assert all([(await dispatcher.deliver("stopper", make_notice())).ok for _ in range(3)])

    async def test_plugin_that_breaks_its_loop(self) -> None:
        """Its call fails, as for any plugin that fails, and the next one has a new thread."""

        def break_loop() -> None:
            asyncio.get_running_loop()._selector.select = None  # type: ignore[attr-defined]

        breaker = Doing("breaker", break_loop)
        with dispatching(breaker, timeout=10) as dispatcher:
            broken = await dispatcher.deliver("breaker", make_notice())
            breaker.action = lambda: None
            again = await dispatcher.deliver("breaker", make_notice())

        assert broken.error == "its event loop broke: TypeError: 'NoneType' object is not callable"
        assert again.ok

    async def test_process_that_can_start_no_more_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is raised, and the notice arrives once there is a thread for it."""

        def refuse(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with dispatching(Recorder("late")) as dispatcher:
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", refuse)
                assert await dispatcher.open() == ()
                assert not (await dispatcher.deliver("late", make_notice())).ok
            assert (await dispatcher.deliver("late", make_notice())).ok

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
