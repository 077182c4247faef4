"""The caller: the owner of the API key."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from agent_gateway_store.integrations.credentials import key_in
from agent_gateway_store.integrations.fastapi.exception_handlers import http_errors
from agent_gateway_store.integrations.fastapi.lifespan import StoreDep
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.store import GatewayStore

# They only describe the API in OpenAPI: of two headers they would read the first, where `key_in` refuses both.
_Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))]
_ApiKey = Annotated[str | None, Security(APIKeyHeader(name="X-API-Key", auto_error=False))]


async def get_caller(request: Request, store: StoreDep, _bearer: _Bearer, _api_key: _ApiKey) -> CallerIdentity:
    """Return the owner of the API key in `Authorization: Bearer` or `X-API-Key`; a dependency.

    Raises:
        HTTPException: 401, always the same one, if there is not exactly one key or it is not accepted; 503 if the
            store cannot answer. The store's error is its cause.
    """
    with http_errors():
        return await store.keys.verify(key_in(request.headers))


CallerDep = Annotated[CallerIdentity, Depends(get_caller)]


def get_caller_store(store: StoreDep, caller: CallerDep) -> GatewayStore:
    """Return the store bound to the caller's organisation; a dependency."""
    return store.for_org(caller.org_id)


CallerStoreDep = Annotated[GatewayStore, Depends(get_caller_store)]
