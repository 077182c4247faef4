"""Twenty plugins, of which half misbehave in every hook in a way of their own: the other half, and the store, work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

import plugin_helpers
from agent_gateway_store import ApprovalRequest, AuditEvent, GatewayStore, ToolCall, WriteOutcome, hookimpl
from agent_gateway_store.hooks.loading import LOAD_VARIABLE
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.testing import RecordingNotifier
from builders import make_event
from plugin_helpers import Install

pytestmark = pytest.mark.unit

install = plugin_helpers.install

GOOD = 10


class Good(RecordingNotifier):
    """Implements every hook, and keeps what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.events: list[str] = []
        self.written: list[str] = []
        self.asked: list[str] = []

    @hookimpl
    def gateway_store_register_notifiers(self) -> list[Good]:
        return [self]

    @hookimpl
    def gateway_store_approval_event(self, notice: Any) -> None:
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
    def gateway_store_approval_event(self, notice: Any) -> Any:
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


async def test_half_of_twenty_misbehave_and_the_other_half_work(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every good plugin is asked, told and heard; every write and decision stands; closing takes a bounded time."""
    released = threading.Event()
    install("unimportable", "raise ImportError('no')")
    install("taken-1", entry="taken")
    install("taken-2", entry="taken")
    monkeypatch.setenv(LOAD_VARIABLE, "unimportable,taken")
    bad = [
        Bad("raises", lambda: 1 / 0),
        Bad("exits", lambda: exec("raise SystemExit(3)")),
        Bad("hangs", lambda: asyncio.sleep(60)),
        Bad("blocks", lambda: released.wait(20)),
        Bad("garbage", lambda: {"not": ["what", "was", "asked"]}),
        Bad("interrupts", lambda: exec("raise KeyboardInterrupt")),
        Unbuildable,
    ]
    good = [Good(f"good-{index}") for index in range(GOOD)]
    plugins = [each for pair in zip(good, [*bad, *[None] * 3], strict=True) for each in pair if each is not None]
    settings = StoreSettings(plugin_timeout_seconds=1)
    try:
        async with asyncio.timeout(60):
            async with GatewayStore("sqlite:///gateway.db", redis_url="", settings=settings, plugins=plugins) as store:
                assert (
                    len([each for each in store.plugins.records if each.name not in ("log", "webhook", "slack")]) >= 20
                )
                writes = [store.audit.write(make_event(request_id=f"r-{index}")) for index in range(5)]
                outcomes = await asyncio.gather(*writes)
                call = ToolCall(server="files", tool="delete_file")
                token = await store.approvals.issue_token(
                    ApprovalRequest(request_id="r", caller_id="dev", tool_call=call, risk_explanation="Deletes.")
                )
                decided = await store.approvals.approve(token, "approver-1")
                for plugin in good:
                    await plugin.wait_for(2, timeout_s=20)
                stored = await store.audit.get_by_request_id("r-4")
                counters = store.audit.counters
                states = {record.name: record.state for record in store.plugins.records}
    finally:
        released.set()

    assert outcomes == [WriteOutcome.STORED] * 5
    assert (counters.stored, counters.withheld) == (5, 5)
    assert decided.status == "APPROVED"
    assert stored is not None
    assert stored.risk_labels == [plugin.name for plugin in good]
    for plugin in good:
        assert {notice.event for notice in plugin.notices} == {"pending", "decision"}
        assert sorted(plugin.events) == ["decision", "pending"]
        assert sorted(plugin.written) == [f"r-{index}" for index in range(5)]
        assert plugin.asked == ["APPROVED"]
        assert states[plugin.name] == "active"
    assert {states[name] for name in ("raises", "exits", "hangs", "blocks", "garbage", "Unbuildable")} == {"broken"}
    assert states["unimportable"] == "broken"
