"""What every notifier must do, as tests. Authors subclass it; it needs no plugin of pytest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from agent_gateway_store.hooks.dispatch import DeliveryReport, Dispatcher
from agent_gateway_store.hooks.executor import run_in_thread
from agent_gateway_store.hooks.manager import LOAD_VARIABLE, Plugins
from agent_gateway_store.hooks.specs import Notifier
from agent_gateway_store.models.values import ApprovalStatus, Notice, ToolCall
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.testing.doubles import make_notice

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

T = TypeVar("T")

# Texts that callers put into names, arguments and explanations.
HOSTILE_TEXTS = {
    "nul": "a\0b",
    "control": "\x1b[2J\x1b]0;title\x07\r\nAPPROVED by admin\x08\x7f",
    "right-to-left": "file\u202etxt.exe\u2066 \u200f",
    "lines": "one\ntwo\r\nthree\u2028four\x85",
    "markdown": "*bold* `code` ```fence``` [link](https://example.com) <https://example.com|click> | # ~ > _",
    "mentions": "<!channel> <@U024BE7LH> @everyone @here &lt;!here&gt;",
    "markup": "<script>alert(1)</script>\"'&amp;{{7*7}}${7*7}%s%(x)s{0}",
    "formula": '=HYPERLINK("https://example.com")',
    "emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \u0301\u0301\u0301 \ufdfd",
    "huge": "x" * 100_000,
    "empty": "",
}


class NotifierConformance:
    """Tests that every notifier must pass. Subclass it and give it the fixture `notifier`:

        class TestMine(NotifierConformance):
            @pytest.fixture
            def notifier(self, tmp_path):
                return MyNotifier(tmp_path / "notices.jsonl")

    Three more fixtures are optional. Each enables a test that is skipped otherwise: `unreachable_notifier` (one whose
    target is down), `sent_text` (a function that returns all that the notifier has sent so far, as text) and
    `secret_values` (secrets that it was made with).

    Attributes:
        timeout_s: Seconds that one delivery may take.
    """

    timeout_s = 5.0

    @pytest.fixture
    def notifier(self) -> Notifier:
        """Override: the notifier to test, new for each test."""
        raise NotImplementedError("Give the fixture `notifier`: it returns the notifier to test.")

    @pytest.fixture
    def unreachable_notifier(self) -> Notifier | None:
        """Override: a notifier whose target is down."""
        return None

    @pytest.fixture
    def sent_text(self) -> Callable[[], str] | None:
        """Override: what returns everything the notifier has sent so far."""
        return None

    @pytest.fixture
    def secret_values(self) -> Sequence[str]:
        """Override: secrets the notifier was made with (passwords, tokens, the path of a webhook's URL)."""
        return ()

    def test_has_a_name(self, notifier: Notifier) -> None:
        """Printable, at most 100 characters, and the same each time it is asked."""
        assert isinstance(notifier.name, str)
        assert notifier.name.strip()
        assert notifier.name.isprintable()
        assert len(notifier.name) <= 100
        assert notifier.name == notifier.name

    def test_is_accepted_by_a_store(self, notifier: Notifier) -> None:
        """An object with a name and two async methods is a notifier."""
        plugins = _plugins(notifier)

        found = plugins.notifiers(StoreSettings(plugin_timeout_seconds=self.timeout_s))

        assert plugins.records[0].error is None
        assert found == {notifier.name: notifier}

    def test_tells_that_somebody_must_decide(self, notifier: Notifier) -> None:
        """A pending notice is delivered."""
        self._delivers(notifier, make_notice())

    @pytest.mark.parametrize("status", ["APPROVED", "DENIED", "CANCELLED", "EXPIRED"])
    def test_tells_each_decision(self, notifier: Notifier, status: str) -> None:
        """Of every status; an expiry has no approver."""
        approver = None if status == "EXPIRED" else "approver-1"
        pending = make_notice()
        decided = make_notice(
            "decision", approval_id=pending.approval_id, status=ApprovalStatus(status), approver_id=approver
        )
        self._delivers(notifier, pending)
        self._delivers(notifier, decided)

    def test_tells_a_decision_whose_question_it_never_saw(self, notifier: Notifier) -> None:
        """It may have been installed in between, or the first notice was a dead letter."""
        self._delivers(notifier, make_notice("decision"))

    def test_does_with_the_least(self, notifier: Notifier) -> None:
        """Times may be unknown, texts empty, arguments none."""
        bare: dict[str, Any] = {
            "created_at": None,
            "expires_at": None,
            "risk_explanation": "",
            "org_id": "",
            "request_id": "",
        }
        call = ToolCall(server="", tool="")
        self._delivers(notifier, make_notice(caller_id="", tool_call=call, **bare))
        self._delivers(
            notifier,
            make_notice("decision", caller_id="", tool_call=call, approver_id=None, note="", decided_at=None, **bare),
        )

    def test_takes_the_same_notice_again(self, notifier: Notifier) -> None:
        """A notice can arrive more than once, under one delivery id; the second time is not an error."""
        notice = make_notice()
        self._delivers(notifier, notice)
        self._delivers(notifier, notice)

    def test_takes_many_at_once(self, notifier: Notifier) -> None:
        """Several notices are delivered at the same time."""
        self._delivers(notifier, *(make_notice() for _ in range(20)))

    def test_works_in_a_second_event_loop(self, notifier: Notifier) -> None:
        """A thread that hangs is replaced: nothing may be bound to the event loop of the first notice."""
        for _ in range(3):
            # Several at once: a lock of asyncio is bound to a loop only when somebody has to wait for it.
            self._delivers(notifier, *(make_notice() for _ in range(5)))

    def test_works_after_a_cancelled_call(self, notifier: Notifier) -> None:
        """A call that takes too long is cancelled at any point; the next one works."""

        async def run() -> DeliveryReport:
            async with self._dispatching(notifier) as dispatcher:
                for delay_s in (0.0, 0.001, 0.005, 0.02):
                    task = asyncio.create_task(dispatcher.deliver(notifier.name, make_notice()))
                    await asyncio.sleep(delay_s)
                    task.cancel()
                    await asyncio.wait([task])
                return await dispatcher.deliver(notifier.name, make_notice())

        report = _run(run)
        assert report.ok, report.error

    @pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)
    def test_takes_hostile_text(self, notifier: Notifier, text: str) -> None:
        """Callers choose the texts: whatever they hold, the notice is delivered."""
        fields: dict[str, Any] = {
            "org_id": text,
            "request_id": text,
            "caller_id": text,
            "tool_call": ToolCall(
                server=text, tool=text, arguments={text: [text, {text: text}], "n": 1.5, "none": None}
            ),
            "risk_explanation": text,
        }
        pending = make_notice(**fields)
        self._delivers(notifier, pending)
        self._delivers(
            notifier,
            make_notice("decision", approval_id=pending.approval_id, approver_id=text, note=text, **fields),
        )

    def test_leaves_the_notice_as_it_is(self, notifier: Notifier) -> None:
        """Other notifiers receive the same notice."""
        pending = make_notice()
        decided = make_notice("decision", approval_id=pending.approval_id)
        before = [notice.model_dump_json() for notice in (pending, decided)]

        async def run() -> None:
            async with asyncio.timeout(self.timeout_s):
                await notifier.notify_pending(pending)
                await notifier.notify_decision(decided)

        _run(run)
        assert [notice.model_dump_json() for notice in (pending, decided)] == before

    def test_raises_if_the_target_is_down(
        self,
        unreachable_notifier: Notifier | None,
        secret_values: Sequence[str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """An error brings the notice again: neither swallow it nor wait until the time is up."""
        if unreachable_notifier is None:
            pytest.skip("gives no fixture `unreachable_notifier`")
        with caplog.at_level(logging.DEBUG):
            (report,) = self._reports(unreachable_notifier, make_notice())

        assert not report.ok, "the notifier swallowed the error, so the notice would not be sent again"
        assert "no answer within" not in (report.error or ""), "give up before PLUGIN_TIMEOUT_SECONDS"
        for secret in secret_values:
            assert secret not in (report.error or "")
            assert secret not in caplog.text

    def test_tells_what_an_approver_needs(self, notifier: Notifier, sent_text: Callable[[], str] | None) -> None:
        """Which caller wants which tool, and the id by which it is decided."""
        if sent_text is None:
            pytest.skip("gives no fixture `sent_text`")
        notice = make_notice(caller_id="agent-of-the-test")
        self._delivers(notifier, notice)

        text = sent_text()
        for needed in (str(notice.approval_id), notice.tool_call.tool, notice.caller_id):
            assert needed in text

    def test_keeps_its_secrets(
        self, notifier: Notifier, secret_values: Sequence[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        """No secret in its repr, or in what is logged."""
        if not secret_values:
            pytest.skip("gives no fixture `secret_values`")
        with caplog.at_level(logging.DEBUG):
            self._delivers(notifier, make_notice())

        for secret in secret_values:
            assert secret not in repr(notifier)
            assert secret not in caplog.text

    def _delivers(self, notifier: Notifier, *notices: Notice) -> None:
        for report in self._reports(notifier, *notices):
            assert report.ok, report.error

    def _reports(self, notifier: Notifier, *notices: Notice) -> list[DeliveryReport]:
        """Deliver as a store does: in a thread and an event loop of the notifier's own, which end afterwards."""

        async def run() -> list[DeliveryReport]:
            async with self._dispatching(notifier) as dispatcher:
                return await asyncio.gather(*(dispatcher.deliver(notifier.name, notice) for notice in notices))

        return _run(run)

    @asynccontextmanager
    async def _dispatching(self, notifier: Notifier) -> AsyncIterator[Dispatcher]:
        dispatcher = Dispatcher(_plugins(notifier), StoreSettings(plugin_timeout_seconds=self.timeout_s))
        try:
            yield dispatcher
        finally:
            await dispatcher.aclose()


def _plugins(notifier: Notifier) -> Plugins:
    return Plugins([notifier], environ={LOAD_VARIABLE: ""})


def _run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    # In a thread, since a loop may be running here.
    return run_in_thread(lambda: asyncio.run(work()), name="conformance").result()
