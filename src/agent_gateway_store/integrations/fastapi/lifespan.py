"""One store for the whole life of an application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from starlette.requests import HTTPConnection

from agent_gateway_store.errors import StoreNotOpenError
from agent_gateway_store.store import GatewayStore

_NAME = "agent_gateway_store"

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]


def lifespan(store: GatewayStore | None = None, *, inner: Lifespan | None = None) -> Lifespan:
    """Return a lifespan for `FastAPI(lifespan=...)` that keeps one store open while the application runs.

    Each worker process opens its own. The store is closed after the response to the last request, and writes out its
    audit log.

    Args:
        store: Opened at start-up and closed at the end; None makes `GatewayStore()` from the environment.
        inner: The application's own lifespan. It starts once the store is open and ends before the store is closed;
            the state that it yields is passed on.

    Raises:
        GatewayStoreError: At start-up, as `GatewayStore.open` does; the server then does not start.
    """

    @asynccontextmanager
    async def opened(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        async with store or GatewayStore() as running:
            setattr(app.state, _NAME, running)
            async with inner(app) if inner is not None else nullcontext() as state:
                # Mounted applications have a state of their own, and share this one.
                yield {**(state or {}), _NAME: running}

    return opened


def get_store(connection: HTTPConnection) -> GatewayStore:
    """Return the store that `lifespan` opened; a dependency.

    Raises:
        StoreNotOpenError: The application was built without `lifespan`, or has not started.
    """
    shared: Mapping[str, Any] = connection.scope.get("state", {})
    store: GatewayStore | None = getattr(connection.app.state, _NAME, None) or shared.get(_NAME)
    if store is None:
        raise StoreNotOpenError("The application has no store: build it with `FastAPI(lifespan=lifespan())`.")
    return store


StoreDep = Annotated[GatewayStore, Depends(get_store)]
