"""Notices, notifiers of every temper, and a dispatcher that leaves no thread behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import uuid4

from agent_gateway_store.hooks import DeliveryReport, Dispatcher, Plugins
from agent_gateway_store.hooks.lane import GRACE_SECONDS
from agent_gateway_store.hooks.loading import LOAD_VARIABLE
from agent_gateway_store.models.values import ApprovalStatus, Notice, ToolCall
from agent_gateway_store.settings import StoreSettings

TIMEOUT = 0.2
BOUND = TIMEOUT + GRACE_SECONDS + 2
"""A bounded wait, with room for a busy machine."""


def make_notice(event: Literal["pending", "decision"] = "pending", **fields: Any) -> Notice:
    """Build a notice."""
    return Notice(
        event=event,
        delivery_id=uuid4(),
        approval_id=uuid4(),
        org_id="default",
        request_id="r-1",
        caller_id="dev-agent",
        tool_call=ToolCall(server="files", tool="delete", arguments={"path": ["/tmp/x"]}),
        risk_explanation="deletes a file",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        status=ApprovalStatus.PENDING if event == "pending" else ApprovalStatus.APPROVED,
        **fields,
    )


class Recorder:
    """Keeps what it is told, and in which thread."""

    def __init__(self, name: str = "recorder") -> None:
        self.name = name
        self.heard: list[tuple[str, Notice]] = []
        self.threads: list[threading.Thread] = []

    async def notify_pending(self, notice: Notice) -> None:
        await self.hear("pending", notice)

    async def notify_decision(self, notice: Notice) -> None:
        await self.hear("decision", notice)

    async def hear(self, event: str, notice: Notice) -> None:
        """Keep it."""
        self.heard.append((event, notice))
        self.threads.append(threading.current_thread())


class Doing(Recorder):
    """Does what it was made with; may be async."""

    def __init__(self, name: str, action: Callable[[], Any]) -> None:
        super().__init__(name)
        self.action = action

    async def hear(self, event: str, notice: Notice) -> None:
        await super().hear(event, notice)
        result = self.action()
        if asyncio.iscoroutine(result):
            await result


class Blocker(Doing):
    """Blocks its thread until it is released."""

    def __init__(self, name: str = "blocker") -> None:
        self.release = threading.Event()
        super().__init__(name, lambda: self.release.wait(20))


async def until_heard(recorder: Recorder) -> None:
    """Wait until a notifier was called."""
    async with asyncio.timeout(10):
        while not recorder.heard:
            await asyncio.sleep(0.005)


def raising(error: BaseException) -> Callable[[], None]:
    """Return a function that raises `error`."""

    def action() -> None:
        raise error

    return action


async def stubborn() -> None:
    """Swallow the first cancellation."""
    try:
        await asyncio.sleep(20)
    except asyncio.CancelledError:
        await asyncio.sleep(20)


@contextmanager
def dispatching(*given: object, timeout: float = TIMEOUT) -> Iterator[Dispatcher]:
    """Dispatch to these only; close in the end, and leave no thread behind."""
    before = set(threading.enumerate())
    dispatcher = Dispatcher(Plugins(given, environ={LOAD_VARIABLE: ""}), StoreSettings(plugin_timeout_seconds=timeout))
    try:
        yield dispatcher
    finally:
        for plugin in given:
            if isinstance(plugin, Blocker):
                plugin.release.set()
        dispatcher.close(5)
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith("gateway-store"):
                thread.join(5)
                assert not thread.is_alive()
        gc.collect()


def by_name(reports: list[DeliveryReport]) -> dict[str, DeliveryReport]:
    """Index reports by notifier."""
    return {report.notifier: report for report in reports}
