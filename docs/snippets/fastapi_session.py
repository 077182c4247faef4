"""How-to: the services over FastAPI's own session. Needs DATABASE_URL and REDIS_URL."""

# --8<-- [start:app]
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store import ApprovalManager, AuditEvent, AuditLogger, AuditQuery
from agent_gateway_store.storage.cache import get_redis
from agent_gateway_store.storage.database import close_db, get_db

SessionDep = Annotated[AsyncSession, Depends(get_db)]
RedisDep = Annotated[Redis | None, Depends(get_redis)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await close_db()  # the connections behind get_db


app = FastAPI(lifespan=lifespan)


@app.post("/events")
async def write(event: AuditEvent, session: SessionDep) -> str:
    return await AuditLogger(session).write(event)  # commits the session, and never raises


@app.get("/events")
async def recent(session: SessionDep) -> list[AuditEvent]:
    return await AuditQuery(session).list_recent(limit=20)


@app.get("/approvals/{token}")
async def check(token: str, session: SessionDep, redis: RedisDep) -> str:
    return (await ApprovalManager(session, redis).check_token(token)).status


# --8<-- [end:app]

import asyncio

import httpx

from agent_gateway_store import ApprovalRequest, GatewayStore, ToolCall

EVENT = {
    "request_id": "r-1",
    "caller_id": "dev-agent",
    "caller_role": "developer",
    "environment": "dev",
    "mcp_server": "files",
    "tool_name": "read_file",
    "raw_args_hash": "0" * 64,
    "sanitized_args": {},
    "risk_score": 0,
    "matched_policy_rule": "reads-are-allowed",
    "decision": "ALLOW",
    "latency_ms": 1,
    "deterministic_rationale": "Reads are allowed.",
}


async def main() -> None:
    async with GatewayStore(auto_migrate=True) as store:
        call = ToolCall(server="files", tool="delete_file")
        token = await store.approvals.issue_token(
            ApprovalRequest(request_id="r-1", caller_id="dev-agent", tool_call=call, risk_explanation="Deletes.")
        )
    transport = httpx.ASGITransport(app)
    async with lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        assert (await client.post("/events", json=EVENT)).json() == "STORED"
        assert (await client.post("/events", json=EVENT | {"timestamp": "2026-01-01T00:00:00Z"})).json() == "STORED"
        assert len((await client.get("/events")).json()) == 2
        assert (await client.get(f"/approvals/{token}")).json() == "PENDING"


asyncio.run(main())
