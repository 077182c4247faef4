"""The way to one plugin: the thread in use, and those that have not come back."""

from __future__ import annotations

import asyncio
import threading

from agent_gateway_store.errors import PluginError
from agent_gateway_store.hooks.fault import Fault, fault_of
from agent_gateway_store.hooks.worker import Call, Worker

__all__ = ["MAX_ABANDONED", "Lane"]

MAX_ABANDONED = 3
"""How many threads of one plugin may be stuck before it is given no other."""

GRACE_SECONDS = 0.25
"""How long a cancelled call may take to give way before its thread counts as stuck."""


class Lane:
    """Runs the calls of one notifier, or of one plugin's hooks, apart from all others.

    The thread is started by the first call. A call that is over time and does not give way takes its thread out of use;
    the next call starts another, until `MAX_ABANDONED` are stuck. Then calls are refused at once, until one comes back.
    May be used from any thread and any event loop.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._abandoned: list[Worker] = []
        self._closed = False

    @property
    def abandoned(self) -> int:
        """How many threads have not come back."""
        with self._lock:
            return len(self._stuck())

    async def run(self, call: Call, timeout: float) -> Fault | None:
        """Run `call`; wait for it `timeout` seconds at most, and a quarter of a second for it to give way.

        Cancelling the wait cancels the call. Raises nothing else.

        Returns:
            None if it went well, else what went wrong.
        """
        try:
            with self._lock:
                worker = self._current()
                job = worker.submit(call)
        except Exception as exc:
            return Fault(str(exc)) if isinstance(exc, PluginError) else fault_of(exc)
        waiter = asyncio.wrap_future(job.ended)
        try:
            if (await asyncio.wait({waiter}, timeout=timeout))[0]:
                return waiter.result()
            job.cancel()
            if not (await asyncio.wait({waiter}, timeout=GRACE_SECONDS))[0]:
                self._abandon(worker)
            return Fault(f"TimeoutError: no answer within {timeout:g} seconds")
        finally:
            if not waiter.done():
                job.cancel()
                waiter.cancel()

    def stop(self) -> Worker | None:
        """Refuse further calls, cancel those under way, end the threads. Waits for nothing.

        Returns:
            The thread that is worth waiting for, if any.
        """
        with self._lock:
            self._closed = True
            worker, self._worker = self._worker, None
            for each in (worker, *self._abandoned):
                if each is not None:
                    each.stop()
            return worker

    def _current(self) -> Worker:
        if self._closed:
            raise PluginError("the dispatcher is closed", plugin=self.name)
        if self._worker is None:
            if (stuck := len(self._stuck())) >= MAX_ABANDONED:
                raise PluginError(f"still busy: {stuck} earlier calls have not come back", plugin=self.name)
            self._worker = Worker(self.name)
        return self._worker

    def _abandon(self, worker: Worker) -> None:
        with self._lock:
            if self._worker is worker:
                self._worker = None
                self._abandoned.append(worker)
                worker.retire()

    def _stuck(self) -> list[Worker]:
        self._abandoned = [worker for worker in self._abandoned if worker.alive]
        return self._abandoned
