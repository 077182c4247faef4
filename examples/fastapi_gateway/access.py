"""What the endpoints depend on: the gateway's parts, and who calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from agent_gateway_store import CallerIdentity, GatewayStore
from agent_gateway_store.errors import InvalidApiKeyError
from fastapi_gateway.policy import Policy
from fastapi_gateway.problems import RefusalError

__all__ = ["Approver", "Auditor", "Caller", "Gateway", "Parts", "gateway_of"]


@dataclass(frozen=True)
class Gateway:
    """What every request shares."""

    store: GatewayStore
    policy: Policy
    sandbox: Path
    tool_timeout_seconds: float


def gateway_of(request: Request) -> Gateway:
    """Return the parts that the lifespan made."""
    gateway: Gateway = request.app.state.gateway
    return gateway


Parts = Annotated[Gateway, Depends(gateway_of)]
_Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))]
_Header = Annotated[str | None, Security(APIKeyHeader(name="X-API-Key", auto_error=False))]


async def _authenticate(gateway: Parts, bearer: _Bearer, header: _Header) -> CallerIdentity:
    key = bearer.credentials if bearer else header
    if not key:
        raise InvalidApiKeyError
    return await gateway.store.keys.verify(key)


Caller = Annotated[CallerIdentity, Depends(_authenticate)]


def _with_role(*roles: str) -> Callable[[CallerIdentity], Awaitable[CallerIdentity]]:
    async def check(caller: Caller) -> CallerIdentity:
        if caller.role not in roles:
            raise RefusalError(403, "forbidden", f"This needs a key with the role {' or '.join(roles)}.")
        return caller

    return check


Approver = Annotated[CallerIdentity, Depends(_with_role("approver"))]
Auditor = Annotated[CallerIdentity, Depends(_with_role("approver", "admin"))]
