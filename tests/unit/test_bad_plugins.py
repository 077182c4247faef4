"""Whatever bad plugins do: the good ones, and the store, work, and nobody waits for long."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest

import plugin_helpers
from agent_gateway_store import AuditEvent, GatewayStore, Notice, WriteOutcome, hookimpl
from agent_gateway_store.hooks.manager import LOAD_VARIABLE
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.testing import RecordingNotifier, make_notice
from builders import make_event, make_request
from dispatch_helpers import BOUND, Doing, Listener, Recorder, by_name, dispatching, raising, stubborn
from plugin_helpers import Install

pytestmark = pytest.mark.unit

install = plugin_helpers.install

ASKED = 3
"""How many approvals are asked for."""


BAD_NOTIFIERS: dict[str, tuple[Callable[[], Any], str]] = {
    "raises": (raising(ValueError("no\nway")), "ValueError: no way"),
    "exits": (raising(SystemExit(1)), "SystemExit: 1"),
    "interrupts": (raising(KeyboardInterrupt()), "KeyboardInterrupt"),
    "cancels": (raising(asyncio.CancelledError()), "CancelledError"),
    "leaks": (
        raising(RuntimeError("https://hooks.slack.com/services/T/B/X")),
        "RuntimeError: https://hooks.slack.com/***",
    ),
    "babbles": (raising(RuntimeError("x" * 9999)), "RuntimeError: xxx"),
    "sleeps": (lambda: asyncio.sleep(20), "TimeoutError: no answer within 0.2 seconds"),
    "blocks": (lambda: time.sleep(1), "TimeoutError: no answer within 0.2 seconds"),
    "stays": (stubborn, "TimeoutError: no answer within 0.2 seconds"),
}


async def test_bad_notifiers_cost_a_report_each_and_one_bounded_wait(caplog: pytest.LogCaptureFixture) -> None:
    """Every notice reaches the good ones among them; a bad one is reported and logged by name."""
    good, last = Recorder("good"), Recorder("last")
    bad = [Doing(name, action) for name, (action, _) in BAD_NOTIFIERS.items()]

    with dispatching(good, *bad, last, None, 7, object()) as dispatcher:
        started = time.monotonic()
        reports = [by_name(await dispatcher.deliver_all(make_notice())) for _ in range(2)]
        waited = time.monotonic() - started

    assert len(good.received) == len(last.received) == 2
    assert waited < 2 * BOUND
    for report in reports:
        assert list(report) == ["good", *BAD_NOTIFIERS, "last"]
        assert [name for name, each in report.items() if each.ok] == ["good", "last"]
        for name, (_, error) in BAD_NOTIFIERS.items():
            assert (report[name].error or "").startswith(error)
            assert len(report[name].error or "") <= 500
            assert caplog.text.count(f"Plugin {name} did not take a notice: ") == 2


async def test_sync_and_async_listeners_receive_everything() -> None:
    """Whatever the bad ones do in `gateway_store_approval_event`, in one bounded wait."""
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
    assert [listener.received for listener in listeners] == [[notice]] * 7
    assert done == ["async"]
    assert waited < BOUND


class Good(RecordingNotifier):
    """Implements every hook, and keeps what it receives."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.events: list[str] = []
        self.written: list[str] = []
        self.asked: list[str] = []

    @hookimpl
    def gateway_store_register_notifiers(self) -> list[Good]:
        return [self]

    @hookimpl
    def gateway_store_approval_event(self, notice: Notice) -> None:
        self.events.append(notice.event)

    @hookimpl
    async def gateway_store_before_audit_write(self, event: AuditEvent) -> AuditEvent:
        return event.model_copy(update={"risk_labels": [*event.risk_labels, self.name]})

    @hookimpl
    async def gateway_store_audit_written(self, events: list[AuditEvent]) -> None:
        self.written += [event.request_id for event in events]

    @hookimpl
    async def gateway_store_veto_decision(self, decision: str) -> None:
        self.asked.append(decision)


class Bad:
    """Does the same wrong thing in each hook that is called for its own sake."""

    def __init__(self, name: str, act: Callable[[], Any]) -> None:
        self.name = name
        self.act = act

    @hookimpl
    def gateway_store_register_notifiers(self) -> Any:
        return self.act()

    @hookimpl
    def gateway_store_approval_event(self, notice: Notice) -> Any:
        return self.act()

    @hookimpl
    def gateway_store_before_audit_write(self, event: AuditEvent) -> Any:
        return self.act()

    @hookimpl
    def gateway_store_audit_written(self, events: Any) -> Any:
        return self.act()


