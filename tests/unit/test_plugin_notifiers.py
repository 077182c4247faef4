"""Notifiers are collected plugin by plugin: a bad answer costs a record, never the others' notifiers."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest

import plugin_helpers
from agent_gateway_store import hookimpl
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.testing import RecordingNotifier
from plugin_helpers import load, record

pytestmark = pytest.mark.unit

settings = plugin_helpers.settings


class _NoNotify:
    name = "no-notify"


class _HalfNotifier:
    name = "half"

    async def notify_pending(self, notice: object) -> None: ...


class _SyncNotifier:
    name = "sync"

    def notify_pending(self, notice: object) -> None: ...

    def notify_decision(self, notice: object) -> None: ...


class _RaisingName(RecordingNotifier):
    def __init__(self) -> None: ...

    @property
    def name(self) -> str:  # type: ignore[override]
        raise SystemExit("no name")


class Source:
    """A plugin that answers with what it was made with, or raises it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @hookimpl
    def gateway_store_register_notifiers(self) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer() if callable(self.answer) else self.answer

    @hookimpl
    def gateway_store_plugin_settings(self) -> Any:
        return self.gateway_store_register_notifiers()


async def _coroutine() -> list[RecordingNotifier]:
    return [RecordingNotifier("never")]


def test_only_ctrl_c_of_the_user_ends_the_wait_for_settings() -> None:
    """What a plugin raises in its thread is its own problem."""
    release = threading.Event()

    def hang() -> None:
        if not release.is_set():
            signal.raise_signal(signal.SIGINT)
            release.wait(5)

    plugins = load(given=(Source(KeyboardInterrupt()), Source(hang)))
    with pytest.raises(KeyboardInterrupt):
        plugins.settings(20)
    release.set()

    assert plugins.settings(20) == {}
    assert record(plugins, "Source").error == "gateway_store_plugin_settings: KeyboardInterrupt"


class TestNotifiers:
    """Collecting notifiers."""

    @pytest.mark.parametrize(
        ("answer", "error"),
        [
            (ValueError("no"), "gateway_store_register_notifiers raised ValueError: no"),
            (SystemExit(1), "raised SystemExit: 1"),
            (KeyboardInterrupt(), "raised KeyboardInterrupt"),
            (7, "returned int, not a list of notifiers"),
            ("log", "returned str, not a list of notifiers"),
            (RecordingNotifier("alone"), "returned RecordingNotifier, not a list of notifiers"),
            (_coroutine, "returned coroutine, not a list of notifiers"),
            ([None], "NoneType has no name"),
            ([RecordingNotifier("")], "RecordingNotifier has no name"),
            ([RecordingNotifier("a\nb")], "RecordingNotifier has no name"),
            ([RecordingNotifier("x" * 101)], "RecordingNotifier has no name"),
            ([RecordingNotifier(7)], "RecordingNotifier has no name"),
            ([RecordingNotifier], "RecordingNotifier is a class, not an object"),
            ([_NoNotify()], "_NoNotify has no async method notify_pending"),
            ([_HalfNotifier()], "_HalfNotifier has no async method notify_decision"),
            ([_SyncNotifier()], "_SyncNotifier has no async method notify_pending"),
            ([_RaisingName()], "SystemExit: no name"),
            ([RecordingNotifier("before")], "a notifier named before is already there"),
        ],
    )
    def test_bad_answer_costs_a_record(self, answer: Any, error: str, settings: StoreSettings) -> None:
        plugins = load(given=(RecordingNotifier("before"), Source(answer), RecordingNotifier("after")))

        assert list(plugins.notifiers(settings)) == ["before", "after"]
        assert record(plugins, "Source").state == "broken"
        assert error in (record(plugins, "Source").error or "")

    def test_no_notifier_is_no_fault(self, settings: StoreSettings) -> None:
        """A plugin that is not configured has nothing to offer."""
        plugins = load(given=(Source(None), Source([]), Source(())))

        assert plugins.notifiers(settings) == {}
        assert {record.state for record in plugins.records if record.distribution is None} == {"active"}

    def test_hanging_plugins_share_one_bounded_wait(self, settings: StoreSettings) -> None:
        """Twenty that never answer cost one timeout, and the others' notifiers come."""
        release = threading.Event()
        hanging = [Source(lambda: release.wait(20) and []) for _ in range(20)]
        plugins = load(given=(RecordingNotifier("before"), *hanging, RecordingNotifier("after")))
        started = time.monotonic()

        try:
            found = plugins.notifiers(settings)
            waited = time.monotonic() - started
        finally:
            release.set()

        assert 0.2 <= waited < 3
        assert list(found) == ["before", "after"]
        said = "gateway_store_register_notifiers: TimeoutError: no answer within 0.2 seconds"
        assert record(plugins, "Source-3").error == said

    def test_asking_again_forgets_old_faults(self, settings: StoreSettings) -> None:
        source = Source(7)
        plugins = load(given=(source,))
        plugins.notifiers(settings)
        source.answer = [RecordingNotifier("now")]

        assert list(plugins.notifiers(settings)) == ["now"]
        assert record(plugins, "Source").state == "active"

    def test_wrapper_reaches_its_own_plugin_only(self) -> None:
        """A plugin cannot wrap, and so swallow, what another one hears."""

        class Wrapper:
            @hookimpl(wrapper=True)
            def gateway_store_approval_event(self) -> Any:
                yield
                return ["swallowed"]

        class Listener:
            @hookimpl
            def gateway_store_approval_event(self, notice: str) -> str:
                return notice

        callers = load(given=(Wrapper(), Listener())).callers("gateway_store_approval_event")

        assert callers["Listener"](notice="x") == ["x"]
