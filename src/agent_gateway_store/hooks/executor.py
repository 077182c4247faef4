"""Runs plugin code in daemon threads, each with its own event loop, so that no plugin can stall the rest."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

from agent_gateway_store._text import describe, escape
from agent_gateway_store.errors import NotDeliveredError

P = ParamSpec("P")
T = TypeVar("T")

# Chosen: how many threads of one hook of one plugin may be stuck before it gets no other. A plugin may hang now and
# then, but one that always hangs must not use up the threads of the process.
MAX_ABANDONED = 3
# Chosen: how long a cancelled call may take to end before its thread counts as stuck; enough to close a connection.
GRACE_SECONDS = 0.25
# The most that the default executor of asyncio has (min(32, cores + 4)).
_BUSY_THREADS = 32
# As long as `close` waits for the threads by default.
_LAST_TASKS_SECONDS = 1.0

logger = logging.getLogger("agent_gateway_store.hooks")


@dataclass(frozen=True, slots=True)
class PluginFailure:
    """Why the call of a plugin failed.

    Attributes:
        text: One line of at most 500 characters, secrets masked.
        retry_after_s: Seconds to wait before the next attempt, as the plugin asks; None if it does not say.
        is_permanent: True if the plugin says that no further attempt can help.
    """

    text: str
    retry_after_s: float | None = None
    is_permanent: bool = False

    @classmethod
    def of(cls, error: BaseException) -> PluginFailure:
        """Return the failure that `error` is; a `retry_after_s` that is not a number of seconds counts as None."""
        if not isinstance(error, NotDeliveredError):
            return cls(describe(error))
        return cls(describe(error), _seconds(error.retry_after_s), error.is_permanent is True)


_CANCELLED = PluginFailure("cancelled")
_CLOSED = PluginFailure("the dispatcher was closed before it was done")

_Key: TypeAlias = tuple[str, str]


class PluginExecutor:
    """Runs the calls of plugins: one thread for each hook of each plugin, started by its first call.

    No plugin can stall the caller, another plugin, or its own other hooks. A thread whose call neither ends in time nor
    after its cancellation is abandoned; the next call starts another, until `MAX_ABANDONED` are stuck. Then calls fail
    at once, until one of them has ended. May be used from any thread and any event loop, and again after `close`.

    Args:
        timeout_s: Longest wait for one call, in seconds; a cancelled one may take `GRACE_SECONDS` more.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._threads: dict[_Key, PluginThread] = {}
        self._abandoned: list[tuple[_Key, PluginThread]] = []

    async def run(self, hook: str, name: str, function: Callable[[], Awaitable[T]]) -> T | PluginFailure:
        """Run `function` in the thread that the plugin has for this hook. Cancelling the wait cancels the call.

        Args:
            hook: The hook, which has a thread for each plugin.
            name: Name of the plugin or notifier.
            function: Runs the plugin's code, copying included.

        Returns:
            What it returned, or its failure. Raises nothing.
        """
        key = hook, name
        with self._lock:
            thread = self._thread(key)
            if isinstance(thread, PluginFailure):
                return thread
            call = thread.submit(function)
        result = call.result
        try:
            if (await asyncio.wait({result}, timeout=self.timeout_s))[0]:
                return result.result()
            thread.cancel(call)
            if not (await asyncio.wait({result}, timeout=GRACE_SECONDS))[0]:
                self._abandon(key, thread)
            return PluginFailure(f"TimeoutError: no answer within {self.timeout_s:g} seconds")
        finally:
            if not result.done():
                thread.cancel(call)
                result.cancel()

    def close(self, timeout_s: float = 1.0) -> None:
        """Cancel the calls under way and end the threads.

        Args:
            timeout_s: Seconds to wait for all of them. A thread that is blocked goes on: it is a daemon.
        """
        with self._lock:
            threads, self._threads = list(self._threads.values()), {}
            abandoned, self._abandoned = self._abandoned, []
            for thread in (*threads, *(thread for _key, thread in abandoned)):
                thread.stop()
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    async def aclose(self, timeout_s: float = 1.0) -> None:
        """Close as `close` does, without blocking the event loop."""
        if self._threads or self._abandoned:
            await asyncio.wrap_future(run_in_thread(lambda: self.close(timeout_s), name="gateway-store close"))

    def _thread(self, key: _Key) -> PluginThread | PluginFailure:
        if (thread := self._threads.get(key)) is not None and not thread.has_ended:
            return thread
        self._abandoned = [(other, thread) for other, thread in self._abandoned if thread.is_alive]
        if (stuck := [other for other, _thread in self._abandoned].count(key)) >= MAX_ABANDONED:
            return PluginFailure(f"still busy: {stuck} earlier calls have not come back")
        try:
            thread = self._threads[key] = PluginThread(key[1])
        except Exception as exc:
            # The process can start no more threads, or open no more files.
            return PluginFailure.of(exc)
        return thread

    def _abandon(self, key: _Key, thread: PluginThread) -> None:
        with self._lock:
            if self._threads.get(key) is thread:
                del self._threads[key]
                self._abandoned.append((key, thread))
                thread.retire()


