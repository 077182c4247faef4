"""The caller: the owner of the API key."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.requests import HTTPConnection

from agent_gateway_store.integrations.credentials import key_in
from agent_gateway_store.integrations.fastapi.exception_handlers import http_errors
from agent_gateway_store.integrations.fastapi.lifespan import StoreDep
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.store import GatewayStore


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
