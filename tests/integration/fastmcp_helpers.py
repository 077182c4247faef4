"""A FastMCP server behind the middleware, on a store, with tools that note that they ran."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastmcp import Client, FastMCP
from fastmcp.client.client import CallToolResult
from fastmcp.exceptions import ToolError
from fastmcp.tools import Tool

import asgi
from agent_gateway_store import (
    ApprovalRequest,
    ApprovalStatus,
    AuditEvent,
    CallerIdentity,
    Decision,
    GatewayStore,
    ToolCall,
    TrustLevel,
)
from agent_gateway_store.integrations.fastmcp import GatewayMiddleware, Verdict

SECRET = "correct-horse-battery-staple"
CALLER = CallerIdentity(
    caller_id="dev-agent",
    role="developer",
    trust_level=TrustLevel.MEDIUM,
    environment="test",
    org_id="acme",
    key_id="k-1",
    api_key_id=1,
)


def judge(_caller: CallerIdentity, call: ToolCall) -> Verdict:
    """Reading is allowed, deleting needs a human, the rest is denied."""
    if call.tool.startswith("delete_"):
        return Verdict(decision=Decision.APPROVAL_REQUIRED, rule="deletes", reason="A deleted file is gone.")
    if call.tool == "format_disk":
        return Verdict(decision=Decision.DENY, rule="no-disks", reason="Disks are out of bounds.")
    return Verdict(
        decision=Decision.ALLOW,
        rule="reads",
        reason="Reads are allowed.",
        risk_score=0.2,
        risk_labels=("READ",),
        policy_version="7",
    )


async def always(_context: Any) -> CallerIdentity:
    """Every call comes from the same caller."""
    return CALLER


@dataclass
class Bench:
    """A server, and what its tools did."""

    store: GatewayStore
    ran: list[str] = field(default_factory=list)

    def server(self, policy: Any = judge, *, identify: Any = always, **options: Any) -> FastMCP[Any]:
        """Build a server on the store, which is opened by whoever made the bench."""
        middleware = GatewayMiddleware(self.store, policy, identify=identify, **({"on_pending": "wait"} | options))
        server: FastMCP[Any] = FastMCP("files", middleware=[middleware])

        @server.tool
        async def read_file(path: str, password: str = "") -> str:
            self.ran.append(path)
            return f"content of {path}"

        @server.tool
        async def delete_file(path: str, password: str = "") -> bool:
            self.ran.append(path)
            return True

        @server.tool
        async def format_disk() -> bool:
            self.ran.append("disk")
            return True

        @server.tool
        async def read_badly() -> str:
            raise ValueError("no such file")

        @server.tool(timeout=0.05)
        async def read_slowly() -> str:
            await asyncio.sleep(30)
            return "late"

        return server

    async def call(self, server: FastMCP[Any], tool: str, **arguments: Any) -> CallToolResult:
        """Call a tool by a client of its own."""
        async with Client(server) as client:
            return await client.call_tool(tool, arguments)

    async def refusal(self, server: FastMCP[Any], tool: str, **arguments: Any) -> str:
        """Call a tool that is refused; returns why."""
        with pytest.raises(ToolError) as refused:
            await self.call(server, tool, **arguments)
        return str(refused.value)

    async def pending(self) -> ApprovalRequest:
        """The approval that waits, once there is one."""
        async with asyncio.timeout(10):
            while not (found := await self.store.approvals.list_requests(ApprovalStatus.PENDING)):
                await asyncio.sleep(0.01)
        return found[0]

    async def event(self) -> AuditEvent:
        """The only event."""
        (event,) = await self.store.audit.list_recent()
        return event

    async def first_event(self) -> AuditEvent:
        """The only event, once it is there."""
        async with asyncio.timeout(10):
            while not await self.store.audit.list_recent():
                await asyncio.sleep(0.01)
        return await self.event()


def denies_old(_caller: CallerIdentity, call: ToolCall) -> Verdict:
    """Version 1 of anything is denied."""
    is_old = call.arguments.get("@version") == "1"
    return Verdict(decision=Decision.DENY if is_old else Decision.ALLOW, rule="age", reason="Version 1 is out of use.")


def versioned(bench: Bench, server: FastMCP[Any], name: str = "read_log") -> None:
    """Add two versions of a tool."""

    def first(path: str) -> str:
        bench.ran.append(f"1 {path}")
        return "1"

    def second(path: str) -> str:
        bench.ran.append(f"2 {path}")
        return "2"

    server.add_tool(Tool.from_function(first, name=name, version="1"))
    server.add_tool(Tool.from_function(second, name=name, version="2"))


@asynccontextmanager
async def serving(server: FastMCP[Any]) -> AsyncIterator[str]:
    """Serve on a free port; yields the URL."""
    async with asgi.serving(server.http_app(), ws="none") as place:
        yield f"http://{place}/mcp"


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A bench on a SQLite file."""
    async with GatewayStore() as store:
        yield Bench(store)
