"""How-to: one store for a FastAPI application."""

# --8<-- [start:app]
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Request

from agent_gateway_store import CallerIdentity, GatewayStore, errors


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with GatewayStore() as store:
        app.state.store = store
        yield


def get_store(request: Request) -> GatewayStore:
    return request.app.state.store


StoreDep = Annotated[GatewayStore, Depends(get_store)]


async def get_caller(store: StoreDep, x_api_key: Annotated[str, Header()]) -> CallerIdentity:
    try:
        return await store.keys.verify(x_api_key)
    except errors.InvalidApiKeyError as refusal:
        raise HTTPException(401, str(refusal)) from None


CallerDep = Annotated[CallerIdentity, Depends(get_caller)]

app = FastAPI(lifespan=lifespan)


@app.get("/whoami")
async def whoami(caller: CallerDep) -> CallerIdentity:
    return caller


# --8<-- [end:app]

import asyncio

import httpx


async def main() -> None:
    transport = httpx.ASGITransport(app)
    async with lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        issued = await app.state.store.keys.issue("dev-agent", role="developer")
        good = await client.get("/whoami", headers={"x-api-key": issued.plaintext.get_secret_value()})
        bad = await client.get("/whoami", headers={"x-api-key": "agw_wrong"})
    assert (good.status_code, good.json()["caller_id"]) == (200, "dev-agent")
    assert (bad.status_code, bad.json()["detail"]) == (401, "Invalid API key: ask the operator for a new one.")


asyncio.run(main())
