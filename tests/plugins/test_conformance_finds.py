"""The conformance suite finds what is wrong: each bad notifier fails the test that is meant for it, and no good one."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from agent_gateway_store.testing import NotifierConformance

pytestmark = [pytest.mark.integration, pytest.mark.system]

BAD = """
    import asyncio
    import threading
    import pytest
    from agent_gateway_store.testing import NotifierConformance

    SECRET = "planted-secret"

    class Base:
        name = "mine"
        def __init__(self, down=False):
            self.down, self.sent = down, []
        async def notify_pending(self, notice):
            await self.send(notice)
        async def notify_decision(self, notice):
            await self.send(notice)
        async def send(self, notice):
            if self.down:
                raise ConnectionError("down")
            self.sent.append(notice.model_dump_json())

    class Good(Base):
        pass

    class Unnamed(Base):
        name = "two\\nlines"

    class NotAsync(Base):
        def notify_pending(self, notice):
            self.sent.append("x")

    class NeedsAnApprover(Base):
        async def notify_decision(self, notice):
            self.sent.append(notice.approver_id.upper())

    class Fussy(Base):
        async def send(self, notice):
            self.sent.append(f"{notice.created_at:%H:%M}")

    class OnceOnly(Base):
        seen = frozenset()
        async def send(self, notice):
            if notice.delivery_id in self.seen:
                raise ValueError("again")
            self.seen |= {notice.delivery_id}
            await super().send(notice)

    class OneAtATime(Base):
        busy = False
        async def send(self, notice):
            assert not self.busy
            self.busy = True
            await asyncio.sleep(0)
            self.busy = False
            await super().send(notice)

    class BoundToALoop(Base):
        loop = None
        async def send(self, notice):
            self.loop = self.loop or asyncio.get_running_loop()
            assert self.loop is asyncio.get_running_loop()
            await super().send(notice)

    class BrokenByCancelling(Base):
        broken = False
        async def send(self, notice):
            assert not self.broken
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.broken = True
                raise
            await super().send(notice)

    class ShortOnly(Base):
        async def send(self, notice):
            assert len(notice.caller_id) < 1000
            await super().send(notice)

    class Formats(Base):
        async def send(self, notice):
            self.sent.append(("%s " + notice.caller_id) % notice.risk_explanation + notice.model_dump_json())

    class Changes(Base):
        async def send(self, notice):
            notice.tool_call.arguments["seen"] = True
            await super().send(notice)

    class ChangesDecisions(Base):
        async def notify_decision(self, notice):
            notice.tool_call.arguments.clear()
            await super().notify_decision(notice)

    class LocksInALoop(Base):
        def __init__(self, down=False):
            super().__init__(down)
            self.lock = asyncio.Lock()
        async def send(self, notice):
            async with self.lock:
                await asyncio.sleep(0.001)
                await super().send(notice)

    class Swallows(Base):
        async def send(self, notice):
            if not self.down:
                await super().send(notice)

    class Hangs(Base):
        async def send(self, notice):
            if self.down:
                await asyncio.sleep(60)
            await super().send(notice)

    class Vague(Base):
        async def send(self, notice):
            if self.down:
                raise ConnectionError
            self.sent.append("something waits")

    class Leaks(Base):
        def __repr__(self):
            return f"Leaks({SECRET})"

    class Suite(NotifierConformance):
        timeout_s = 3.0

        @pytest.fixture
        def notifier(self):
            return self.kind()

        @pytest.fixture
        def unreachable_notifier(self):
            return self.kind(down=True)

        @pytest.fixture
        def sent_text(self, notifier):
            return lambda: " ".join(notifier.sent)

        @pytest.fixture
        def secret_values(self):
            return [SECRET]

    for kind in Base.__subclasses__():
        globals()[f"Test{kind.__name__}"] = type(f"Test{kind.__name__}", (Suite,), {"kind": kind})
"""

MEANT = {
    "Unnamed": "test_has_a_name",
    "NotAsync": "test_is_accepted_by_a_store",
    "NeedsAnApprover": "test_tells_each_decision[EXPIRED]",
    "Fussy": "test_does_with_the_least",
    "OnceOnly": "test_takes_the_same_notice_again",
    "OneAtATime": "test_takes_many_at_once",
    "BoundToALoop": "test_works_in_a_second_event_loop",
    "BrokenByCancelling": "test_works_after_a_cancelled_call",
    "ShortOnly": "test_takes_hostile_text[huge]",
    "Formats": "test_takes_hostile_text[markup]",
    "Changes": "test_leaves_the_notice_as_it_is",
    "ChangesDecisions": "test_leaves_the_notice_as_it_is",
    "LocksInALoop": "test_works_in_a_second_event_loop",
    "Swallows": "test_raises_if_the_target_is_down",
    "Hangs": "test_raises_if_the_target_is_down",
    "Vague": "test_tells_what_an_approver_needs",
    "Leaks": "test_keeps_its_secrets",
}
"""Bad notifiers, and the test that each must fail."""


def failures(folder: Path) -> dict[str, set[str]]:
    """The names of the tests that failed, by notifier: in a pytest of its own, the whole suite on the good one, and on
    each bad one the test that is meant for it.
    """
    (folder / "test_it.py").write_text(textwrap.dedent(BAD))
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "-p", "no:valkey", "-W", "error", "-rfEs", "--tb=no"]
    tests = ["test_it.py::TestGood", *(f"test_it.py::Test{kind}::{test}" for kind, test in MEANT.items())]
    command = [sys.executable, "-m", "pytest", *options, "-c", "/dev/null", "--rootdir", folder, *tests]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "SKIPPED" not in ended.stdout
    assert not re.search(r"^ERROR", ended.stdout, re.MULTILINE), ended.stdout
    found: dict[str, set[str]] = {}
    for kind, test in re.findall(r"^FAILED \S+::Test(\w+)::(\S+)", ended.stdout, re.MULTILINE):
        found.setdefault(kind, set()).add(test)
    return found


def test_each_bad_notifier_fails_its_test_and_a_good_one_none(tmp_path: Path) -> None:
    """Each test of the suite but the simplest has a notifier that fails it."""
    found = failures(tmp_path)
    names = {test.partition("[")[0] for tests in found.values() for test in tests}
    own = {name for name in vars(NotifierConformance) if name.startswith("test_")}

    assert {kind: tests & {MEANT[kind]} for kind, tests in found.items()} == {kind: {MEANT[kind]} for kind in MEANT}
    assert own - names <= {"test_tells_that_somebody_must_decide", "test_tells_a_decision_whose_question_it_never_saw"}
