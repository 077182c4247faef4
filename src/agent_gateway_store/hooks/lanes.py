"""Hook calls that are answered, each plugin in a thread of its own."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from agent_gateway_store.hooks.fault import Fault
from agent_gateway_store.hooks.lane import Lane
from agent_gateway_store.hooks.threads import in_thread
from agent_gateway_store.hooks.worker import Call

__all__ = ["Answer", "Lanes", "gathered"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What one call came to.

    Attributes:
        value: What it returned; None if it failed.
        error: What went wrong, on one line, secrets masked; None if nothing did.
    """

    value: T | None
    error: str | None


class Lanes:
    """The lanes of a store's hooks: one for each kind of call and plugin, started by its first call.

    No plugin can stall the caller, another plugin, or its own other hooks. May be used from any event loop.

    Args:
        timeout_s: Longest wait for one call, plus a quarter of a second to give way.
        reopens: False refuses the calls that come after `close`; True starts new lanes for them.
    """

    def __init__(self, timeout_s: float, *, reopens: bool = True) -> None:
        self.timeout_s = timeout_s
        self._reopens = reopens
        self._is_closed = False
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._lock = threading.Lock()

    @property
    def abandoned(self) -> dict[str, int]:
        """How many threads have not come back, by plugin name; those without any are left out."""
        with self._lock:
            lanes = list(self._lanes.items())
        counts: Counter[str] = Counter()
        for (_kind, name), lane in lanes:
            counts[name] += lane.abandoned
        return dict(+counts)

    async def ask(self, kind: str, name: str, call: Callable[[], Awaitable[T]]) -> Answer[T]:
        """Run `call` in the plugin's thread for this kind of call. Raises nothing; cancelling it cancels the call.

        Args:
            kind: Which hook.
            name: Name of the plugin.
            call: Runs the plugin's code, copying included.
        """
        values: list[T] = []

        async def keep() -> None:
            values.append(await call())

        fault = await self.run(kind, name, keep)
        if fault is not None:
            return Answer(None, fault.text)
        return Answer(values[0], None) if values else Answer(None, "it returned nothing")

    async def run(self, kind: str, name: str, call: Call) -> Fault | None:
        """Do as `ask` with a call that answers nothing. Returns what went wrong; None if nothing did."""
        with self._lock:
            lane = self._lanes.setdefault((kind, name), Lane(name))
            if self._is_closed:
                lane.stop()
        return await lane.run(call, self.timeout_s)

    def close(self, timeout: float = 1.0) -> None:
        """End the threads; calls under way are cancelled.

        Args:
            timeout: Seconds to wait for them in all. A thread that is blocked is left behind: it is a daemon.
        """
        with self._lock:
            lanes = list(self._lanes.values())
            if self._reopens:
                self._lanes = {}
            else:
                self._is_closed = True
        deadline = time.monotonic() + timeout
        for worker in [worker for lane in lanes if (worker := lane.stop())]:
            worker.join(max(0.0, deadline - time.monotonic()))

    async def aclose(self, timeout: float = 1.0) -> None:
        """Do as `close`, without blocking the event loop."""
        if self._lanes or not self._reopens:
            await asyncio.wrap_future(in_thread(lambda: self.close(timeout), name="gateway-store close"))


async def gathered(results: list[object]) -> list[object]:
    """Return what the implementations of one plugin answered, coroutines awaited."""
    return [await result if inspect.isawaitable(result) else result for result in results]
