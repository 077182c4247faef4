"""The application: one store for its whole life, the routes, and a health check."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from agent_gateway_store import GatewayStore
from agent_gateway_store.integrations.fastapi import approvals_router, lifespan
from fastapi_gateway import approvals, calls
from fastapi_gateway.access import Gateway, Parts, require_approver
from fastapi_gateway.config import GatewaySettings
from fastapi_gateway.policy import load_policy
from fastapi_gateway.problems import RefusalError, install_handlers

__all__ = ["create_app"]

_HEALTH_TIMEOUT_S = 3


def create_app(settings: GatewaySettings | None = None) -> FastAPI:
    """Build the gateway; its store is opened when the server starts.

    Args:
        settings: Default: from the environment. The store reads DATABASE_URL, REDIS_URL, ... by itself.

    Raises:
        PolicyError: The policy file cannot be used.
        InvalidUrlError: DATABASE_URL or REDIS_URL cannot be used.
        pydantic.ValidationError: Another setting cannot.
    """
    settings = settings or GatewaySettings()
    policy = load_policy(settings.policies)
    store = GatewayStore(auto_migrate=True)

    @asynccontextmanager
    async def parts(app: FastAPI) -> AsyncIterator[None]:
        settings.sandbox.mkdir(parents=True, exist_ok=True)
        app.state.gateway = Gateway(store, policy, settings.sandbox, settings.tool_timeout_seconds)
        yield

    app = FastAPI(title="Tool gateway", lifespan=lifespan(store, inner=parts))
    install_handlers(app)
    app.include_router(calls.router)
    app.include_router(approvals.router)
    app.include_router(approvals_router(require_approver, prefix="/v1/approvals"))
    app.add_api_route("/healthz", check_health, methods=["GET"])
    return app


async def check_health(gateway: Parts) -> dict[str, str]:
    """Answer 200 if the database answers, else 503. Redis is no part of it: the gateway works without."""
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT_S):
            await gateway.store.ping()
    except TimeoutError:
        raise RefusalError(503, "store_unavailable", "The database does not answer in time.") from None
    return {"status": "ok", "policy": gateway.policy.label}
