"""A console on a store of its own, and browsers without a screen: a client keeps its cookies and its form's secret."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_gateway_store import ApprovalRequest, GatewayStore, StoreSettings
from agent_gateway_store.console import create_console
from builders import make_request

URL = "http://console.test"
_CSRF = re.compile(r'name="csrf" value="(\w+)"')


class Visitor:
    """One person with a browser; the client holds the cookies."""

    def __init__(self, app: Any, *, base: str = "", address: str = "192.0.2.1") -> None:
        transport = httpx.ASGITransport(app=app, client=(address, 1234), raise_app_exceptions=True)
        self.client = httpx.AsyncClient(transport=transport, base_url=URL)
        self.base = base

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.client.get(self.base + path, **options)

    async def post(self, path: str, data: Mapping[str, str], **options: Any) -> httpx.Response:
        return await self.client.post(self.base + path, data=dict(data), **options)

    async def sign_in(self, key: str) -> httpx.Response:
        return await self.post("/login", {"key": key})

    async def csrf(self, path: str = "/approvals") -> str:
        """Return the secret that the forms of this session hold."""
        [first, *_] = _CSRF.findall((await self.get(path)).text)
        return str(first)

    async def decide(self, approval_id: Any, decision: str, note: str = "") -> httpx.Response:
        form = {"decision": decision, "note": note, "csrf": await self.csrf()}
        return await self.post(f"/approvals/{approval_id}/decision", form)


async def key_of(
    store: GatewayStore, caller: str = "alice", *, role: str = "approver", org_id: str | None = None
) -> str:
    issued = await store.keys.issue(caller, role=role, org_id=org_id)
    return issued.plaintext.get_secret_value()


async def signed_in(store: GatewayStore, app: Any, caller: str = "alice", **options: Any) -> Visitor:
    """Return somebody with a key of their own who has signed in."""
    visitor = Visitor(app)
    answer = await visitor.sign_in(await key_of(store, caller, **options))
    assert answer.status_code == 303
    return visitor


@asynccontextmanager
async def console(url: str, **settings: Any) -> AsyncIterator[tuple[GatewayStore, Any]]:
    """Open a store, and give it with its console."""
    async with GatewayStore(url, redis_url="", settings=StoreSettings(**settings)) as store:
        yield store, create_console(store)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/gateway.db"


@pytest.fixture
async def store(url: str) -> AsyncIterator[GatewayStore]:
    """An open store."""
    async with console(url) as (found, _):
        yield found


@pytest.fixture
def app(store: GatewayStore) -> Any:
    """Its console."""
    return create_console(store)


async def waiting(store: GatewayStore, **fields: Any) -> ApprovalRequest:
    request = make_request(**fields)
    await store.approvals.issue_token(request)
    return request


async def status(visitor: Visitor, path: str = "/approvals") -> int:
    """Return the status of a page: 303 for who must sign in."""
    return (await visitor.get(path)).status_code


@asynccontextmanager
async def life(app: Any) -> AsyncIterator[None]:
    """Start and stop an application as a server does."""
    inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    outbox: asyncio.Queue[Any] = asyncio.Queue()
    task = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    assert (await outbox.get())["type"] == "lifespan.startup.complete"
    yield
    await inbox.put({"type": "lifespan.shutdown"})
    assert (await outbox.get())["type"] == "lifespan.shutdown.complete"
    await task
