"""What the endpoints depend on: the gateway's parts, and who calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from agent_gateway_store import CallerIdentity, GatewayStore
from agent_gateway_store.integrations.fastapi import Approver, CallerDep
from fastapi_gateway.policy import Policy
from fastapi_gateway.problems import RefusalError

__all__ = ["Auditor", "Gateway", "Parts", "gateway_of", "require_approver"]


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


def _with_role(*roles: str) -> Callable[[CallerIdentity], Awaitable[CallerIdentity]]:
    async def check(caller: CallerDep) -> CallerIdentity:
        if caller.role not in roles:
            raise RefusalError(403, "forbidden", f"This needs a key with the role {' or '.join(roles)}.")
        return caller

    return check


Auditor = Annotated[CallerIdentity, Depends(_with_role("approver", "admin"))]


async def require_approver(caller: Annotated[CallerIdentity, Depends(_with_role("approver"))]) -> Approver:
    """Return who decides: the caller, if the key has that role."""
    return Approver(approver_id=caller.caller_id, org_id=caller.org_id)