@dataclass(eq=False, slots=True)
class _Call(Generic[T]):
    """One call in a thread. Its result belongs to the caller's event loop, and is never an exception."""

    function: Callable[[], Awaitable[T]]
    result: asyncio.Future[T | PluginFailure] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    task: asyncio.Task[T | PluginFailure] | None = None
    is_withdrawn: bool = False

    def end(self, result: object) -> None:
        """Hand the result to the caller, in whichever thread this is."""
        # RuntimeError: the caller's loop is closed, so nobody waits any more.
        with contextlib.suppress(RuntimeError):
            self.result.get_loop().call_soon_threadsafe(_set_result, self.result, result)


class PluginThread:
    """Runs calls side by side in one event loop in one daemon thread, which it starts at once.

    The lock of the executor keeps `submit` from running during or after `retire` and `stop`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: set[_Call[Any]] = set()
        self._is_retired = self._is_stopped = self._is_ending = False
        # Once the thread has ended: the result of the calls that it did not end.
        self._end_result: PluginFailure | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"gateway-store {name}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._loop.close()
            raise

    @property
    def is_alive(self) -> bool:
        """False once the thread has ended."""
        return self._thread.is_alive()

    @property
    def has_ended(self) -> bool:
        """True once it runs no more calls, by itself if its event loop broke."""
        return self._end_result is not None

    def submit(self, function: Callable[[], Awaitable[T]]) -> _Call[T]:
        """Begin a call as soon as the thread is free."""
        call = _Call(function)
        self._calls.add(call)
        self._soon(partial(self._begin, call))
        # In this order, so that a call which is added while the thread ends is ended here or there.
        if self._end_result is not None:
            self._end_all(self._end_result)
        return call

    def cancel(self, call: _Call[Any]) -> None:
        """Cancel a call; one that blocks the thread, or ignores its cancellation, goes on."""
        call.is_withdrawn = True
        self._soon(lambda: call.task and call.task.cancel())

    def retire(self) -> None:
        """Let the thread end by itself once its calls have ended."""
        self._is_retired = True
        self._soon(self._stop_if_done)

    def stop(self) -> None:
        """Cancel every call and end the thread, without waiting for it."""
        self._is_stopped = True
        self._soon(self._stop_if_done)

    def join(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` seconds for the thread to end."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _soon(self, callback: Callable[[], object]) -> None:
        # RuntimeError: the thread has ended and closed its loop.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def _begin(self, call: _Call[Any]) -> None:
        call.task = self._loop.create_task(_perform(call))
        call.task.add_done_callback(lambda task: self._end(call, _CANCELLED if task.cancelled() else task.result()))

    def _end(self, call: _Call[Any], result: object) -> None:
        call.end(_CLOSED if self._is_stopped and isinstance(result, PluginFailure) else result)
        self._calls.discard(call)
        self._stop_if_done()

    def _end_all(self, result: PluginFailure) -> None:
        for call in tuple(self._calls):
            call.end(result)

    def _stop_if_done(self) -> None:
        if self._is_done and not self._is_ending:
            self._loop.stop()

    @property
    def _is_done(self) -> bool:
        return self._is_stopped or (self._is_retired and not self._calls)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_default_executor(_DaemonExecutor(self._thread.name))
        self._loop.set_exception_handler(self._log_stray)
        result = _CLOSED
        while not self._is_done:
            # A SystemExit in a callback, or a plugin that calls `loop.stop()`, ends `run_forever` but not the thread.
            try:
                self._loop.run_forever()
            except (KeyboardInterrupt, SystemExit) as exc:
                logger.warning("Plugin %s: stray error in its event loop: %s", escape(self._name), describe(exc))
            except BaseException as exc:
                # No callback lets another error through, so the loop itself is broken: it would raise at once again.
                result = PluginFailure(f"its event loop broke: {describe(exc)}")
                logger.warning("Plugin %s: %s", escape(self._name), result.text)
                break
        self._is_ending = True
        with contextlib.suppress(BaseException):
            if result is _CLOSED:
                self._loop.run_until_complete(_end_tasks())
        with contextlib.suppress(BaseException):
            self._loop.close()
        self._end_result = result
        self._end_all(result)

    def _log_stray(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        text = describe(error) if isinstance(error, BaseException) else escape(str(context.get("message")))
        logger.warning("Plugin %s: stray error in its event loop: %s", escape(self._name), text)


class _DaemonExecutor(ThreadPoolExecutor):
    """The executor of a plugin's event loop, for `asyncio.to_thread` and name look-ups.

    Python joins the threads of a standard executor at exit, so one call that never returns would keep the process
    alive. Here each call has a daemon thread; while too many are busy, further calls are refused.
    """

    def __init__(self, name: str) -> None:
        super().__init__(max_workers=1)
        self._name = name
        self._room = threading.Semaphore(_BUSY_THREADS)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start `fn` at once. Raises RuntimeError if too many calls are still busy."""
        if not self._room.acquire(blocking=False):
            raise RuntimeError(f"{_BUSY_THREADS} threads of this plugin are still busy")

        def run() -> T:
            try:
                return fn(*args, **kwargs)
            finally:
                self._room.release()

        try:
            return run_in_thread(run, name=self._name)
        except BaseException:
            self._room.release()
            raise


