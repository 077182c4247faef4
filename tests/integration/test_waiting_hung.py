"""A wait beside a PostgreSQL that hangs: it ends at its timeout with what it knows."""

from __future__ import annotations

import asyncio
import time

import pytest

import servers
from agent_gateway_store import ApprovalRequest, GatewayStore, ToolCall

pytestmark = pytest.mark.integration


async def test_a_wait_ends_though_the_database_hangs() -> None:
    """What was seen before stands: PENDING, soon after the timeout, and the approval can be decided later."""
    call = ToolCall(server="files", tool="delete_file", arguments={"path": "/tmp/x"})
    request = ApprovalRequest(request_id="r-1", caller_id="dev-agent", tool_call=call, risk_explanation="deletes")
    with servers.PostgresServer() as server:
        async with GatewayStore(server.url, redis_url="", auto_migrate=True) as store:
            token = await store.approvals.issue_token(request)
            waiting = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=2))
            await asyncio.sleep(1)
            await asyncio.to_thread(server.pause)
            started = time.monotonic()
            try:
                result = await asyncio.wait_for(waiting, 60)
            finally:
                server.resume()
            took_s = time.monotonic() - started

            assert result.status == "PENDING"
            assert took_s < 8
            assert (await store.approvals.approve(token, "approver-1")).status == "APPROVED"
