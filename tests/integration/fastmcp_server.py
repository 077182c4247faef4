"""A server that speaks over its standard input and output: `python fastmcp_server.py`. The key is in AGENT_KEY."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastmcp import FastMCP

from agent_gateway_store import CallerIdentity, Decision, GatewayStore, ToolCall
from agent_gateway_store.integrations.fastmcp import GatewayMiddleware, Verdict

store = GatewayStore()


@asynccontextmanager
async def lifespan(_server: Any) -> AsyncIterator[None]:
    async with store:
        yield


def judge(_caller: CallerIdentity, _call: ToolCall) -> Verdict:
    return Verdict(decision=Decision.APPROVAL_REQUIRED, rule="all", reason="A human decides.")


server: FastMCP[Any] = FastMCP(
    "files",
    lifespan=lifespan,
    middleware=[
        GatewayMiddleware(
            store,
            judge,
            identify=lambda _: store.keys.verify(os.environ["AGENT_KEY"]),
            on_pending=os.environ.get("ON_PENDING", "wait"),  # type: ignore[arg-type]
        )
    ],
)


@server.tool
def delete_file(path: str) -> str:
    return f"deleted {path} in {os.getpid()}"


@server.tool
async def wait_forever() -> None:
    Path("began").touch()
    await asyncio.Event().wait()


if __name__ == "__main__":
    server.run(show_banner=False)
