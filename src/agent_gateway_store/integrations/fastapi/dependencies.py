"""What routes depend on: the one store of the application, and the caller, who owns the API key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.requests import HTTPConnection

from agent_gateway_store.errors import StoreNotOpenError
from agent_gateway_store.integrations.credentials import key_in
from agent_gateway_store.integrations.fastapi.exception_handlers import http_errors
from agent_gateway_store.models.keys import CallerIdentity
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


# They only describe the API in OpenAPI: of two headers they would read the first, where `key_in` refuses both. And
# FastAPI's own want a `Request`, which a WebSocket does not have.
class _Bearer(HTTPBearer):
    async def __call__(self, _connection: HTTPConnection) -> None:
        """Read nothing."""


class _ApiKey(APIKeyHeader):
    async def __call__(self, _connection: HTTPConnection) -> None:
        """Read nothing."""


async def get_caller(
    connection: HTTPConnection,
    store: StoreDep,
    _bearer: Annotated[None, Security(_Bearer(scheme_name="HTTPBearer"))],
    _api_key: Annotated[None, Security(_ApiKey(name="X-API-Key", scheme_name="APIKeyHeader"))],
) -> CallerIdentity:
    """Return the owner of the API key in `Authorization: Bearer` or `X-API-Key`; a dependency, of WebSockets, too.

    The headers of a WebSocket are those of its handshake: a caller that is not accepted is answered before it opens.

    Raises:
        HTTPException: 401, always the same one, if there is not exactly one key or it is not accepted; 503 if the
            store cannot answer. The store's error is its cause.
    """
    with http_errors():
        return await store.keys.verify(key_in(connection.headers))


CallerDep = Annotated[CallerIdentity, Depends(get_caller)]


def get_caller_store(store: StoreDep, caller: CallerDep) -> GatewayStore:
    """Return the store bound to the caller's organisation; a dependency."""
    return store.for_org(caller.org_id)


CallerStoreDep = Annotated[GatewayStore, Depends(get_caller_store)]
