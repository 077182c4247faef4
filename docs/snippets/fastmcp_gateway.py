"""How-to: a FastMCP server whose every tool call is judged, approved where needed, and recorded."""

# --8<-- [start:server]
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastmcp import FastMCP

from agent_gateway_store import CallerIdentity, Decision, GatewayStore, ToolCall
from agent_gateway_store.integrations.fastmcp import GatewayMiddleware, Verdict

store = GatewayStore()


def judge(caller: CallerIdentity, call: ToolCall) -> Verdict:
    if call.tool == "read_file":
        return Verdict(decision=Decision.ALLOW, rule="reads", reason="Reads are allowed.")
    if call.tool == "delete_file" and caller.role == "developer":
        return Verdict(decision=Decision.APPROVAL_REQUIRED, rule="deletes", reason="A deleted file is gone.")
    return Verdict(decision=Decision.DENY, rule="default", reason="No rule allows this call.")


def show(call: ToolCall) -> dict[str, Any]:
    return {name: value if name == "path" else "[hidden]" for name, value in call.arguments.items()}


@asynccontextmanager
async def lifespan(server: FastMCP[Any]) -> AsyncIterator[None]:
    async with store:
        yield


mcp: FastMCP[Any] = FastMCP("files", lifespan=lifespan)


@mcp.tool
async def delete_file(path: str, reason: str) -> str:
    return f"{path} is deleted"


mcp.add_middleware(GatewayMiddleware(store, judge, sanitize=show, approval_timeout_s=50))
# --8<-- [end:server]

# --8<-- [start:stdio]
import os

over_stdio = GatewayMiddleware(store, judge, identify=lambda context: store.keys.verify(os.environ["AGENT_KEY"]))
# --8<-- [end:stdio]

# --8<-- [start:login]
from fastmcp.server.dependencies import get_access_token
from fastmcp.server.middleware import MiddlewareContext

from agent_gateway_store import TrustLevel


def from_login(context: MiddlewareContext[Any]) -> CallerIdentity:
    login = get_access_token()
    if login is None or login.subject is None:
        raise PermissionError("Nobody is logged in.")
    return CallerIdentity(
        caller_id=login.subject, role="developer", trust_level=TrustLevel.MEDIUM, environment="prod", org_id="acme"
    )


with_login = GatewayMiddleware(store, judge, identify=from_login)
# --8<-- [end:login]


# --8<-- [start:server-name]
def tenant(context: MiddlewareContext[Any]) -> str:
    return f"files-{context.message.arguments['path'].partition('/')[0]}"


per_tenant = GatewayMiddleware(store, judge, server=tenant)
# --8<-- [end:server-name]


# --8<-- [start:released]
async def released_calls(store: GatewayStore) -> int:
    counted = await store.audit.stats(by="approver_id", decision=Decision.APPROVAL_REQUIRED)
    return sum(row["calls"] for row in counted if row["approver_id"] is not None)


# --8<-- [end:released]

import asyncio

from fastmcp import Client
from mcp_types import CallToolRequestParams


async def main() -> None:
    async with GatewayStore() as gateway:  # beside the server, on the same file
        os.environ["AGENT_KEY"] = (await gateway.keys.issue("dev-agent", role="developer")).plaintext.get_secret_value()
        mcp.middleware[-1] = over_stdio
        async with Client(mcp) as client:
            call = asyncio.create_task(client.call_tool("delete_file", {"path": "a.txt", "reason": "private"}))
            while not (pending := await gateway.approvals.list_requests("PENDING")):
                await asyncio.sleep(0.05)
            await gateway.approvals.approve(approval_id=pending[0].approval_id, approver_id="alice")
            assert (await call).data == "a.txt is deleted"
        (event,) = await gateway.audit.list_recent()
        assert await released_calls(gateway) == 1
        mcp.middleware[-1] = with_login
        async with Client(mcp) as client:
            answer = await client.call_tool("delete_file", {"path": "a", "reason": "r"}, raise_on_error=False)
            assert answer.is_error
        message = CallToolRequestParams(name="delete_file", arguments={"path": "acme/a.txt"})
        assert tenant(MiddlewareContext(message=message)) == "files-acme"
    assert (event.decision, event.approver_id, event.execution_status) == ("APPROVAL_REQUIRED", "alice", "SUCCESS")
    assert show(ToolCall(server="files", tool="t", arguments={"path": "a", "x": 1})) == {"path": "a", "x": "[hidden]"}


asyncio.run(main())
