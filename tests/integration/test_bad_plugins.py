"""Twenty plugins, most of them bad in one way or another: the good ones are told everything, and nobody waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from agent_gateway_store import ApprovalRequest, GatewayStore, Notice, StoreSettings, ToolCall, hookimpl

pytestmark = pytest.mark.integration

ASKED = 6


class Good:
    """Keeps what it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.taken: list[Notice] = []

    async def notify_pending(self, notice: Notice) -> None:
        self.taken.append(notice)

    async def notify_decision(self, notice: Notice) -> None:
        self.taken.append(notice)


class Bad(Good):
    """Does something else instead."""

    def __init__(self, name: str, act: Callable[[], Any]) -> None:
        super().__init__(name)
        self.act = act

    async def notify_pending(self, notice: Notice) -> Any:
        result = self.act()
        return await result if asyncio.iscoroutine(result) else result

    notify_decision = notify_pending


class Offering:
    """A plugin whose hook answers with what it was made with, or raises it."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    @hookimpl
    def gateway_store_register_notifiers(self) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def fail() -> None:
    raise OSError("nobody there")


def leave() -> None:
    raise SystemExit(3)


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets the blocking plugins go at the end."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def plugins(release: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Eighteen objects; two more are installed distributions that cannot be imported."""
    for number, source in enumerate(("import nowhere_to_be_found", "raise SystemExit('not like this')")):
        (tmp_path / f"broken_{number}.py").write_text(source)
        info = tmp_path / f"broken_{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: broken-{number}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[agent_gateway_store]\nbroken-{number} = broken_{number}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("AGENT_GATEWAY_STORE_LOAD_PLUGINS", "broken-0,broken-1")
    return [
        *(Good(f"good-{number}") for number in range(4)),
        *(Bad(f"raising-{number}", fail) for number in range(2)),
        Bad("leaving", leave),
        *(Bad(f"hanging-{number}", lambda: asyncio.sleep(3600)) for number in range(2)),
        *(Bad(f"blocking-{number}", lambda: release.wait(60)) for number in range(2)),
        *(Bad(f"garbage-{number}", lambda: b"\x00" * 1000) for number in range(2)),
        Offering(["nonsense", 7, object()]),
        Offering(ImportError("no module named nowhere")),
        Offering(SystemExit(1)),
        Good("good-0"),
        Good("raising-0"),
    ]


async def test_twenty_plugins(plugins: list[Any], release: threading.Event, tmp_path: Path) -> None:
    """Every good one gets each notice once; the bad ones' notices wait or are given up; asking waits for none."""
    assert len(plugins) + 2 == 20
    settings = StoreSettings(plugin_timeout_seconds=0.5, notification_max_attempts=1, notification_concurrency=2)
    tokens = []
    async with GatewayStore(f"sqlite:///{tmp_path}/x.db", redis_url="", plugins=plugins, settings=settings) as store:
        for _ in range(ASKED):
            call = ToolCall(server="files", tool="delete")
            request = ApprovalRequest(request_id=uuid4().hex, caller_id="a", tool_call=call, risk_explanation="gone")
            tokens.append(await store.approvals.issue_token(request))
        good = [each for each in plugins[:4] if isinstance(each, Good)]
        async with asyncio.timeout(10):
            while any(len(each.taken) < ASKED for each in good):
                await asyncio.sleep(0.01)
        assert not release.is_set()
        for token in tokens:
            await store.approvals.deny(token, "alice")
        async with asyncio.timeout(20):
            while await store.notifications.list("DUE"):
                await asyncio.sleep(0.05)
        rows = await store.notifications.list(limit=1000)
        broken = [record.name for record in store.plugins.records if record.error]

    by_name: dict[str, set[str]] = {}
    for row in rows:
        by_name.setdefault(row.notifier, set()).add(row.status.value)
    fine = {f"good-{number}" for number in range(4)} | {"garbage-0", "garbage-1"}
    assert {name for name, found in by_name.items() if found == {"DELIVERED"}} == fine
    assert {name for name, found in by_name.items() if found == {"DEAD"}} == by_name.keys() - fine
    assert len(by_name) == 13
    for each in good:
        assert len({notice.delivery_id for notice in each.taken}) == len(each.taken) == 2 * ASKED
    assert {"broken-0", "broken-1"} <= set(broken)
    assert [each.taken for each in plugins[-2:]] == [[], []]
