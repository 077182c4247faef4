"""`SyncGatewayStore`: the same names, blocking, over an event loop in a thread of its own.

Works where a loop already runs (Jupyter), and can be called from several threads. The twin is made from the async
classes, so the two cannot grow apart; `sync.pyi` beside this file, generated from the same classes, tells type checkers
what comes out.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from functools import wraps
from types import TracebackType
from typing import Any, Self, TypeVar

from agent_gateway_store._concurrency import require_native_threads
from agent_gateway_store.approval import ApprovalManager
from agent_gateway_store.audit import AuditManager
from agent_gateway_store.audit.calls import RecordedCall, is_kind
from agent_gateway_store.delivery import NotificationManager
from agent_gateway_store.errors import StoreNotOpenError
from agent_gateway_store.evidence.manager import EvidenceManager
from agent_gateway_store.keys import KeyManager
from agent_gateway_store.retention import RetentionManager
from agent_gateway_store.shipping import SinkManager
from agent_gateway_store.storage.streaming import STREAM_CLOSED
from agent_gateway_store.store import GatewayStore

F = TypeVar("F", bound=Callable[..., Any])


class Portal:
    """The thread in which a store's event loop runs; shared by its organisation-bound views.

    anyio's `start_blocking_portal` is not used: it hangs the interpreter's exit where a store was left open, and itself
    where Ctrl-C comes while it begins.

    Attributes:
        lifecycle: Held while the store is opened or closed.
        starts: How many times it was started.
        due: Recorded calls whose event is still to be written.
    """

    def __init__(self) -> None:
        self.lifecycle = threading.RLock()
        self.starts = 0
        self.due: set[RecordedCall] = set()
        self._lock = threading.Lock()
        self._pid = 0
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event
        self._under_way: set[asyncio.Task[Any]] = set()

    @property
    def is_running(self) -> bool:
        """True once started; raises StoreNotOpenError if that was before a fork, which threads do not survive."""
        if self._loop is not None and self._pid != os.getpid():
            raise StoreNotOpenError("The store was opened in another process: open one in each process, after forking.")
        return self._loop is not None

    def start(self) -> bool:
        """Start the thread; False if it runs already."""
        if self.is_running:
            return False
        require_native_threads()
        ready: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._serve, args=(ready,), name="gateway-store sync", daemon=True)
        self._thread.start()
        self._loop, self._pid = ready.result(), os.getpid()
        self.starts += 1
        return True

    def _serve(self, ready: Future[asyncio.AbstractEventLoop]) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._until_end(ready))
        except BaseException as exc:
            # No loop could be made, for which `start` waits.
            if ready.done():
                raise
            ready.set_exception(exc)

    async def _until_end(self, ready: Future[asyncio.AbstractEventLoop]) -> None:
        self._end = asyncio.Event()
        ready.set_result(asyncio.get_running_loop())
        await self._end.wait()
        while self._under_way:
            await asyncio.wait(self._under_way)

    def stop(self) -> None:
        """Let calls under way end, then end the thread. Calls from now on raise StoreNotOpenError."""
        with self._lock:
            thread, loop, self._thread, self._loop = self._thread, self._loop, None, None
            if loop is not None:
                loop.call_soon_threadsafe(self._end.set)
        if thread is not None:
            thread.join()

    def submit(self, future: Future[Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Start a call in the event loop; what comes of it is that of `future`, which is returned."""
        if self.is_running:
            # Under the lock, so that nothing is handed to a loop that ends.
            with self._lock:
                if self._thread is threading.current_thread():
                    raise RuntimeError("The blocking store was called from its own thread: this would wait for itself.")
                if self._loop is not None:
                    # The loop makes the coroutine: here a signal's handler may raise before somebody awaits it.
                    self._loop.call_soon_threadsafe(self._begin, self._loop, future, function, args, kwargs)
                    return future
        raise StoreNotOpenError("The store is not open: use `with SyncGatewayStore() as store:` or `open()`.")

    def _begin(self, loop: asyncio.AbstractEventLoop, future: Future[Any], *call: Any) -> None:
        task = loop.create_task(self._run(*call))

        def end(_task: object) -> None:
            if task.cancelled():
                future.cancel()
            elif future.set_running_or_notify_cancel():
                error = task.exception()
                future.set_result(task.result()) if error is None else future.set_exception(error)

        task.add_done_callback(end)
        future.add_done_callback(lambda done: done.cancelled() and loop.call_soon_threadsafe(task.cancel))

    async def _run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        self._under_way.add(task)
        try:
            return await function(*args, **kwargs)
        finally:
            self._under_way.discard(task)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call in the event loop and wait; what it raises is raised here."""
        future = Future[Any]()
        try:
            return self.submit(future, function, *args, **kwargs).result()
        except BaseException:
            # Ctrl-C ends only the waiting of this thread, so the call itself is cancelled, too.
            future.cancel()
            raise


class _Twin:
    def __init__(self, twin: Any, portal: Portal) -> None:
        self._twin, self._portal = twin, portal


class _BlockingCall:
    """A `RecordedCall` whose tool runs in the thread of the caller."""

    def __init__(self, recorded: RecordedCall, portal: Portal) -> None:
        self._recorded, self._portal = recorded, portal
        self._is_due = False

    def __call__(self, tool: F) -> F:
        """Return `tool` as a function whose calls are recorded; TypeError if its calls only begin something."""
        if is_kind(tool, inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction):
            raise TypeError("The blocking store records calls of plain functions: take `GatewayStore` for async ones.")

        @_like(tool)
        def run(*args: Any, **kwargs: Any) -> Any:
            with _BlockingCall(self._recorded.anew(), self._portal):
                return tool(*args, **kwargs)

        return run

    def __enter__(self) -> Any:
        self._recorded.handled = sys.exc_info()[1]
        event = self._portal.call(self._recorded.__aenter__)
        # Else the collector could take the event before `__del__` writes it.
        self._portal.due.add(self._recorded)
        self._is_due = True
        return event

    def __exit__(self, *raised: Any) -> None:
        try:
            self._write(*raised)
        except BaseException:
            # The handler of a signal may raise before the loop has begun.
            if self._is_due:
                self._write(*raised)
            raise

    def __del__(self) -> None:
        # The same before the first line of `__exit__`. The collector may call this where nothing may wait; and a thread
        # that Python starts at its own end never begins, for which `start` waits.
        if self._is_due and not sys.is_finalizing():
            threading.Thread(target=self._write, args=(None, KeyboardInterrupt(), None)).start()

    def _write(self, *raised: Any) -> None:
        try:
            self._portal.submit(Future(), self._end, *raised).result()
        except StoreNotOpenError:
            # Its thread has ended: from another one the event is logged as LOST.
            other = Portal()
            other.start()
            try:
                other.submit(Future(), self._end, *raised).result()
            finally:
                other.stop()

    async def _end(self, *raised: Any) -> None:
        # It may be handed over twice.
        if self._is_due:
            self._is_due = False
            self._portal.due.discard(self._recorded)
            await self._recorded.__aexit__(*raised)


def _like(original: Callable[..., Any]) -> Callable[[F], F]:
    """Wrap as `functools.wraps` does; the function keeps its own type."""
    return wraps(original)  # type: ignore[return-value]


def _blocking(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(method):

        @_like(method)
        def iterate(self: Any, *args: Any, **kwargs: Any) -> Generator[Any]:
            items, starts = getattr(self._twin, name)(*args, **kwargs), self._portal.starts
            try:
                while True:
                    if self._portal.starts != starts:
                        # A loop that ends closes its generators, and this would look like the end of the stream.
                        raise StoreNotOpenError(STREAM_CLOSED)
                    try:
                        item = self._portal.call(items.__anext__)
                    except StopAsyncIteration:
                        return
                    yield item
            finally:
                if self._portal.is_running:
                    # A step that a signal has left behind still runs: its cancellation closes them.
                    with suppress(RuntimeError):
                        self._portal.call(items.aclose)

        return iterate

    if inspect.iscoroutinefunction(method):

        @_like(method)
        def block(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._portal.call(getattr(self._twin, name), *args, **kwargs)

        return block

    @_like(method)
    def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = getattr(self._twin, name)(*args, **kwargs)
        return _BlockingCall(made, self._portal) if isinstance(made, RecordedCall) else made

    return plain


_TWINS: dict[type[Any], type[Any]] = {}


def _forwarded(name: str, member: property) -> property:
    def get(self: Any) -> Any:
        value = getattr(self._twin, name)
        twin = _TWINS.get(type(value))
        return value if twin is None else twin(value, self._portal)

    return property(get, doc=member.__doc__)


def twin_of(cls: type[Any]) -> type[Any]:
    """Make the blocking twin of a class: its public methods, async ones and generators blocking, and properties."""
    members: dict[str, Any] = {"__doc__": cls.__doc__, "__module__": __name__}
    for name, member in inspect.getmembers(cls):
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            members[name] = _forwarded(name, member)
        elif inspect.isfunction(member):
            members[name] = _blocking(name, member)
    twin = _TWINS[cls] = type(f"Sync{cls.__name__}", (_Twin,), members)
    return twin


SyncAuditManager: Any = twin_of(AuditManager)
SyncApprovalManager: Any = twin_of(ApprovalManager)
SyncKeyManager: Any = twin_of(KeyManager)
SyncNotificationManager: Any = twin_of(NotificationManager)
SyncEvidenceManager: Any = twin_of(EvidenceManager)
SyncRetentionManager: Any = twin_of(RetentionManager)
SyncSinkManager: Any = twin_of(SinkManager)
_StoreTwin: Any = twin_of(GatewayStore)


class SyncGatewayStore(_StoreTwin):  # type: ignore[misc]  # made from the async class
    __doc__ = GatewayStore.__doc__

    @_like(GatewayStore.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(GatewayStore(*args, **kwargs), Portal())

    @property
    def settings(self) -> Any:
        """The settings in force."""
        return self._twin.settings

    @_like(GatewayStore.for_org)
    def for_org(self, org_id: str) -> SyncGatewayStore:
        return _OrganisationView(self._twin.for_org(org_id), self._portal)

    @_like(GatewayStore.open)
    def open(self) -> Self:
        with self._portal.lifecycle:
            is_new = self._portal.start()
            try:
                self._portal.call(self._twin.open)
            except BaseException:
                if is_new:
                    self._portal.stop()
                raise
        return self

    @_like(GatewayStore.close)
    def close(self) -> None:
        with self._portal.lifecycle:
            if self._portal.is_running:
                try:
                    # Not cancelled by Ctrl-C: a close that has begun goes on to its end, which is near.
                    self._portal.submit(Future(), self._twin.close).result()
                except BaseException:
                    # Ctrl-C may come before it begins.
                    self._portal.submit(Future(), self._twin.close)
                    raise
                finally:
                    self._portal.stop()

    @_like(GatewayStore.migrate)
    def migrate(self) -> None:
        with self._portal.lifecycle:
            is_new = self._portal.start()
            try:
                self._portal.call(self._twin.migrate)
            finally:
                if is_new:
                    self._portal.stop()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _OrganisationView(SyncGatewayStore):
    def __init__(self, store: GatewayStore, portal: Portal) -> None:
        _Twin.__init__(self, store, portal)
