"""How-to: one store for a FastAPI application, callers with keys, and the desk of the approvers."""

# --8<-- [start:app]
from fastapi import FastAPI

from agent_gateway_store import AuditEvent, CallerIdentity
from agent_gateway_store.integrations.fastapi import CallerDep, CallerStoreDep, install_error_handlers, lifespan

app = FastAPI(lifespan=lifespan())
install_error_handlers(app)


@app.get("/whoami")
async def whoami(caller: CallerDep) -> CallerIdentity:
    return caller


@app.get("/events")
async def events(store: CallerStoreDep) -> list[AuditEvent]:
    return await store.audit.list_recent(limit=20)  # of the caller's organisation


# --8<-- [end:app]

# --8<-- [start:websocket]
from fastapi import WebSocket


@app.websocket("/ws")
async def greet(socket: WebSocket, caller: CallerDep) -> None:
    await socket.accept()
    await socket.send_text(f"hello {caller.caller_id}")
    await socket.close()


# --8<-- [end:websocket]

# --8<-- [start:pages]
from agent_gateway_store import ApiKey, Page


@app.get("/search")
async def search(store: CallerStoreDep, cursor: str | None = None) -> Page[AuditEvent]:
    return await store.audit.search(limit=20, cursor=cursor)


@app.get("/keys")
async def keys(store: CallerStoreDep) -> Page[ApiKey]:
    return await store.keys.list()  # of the caller's organisation


# --8<-- [end:pages]

# --8<-- [start:approvals]
from fastapi import HTTPException

from agent_gateway_store.integrations.fastapi import Approver, approvals_router


async def get_approver(caller: CallerDep) -> Approver:
    if caller.role != "approver":
        raise HTTPException(403, "Only approvers decide.")
    return Approver(approver_id=caller.caller_id, org_id=caller.org_id)


app.include_router(approvals_router(get_approver, prefix="/approvals"))
# --8<-- [end:approvals]

# --8<-- [start:lifespan]
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agent_gateway_store import GatewayStore

store = GatewayStore("sqlite:///own.db")


@asynccontextmanager
async def own(app: FastAPI) -> AsyncIterator[dict[str, str]]:
    await store.keys.list()  # the store is open here
    yield {"greeting": "hello"}  # and still is after this line


other_app = FastAPI(lifespan=lifespan(store, inner=own))
# --8<-- [end:lifespan]

import asyncio

import httpx

from agent_gateway_store import ApprovalRequest, ToolCall


async def main() -> None:
    call = ToolCall(server="files", tool="delete_file", arguments={"path": "a.txt"})
    asked = ApprovalRequest(request_id="r-1", caller_id="dev-agent", tool_call=call, risk_explanation="Deletes.")
    async with GatewayStore() as gateway:  # beside the application, on the same file
        agent = (await gateway.keys.issue("dev-agent", role="developer")).plaintext.get_secret_value()
        alice = (await gateway.keys.issue("alice", role="approver")).plaintext.get_secret_value()
        await gateway.approvals.issue_token(asked)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://gw") as client:
        good = await client.get("/whoami", headers={"Authorization": f"Bearer {agent}"})
        bad = await client.get("/whoami", headers={"X-API-Key": "agw_wrong"})
        recent = await client.get("/events", headers={"X-API-Key": agent})
        found = await client.get("/search", headers={"X-API-Key": agent})
        listed = await client.get("/keys", headers={"X-API-Key": agent})
        pending = await client.get("/approvals?status=PENDING", headers={"X-API-Key": alice})
        path = f"/approvals/{pending.json()['items'][0]['approval_id']}/decision"
        refused = await client.post(path, headers={"X-API-Key": agent}, json={"decision": "approve"})
        decided = await client.post(path, headers={"X-API-Key": alice}, json={"decision": "approve"})
        late = await client.post(path, headers={"X-API-Key": alice}, json={"decision": "deny"})
    assert (good.status_code, good.json()["caller_id"]) == (200, "dev-agent")
    assert (bad.status_code, bad.json()["detail"]) == (401, "Invalid API key: ask the operator for a new one.")
    assert recent.json() == []
    assert found.json() == {"items": [], "next_cursor": None}
    assert {key["caller_id"] for key in listed.json()["items"]} == {"dev-agent", "alice"}
    assert "key_hash" not in listed.text
    assert (refused.status_code, decided.json()["status"], late.status_code) == (403, "APPROVED", 409)
    async with other_app.router.lifespan_context(other_app) as state:
        assert state["greeting"] == "hello"


asyncio.run(main())
