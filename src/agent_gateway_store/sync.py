"""`SyncGatewayStore`: the same names, blocking, over an event loop in a thread of its own.

Works where a loop already runs (Jupyter), and can be called from several threads. The twin is made from the async
classes, so the two cannot grow apart; `sync.pyi` beside this file tells type checkers what comes out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial, wraps
from types import TracebackType
from typing import Any, Self

from anyio.from_thread import BlockingPortal, start_blocking_portal

from agent_gateway_store.approval import ApprovalManager
from agent_gateway_store.audit import AuditLog
from agent_gateway_store.errors import StoreNotOpenError
from agent_gateway_store.keys import KeyManager
from agent_gateway_store.store import GatewayStore

__all__ = ["SyncGatewayStore"]


class _Portal:
    """The thread in which one store's event loop runs."""

    def __init__(self) -> None:
        self._manager: AbstractContextManager[BlockingPortal] | None = None
        self._portal: BlockingPortal | None = None

    @property
    def is_running(self) -> bool:
        return self._portal is not None

    def start(self) -> None:
        if self._portal is None:
            self._manager = start_blocking_portal()
            self._portal = self._manager.__enter__()

    def stop(self) -> None:
        if self._manager is not None:
            manager, self._manager, self._portal = self._manager, None, None
            manager.__exit__(None, None, None)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._portal is None:
            raise StoreNotOpenError("The store is not open: use `with SyncGatewayStore() as store:` or `open()`.")
        return self._portal.call(partial(function, *args, **kwargs))


class _Twin:
    def __init__(self, twin: Any, portal: _Portal) -> None:
        self._twin, self._portal = twin, portal


def _blocking(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(method):

        @wraps(method)
        def iterate(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
            items = getattr(self._twin, name)(*args, **kwargs)
            try:
                while True:
                    try:
                        yield self._portal.call(items.__anext__)
                    except StopAsyncIteration:
                        return
            finally:
                self._portal.call(items.aclose)

        return iterate

    if inspect.iscoroutinefunction(method):

        @wraps(method)
        def block(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._portal.call(getattr(self._twin, name), *args, **kwargs)

        return block

    @wraps(method)
    def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._twin, name)(*args, **kwargs)

    return plain


def _forwarded(name: str, member: property) -> property:
    def get(self: Any) -> Any:
        return getattr(self._twin, name)

    return property(get, doc=member.__doc__)


def _twin_of(cls: type[Any]) -> type[Any]:
    members: dict[str, Any] = {"__doc__": cls.__doc__, "__module__": __name__}
    for name, member in inspect.getmembers(cls):
        if name.startswith("_") or isinstance(inspect.getattr_static(cls, name), classmethod):
            continue
        if isinstance(member, property):
            members[name] = _forwarded(name, member)
        elif inspect.isfunction(member):
            members[name] = _blocking(name, member)
    return type(f"Sync{cls.__name__}", (_Twin,), members)


SyncAuditLog = _twin_of(AuditLog)
SyncApprovalManager = _twin_of(ApprovalManager)
SyncKeyManager = _twin_of(KeyManager)


class SyncGatewayStore:
    __doc__ = GatewayStore.__doc__

    @wraps(GatewayStore.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._store = GatewayStore(*args, **kwargs)
        self._portal = _Portal()
        self._bind()

    def _bind(self) -> None:
        self.audit = SyncAuditLog(self._store.audit, self._portal)
        self.approvals = SyncApprovalManager(self._store.approvals, self._portal)
        self.keys = SyncKeyManager(self._store.keys, self._portal)

    @property
    def settings(self) -> Any:
        return self._store.settings

    @property
    def plugins(self) -> Any:
        return self._store.plugins

    @property
    def database(self) -> Any:
        return self._store.database

    @property
    def org_id(self) -> str | None:
        return self._store.org_id

    @wraps(GatewayStore.for_org)
    def for_org(self, org_id: str) -> SyncGatewayStore:
        view = object.__new__(SyncGatewayStore)
        view._store, view._portal = self._store.for_org(org_id), self._portal
        view._bind()
        return view

    @wraps(GatewayStore.open)
    def open(self) -> Self:
        self._portal.start()
        try:
            self._portal.call(self._store.open)
        except BaseException:
            self._portal.stop()
            raise
        return self

    @wraps(GatewayStore.close)
    def close(self) -> None:
        if self._portal.is_running:
            try:
                self._portal.call(self._store.close)
            finally:
                self._portal.stop()

    @wraps(GatewayStore.migrate)
    def migrate(self) -> None:
        was_running = self._portal.is_running
        self._portal.start()
        try:
            self._portal.call(self._store.migrate)
        finally:
            if not was_running:
                self._portal.stop()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
