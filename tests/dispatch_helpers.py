"""Notifiers of every temper, and a dispatcher that leaves no thread behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from agent_gateway_store import Notice, hookimpl
from agent_gateway_store.hooks.dispatch import DeliveryReport, Dispatcher
from agent_gateway_store.hooks.executor import GRACE_SECONDS
from agent_gateway_store.hooks.manager import LOAD_VARIABLE, Plugins
from agent_gateway_store.settings import StoreSettings

TIMEOUT = 0.2
BOUND = TIMEOUT + GRACE_SECONDS + 2
"""A bounded wait, with room for a busy machine."""


class Recorder:
    """Keeps what it receives, by which method, and in which thread."""

    def __init__(self, name: str = "recorder") -> None:
        self.name = name
        self.received: list[tuple[str, Notice]] = []
        self.threads: list[threading.Thread] = []

    async def notify_pending(self, notice: Notice) -> None:
        await self.receive("pending", notice)

    async def notify_decision(self, notice: Notice) -> None:
        await self.receive("decision", notice)

    async def receive(self, event: str, notice: Notice) -> None:
        """Keep it."""
        self.received.append((event, notice))
        self.threads.append(threading.current_thread())


class Doing(Recorder):
    """Does what it was made with; may be async."""

    def __init__(self, name: str, action: Callable[[], Any]) -> None:
        super().__init__(name)
        self.action = action

    async def receive(self, event: str, notice: Notice) -> None:
        await super().receive(event, notice)
        result = self.action()
        if asyncio.iscoroutine(result):
            await result


class Blocker(Doing):
    """Blocks its thread until it is released."""

    def __init__(self, name: str = "blocker") -> None:
        self.release = threading.Event()
        super().__init__(name, lambda: self.release.wait(20))


class Listener:
    """Receives every notice by the event hook, and does what it was made with."""

    def __init__(self, name: str, action: Callable[[], Any] = lambda: None) -> None:
        self.name = name
        self.action = action
        self.received: list[Notice] = []

    @hookimpl
    def gateway_store_approval_event(self, notice: Notice) -> Any:
        self.received.append(notice)
        return self.action()


async def until_called(recorder: Recorder) -> None:
    """Wait until a notifier was called."""
    async with asyncio.timeout(10):
        while not recorder.received:
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
