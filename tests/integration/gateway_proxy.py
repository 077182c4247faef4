"""The middleware before a real MCP server: `python gateway_proxy.py stdio|PORT COMMAND...`; DATABASE_URL is its store.

CLOCK_HOURS moves the clock of the store, as if that much time had passed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from fastmcp import FastMCP
from fastmcp.client.transports import StdioTransport
from fastmcp.server import create_proxy

from agent_gateway_store import CallerIdentity, Decision, GatewayStore, ToolCall, TrustLevel, clock
from agent_gateway_store.integrations.fastmcp import GatewayMiddleware, Verdict

CALLER = CallerIdentity(caller_id="dev-agent", role="developer", trust_level=TrustLevel.MEDIUM, environment="test")
store = GatewayStore(redis_url="")


@asynccontextmanager
async def lifespan(_server: Any) -> AsyncIterator[None]:
    async with store:
        yield


def judge(_caller: CallerIdentity, _call: ToolCall) -> Verdict:
    return Verdict(decision=Decision.APPROVAL_REQUIRED, rule="all", reason="A human decides.")


def main(place: str, command: str, *arguments: str) -> None:
    clock.move(timedelta(hours=float(os.environ.get("CLOCK_HOURS", "0"))))
    backend = StdioTransport(sys.executable, ["-m", command, *arguments])
    server: FastMCP[Any] = FastMCP("gateway", lifespan=lifespan)
    server.mount(create_proxy(backend, name=command))
    options: dict[str, Any] = {"identify": lambda _context: CALLER, "approval_wait_s": float(os.environ["WAIT_S"])}
    server.add_middleware(GatewayMiddleware(store, judge, **options))
    if place == "stdio":
        server.run(show_banner=False)
    else:
        server.run("http", port=int(place), show_banner=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
