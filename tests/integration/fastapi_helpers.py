"""An application on the FastAPI integration, its store, and clients with keys of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException

from agent_gateway_store import CallerIdentity, GatewayStore, StoreSettings, ToolCall
from agent_gateway_store.integrations.fastapi import (
    Approver,
    CallerDep,
    CallerStoreDep,
    approvals_router,
    install_error_handlers,
    lifespan,
)
from builders import make_request

CALL = ToolCall(server="files", tool="delete_file", arguments={"path": "a.txt"})


async def require_approver(caller: CallerDep) -> Approver:
    """The dependency of a host: approvers have keys, too."""
    if caller.role != "approver":
        raise HTTPException(403, "Only approvers decide.")
    return Approver(approver_id=caller.caller_id, org_id=caller.org_id)


async def whoami(caller: CallerDep) -> CallerIdentity:
    """Answer who called."""
    return caller


async def follow(store: CallerStoreDep, token: str) -> str:
    """Answer where an approval stands; the store's errors are left to the handlers."""
    return (await store.approvals.check_token(token)).status


def build_app(store: GatewayStore, *, is_handling: bool = True) -> FastAPI:
    """An application with every part of the integration."""
    app = FastAPI(lifespan=lifespan(store))
    app.add_api_route("/whoami", whoami)
    app.add_api_route("/follow", follow)
    app.include_router(approvals_router(require_approver))
    if is_handling:
        install_error_handlers(app)
    return app


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, which is started before and stopped after."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://gateway") as client,
    ):
        yield client


@dataclass
class Bench:
    """A running application and the store behind it."""

    store: GatewayStore
    client: httpx.AsyncClient
    app: FastAPI

    async def key(self, caller_id: str, role: str = "developer", org_id: str = "default") -> dict[str, str]:
        """Return the headers of a new caller."""
        issued = await self.store.keys.issue(caller_id, role=role, org_id=org_id)
        return {"Authorization": f"Bearer {issued.plaintext.get_secret_value()}"}

    async def ask(self, org_id: str = "default") -> tuple[str, str]:
        """Ask for an approval; returns its id and its token."""
        request = make_request(org_id=org_id, tool_call=CALL)
        token = await self.store.approvals.issue_token(request)
        return str(request.approval_id), token

    async def decide(self, approval_id: str, headers: dict[str, str], **body: Any) -> httpx.Response:
        """Send a decision."""
        return await self.client.post(f"/approvals/{approval_id}/decision", headers=headers, json=body)


@pytest.fixture
async def bench(migrated_postgres_database: Callable[[], str]) -> AsyncIterator[Bench]:
    """An application with every part of the integration."""
    store = GatewayStore(migrated_postgres_database(), settings=StoreSettings(api_key_cache_seconds=0))
    app = build_app(store)
    async with running(app) as client:
        yield Bench(store, client, app)