class Unbuildable:
    """Raises when it is made."""

    def __init__(self) -> None:
        raise RuntimeError("cannot be built")


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Lets the blocking plugins go at the end."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.system
async def test_most_of_many_plugins_misbehave_and_the_others_work(
    install: Install, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    """Every good plugin is asked, and receives each notice and event once; every write and decision stands.

    Asking waits for no notifier. A notice that a bad notifier does not take is given up; closing takes a bounded time.
    """
    install("unimportable", "import nowhere_to_be_found")
    install("leaving-at-once", "raise SystemExit('not like this')")
    install("taken-1", entry="taken")
    install("taken-2", entry="taken")
    monkeypatch.setenv(LOAD_VARIABLE, "unimportable,leaving-at-once,taken")
    acts: dict[str, Callable[[], Any]] = {
        "raises": raising(OSError("nobody there")),
        "exits": raising(SystemExit(3)),
        "hangs": lambda: asyncio.sleep(60),
        "blocks": lambda: released.wait(60),
        "garbage": lambda: {"not": ["what", "was", "asked"]},
        "nonsense": lambda: ["nonsense", 7, object()],
    }
    good = [Good(f"good-{index}") for index in range(10)]
    bad = [Bad(name, act) for name, act in acts.items()] + [Bad("interrupts", raising(KeyboardInterrupt()))]
    bare = [Doing(f"bare-{number}-{name}", act) for name, act in acts.items() for number in range(2)]
    late = [RecordingNotifier("good-0"), RecordingNotifier("bare-0-raises")]
    mixed = [*chain(*zip(good, [*bad, Unbuildable], strict=False)), *good[8:]]
    settings = StoreSettings(plugin_timeout_seconds=1, notification_max_attempts=1, notification_concurrency=2)

    async with (
        asyncio.timeout(60),
        GatewayStore("sqlite:///gateway.db", redis_url="", settings=settings, plugins=[*mixed, *bare, *late]) as store,
    ):
        outcomes = await asyncio.gather(*(store.audit.write(make_event(request_id=f"r-{n}")) for n in range(5)))
        tokens = [await store.approvals.issue_token(make_request()) for _ in range(ASKED)]
        for plugin in good:
            await plugin.wait_for(ASKED, timeout_s=20)
        decided = [await store.approvals.approve(tokens[0], "approver-1")]
        decided += [await store.approvals.deny(token, "approver-1") for token in tokens[1:]]
        async with asyncio.timeout(30):
            while await store.notifications.list("DUE"):
                await asyncio.sleep(0.05)
        rows = await store.notifications.list(limit=1000)
        stored = await store.audit.get_by_request_id("r-4")
        counters = store.audit.counters
        states = {record.name: record.state for record in store.plugins.records}
        assert not released.is_set()

    assert outcomes == [WriteOutcome.STORED] * 5
    assert (counters.stored, counters.withheld) == (5, 5)
    assert [each.status for each in decided] == ["APPROVED", *["DENIED"] * (ASKED - 1)]
    assert stored is not None
    assert stored.risk_labels == [plugin.name for plugin in good]
    for plugin in good:
        assert len(plugin.pending) == len(plugin.decisions) == ASKED
        assert len({notice.delivery_id for notice in plugin.notices}) == 2 * ASKED
        assert sorted(plugin.events) == ["decision"] * ASKED + ["pending"] * ASKED
        assert sorted(plugin.written) == [f"r-{index}" for index in range(5)]
        assert plugin.asked == [each.status for each in decided]
        assert states[plugin.name] == "active"
    assert {states[each.name] for each in bad} == {"broken"}
    assert {states[name] for name in ("Unbuildable", "unimportable", "leaving-at-once")} == {"broken"}
    assert [each.notices for each in late] == [[], []]
    by_notifier: dict[str, set[str]] = {}
    for row in rows:
        by_notifier.setdefault(row.notifier, set()).add(row.status.value)
    (taken,) = by_notifier.keys() & {"taken-1", "taken-2"}
    fine = {taken, *(plugin.name for plugin in good)}
    fine |= {name for name in by_notifier if name.endswith(("-garbage", "-nonsense"))}
    assert {name for name, found in by_notifier.items() if found == {"DELIVERED"}} == fine
    assert {name for name, found in by_notifier.items() if found == {"DEAD"}} == by_notifier.keys() - fine
    assert by_notifier.keys() == {taken, *(each.name for each in (*good, *bare))}


async def test_a_store_that_is_opened_again_runs_its_plugins_again() -> None:
    """Each opening has fresh threads for the notifiers and for every hook, and leaves none of them behind."""
    plugin = Good("good")
    store = GatewayStore("sqlite:///gateway.db", redis_url="", plugins=[plugin])

    for times in (1, 2):
        async with store:
            await store.audit.write(make_event(request_id=f"r-{times}"))
            token = await store.approvals.issue_token(make_request())
            await store.approvals.approve(token, "approver-1")
            await plugin.wait_for(2 * times)
            assert [each for each in threading.enumerate() if each.name == "gateway-store good"]
        assert not [each for each in threading.enumerate() if each.name == "gateway-store good"]

    assert plugin.asked == ["APPROVED"] * 2
    assert plugin.written == ["r-1", "r-2"]
    assert sorted(plugin.events) == ["decision"] * 2 + ["pending"] * 2
