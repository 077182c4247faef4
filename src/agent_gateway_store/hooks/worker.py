"""A daemon thread with an event loop of its own, in which plugin code runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from typing import Any

from agent_gateway_store.hooks.fault import Fault, fault_of
from agent_gateway_store.hooks.text import describe, one_line
from agent_gateway_store.hooks.threads import DaemonExecutor, wind_up

__all__ = ["Call", "Job", "Worker"]

logger = logging.getLogger("agent_gateway_store.hooks")

Call = Callable[[], Coroutine[Any, Any, None]]

_CANCELLED = Fault("cancelled")
_CLOSED = Fault("the dispatcher was closed before it was done")


class Job:
    """One call handed to a worker.

    Attributes:
        worker: Where it runs.
        ended: None if it went well, else what went wrong. Never an exception.
    """

    def __init__(self, worker: Worker, call: Call) -> None:
        self.worker = worker
        self.call = call
        self.ended: Future[Fault | None] = Future()
        self.task: asyncio.Task[Fault | None] | None = None
        self.given_up = False

    def cancel(self) -> None:
        """Ask it to stop: a call that blocks its thread, or swallows the request, does not."""
        self.given_up = True
        self.worker.soon(lambda: self.task and self.task.cancel())


class Worker:
    """Runs calls side by side in one event loop in one daemon thread. Starts the thread at once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._jobs: set[Job] = set()
        self._retired = self._stopped = self._winding_up = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"gateway-store {name}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._loop.close()
            raise

    @property
    def alive(self) -> bool:
        """False once the thread has ended."""
        return self._thread.is_alive()

    def submit(self, call: Call) -> Job:
        """Begin `call` as soon as the thread is free. The caller keeps `submit` and `retire` apart by a lock."""
        job = Job(self, call)
        with self._lock:
            self._jobs.add(job)
        self.soon(lambda: self._begin(job))
        return job

    def retire(self) -> None:
        """Take leave of it: the thread ends by itself once its calls have ended."""
        self._retired = True
        self.soon(self._stop_if_done)

    def stop(self) -> None:
        """Cancel every call and end the thread, without waiting for it."""
        self._stopped = True
        self.soon(self._stop_if_done)

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for the thread to end."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def soon(self, callback: Callable[[], object]) -> None:
        """Run `callback` in the worker's loop; do nothing if that is closed."""
        with self._lock:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(callback)

    def _begin(self, job: Job) -> None:
        if job.ended.set_running_or_notify_cancel():
            job.task = self._loop.create_task(_outcome(job))
            job.task.add_done_callback(lambda task: self._end(job, _CANCELLED if task.cancelled() else task.result()))
        else:
            self._end(job, None)

    def _end(self, job: Job, outcome: Fault | None) -> None:
        if self._stopped and outcome is not None:
            outcome = _CLOSED
        with contextlib.suppress(InvalidStateError):
            job.ended.set_result(outcome)
        with self._lock:
            self._jobs.discard(job)
        self._stop_if_done()

    def _stop_if_done(self) -> None:
        if self._done() and not self._winding_up:
            self._loop.stop()

    def _done(self) -> bool:
        return self._stopped or (self._retired and not self._jobs)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_default_executor(DaemonExecutor(self._thread.name))
        self._loop.set_exception_handler(self._log_stray)
        while not self._done():
            # A stray SystemExit, or a plugin that calls loop.stop(), gets out of here and must not end the thread.
            try:
                self._loop.run_forever()
            except BaseException as exc:
                logger.warning("Plugin %s: stray error in its event loop: %s", one_line(self._name), describe(exc))
        self._winding_up = True
        with contextlib.suppress(BaseException):
            self._loop.run_until_complete(wind_up())
        with self._lock:
            self._loop.close()
        for job in self._jobs:
            with contextlib.suppress(InvalidStateError):
                job.ended.set_result(_CLOSED)

    def _log_stray(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        text = describe(error) if isinstance(error, BaseException) else one_line(str(context.get("message")))
        logger.warning("Plugin %s: stray error in its event loop: %s", one_line(self._name), text)


async def _outcome(job: Job) -> Fault | None:
    try:
        if not job.given_up:  # its cancellation may be queued behind this
            await job.call()
    except BaseException as exc:  # SystemExit included: it would end the loop
        return fault_of(exc)
    return None
