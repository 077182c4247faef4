"""Daemon threads for plugin code: one that never returns cannot hold up the exit of the process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

__all__ = ["DaemonExecutor", "in_thread", "wind_up"]

P = ParamSpec("P")
T = TypeVar("T")

MAX_THREADS = 32
WIND_UP_SECONDS = 1.0


def in_thread(function: Callable[[], T], *, name: str) -> Future[T]:
    """Run `function` in a new daemon thread.

    Args:
        function: What to run. Whatever it raises ends up in the future.
        name: Name of the thread.

    Returns:
        Its outcome. It cannot be cancelled.

    Raises:
        RuntimeError: If the process can start no more threads.
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


class DaemonExecutor(ThreadPoolExecutor):
    """Executor of a plugin's event loop: `asyncio.to_thread` and name look-ups go through it.

    The standard one is joined at exit, so one call that never returns would keep the process alive. Here each call has
    a daemon thread. With 32 of them busy, further calls are refused.
    """

    def __init__(self, name: str) -> None:
        super().__init__(max_workers=1)
        self._name = name
        self._room = threading.Semaphore(MAX_THREADS)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start `fn` at once. Raises RuntimeError if too many calls have not come back."""
        if not self._room.acquire(blocking=False):
            raise RuntimeError(f"{MAX_THREADS} threads of this plugin are still busy")

        def run() -> T:
            try:
                return fn(*args, **kwargs)
            finally:
                self._room.release()

        try:
            return in_thread(run, name=self._name)
        except BaseException:
            self._room.release()
            raise


async def wind_up() -> None:
    """Cancel every task of the running loop and wait a second or two for them, before the loop is closed."""
    loop = asyncio.get_running_loop()
    if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=WIND_UP_SECONDS)
    await asyncio.wait_for(loop.shutdown_asyncgens(), WIND_UP_SECONDS)