def run_in_thread(function: Callable[[], T], *, name: str) -> Future[T]:
    """Run `function` in a new daemon thread, which cannot delay the exit of the process.

    The future holds what it returned or raised, and cannot be cancelled.

    Raises:
        RuntimeError: The process can start no more threads.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = function()
        except BaseException as exc:
            future.set_exception(exc)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def ask_plugins(asked: Mapping[str, Callable[[], T]], timeout_s: float) -> Iterator[tuple[str, T | BaseException]]:
    """Call a function for each plugin, by name, side by side in threads; yield what each returned, or why it did not.

    Together they have `timeout_s` seconds. Raises nothing of theirs: a KeyboardInterrupt is one of the caller's thread.
    """
    deadline = time.monotonic() + timeout_s
    futures: dict[str, Future[T]] = {}
    for name, function in asked.items():
        try:
            futures[name] = run_in_thread(function, name=f"gateway-store {name}")
        except RuntimeError as exc:
            yield name, exc
    for name, future in futures.items():
        try:
            error = future.exception(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            error = TimeoutError(f"no answer within {timeout_s:g} seconds")
        yield name, future.result() if error is None else error


async def awaited(results: list[object]) -> list[object]:
    """Return what the implementations of one plugin returned, coroutines awaited one after the other."""
    return [await result if inspect.isawaitable(result) else result for result in results]


def _set_result(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


async def _perform(call: _Call[T]) -> T | PluginFailure:
    try:
        # Its cancellation may be queued after this.
        if not call.is_withdrawn:
            return await call.function()
    except BaseException as exc:
        # SystemExit included, which would end the loop.
        return PluginFailure.of(exc)
    return _CANCELLED


async def _end_tasks() -> None:
    """Cancel every task of the running loop and wait up to two seconds for them, before the loop is closed."""
    loop = asyncio.get_running_loop()
    if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=_LAST_TASKS_SECONDS)
    await asyncio.wait_for(loop.shutdown_asyncgens(), _LAST_TASKS_SECONDS)


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        seconds = float(value)
    except OverflowError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
