"""A wait beside a PostgreSQL that hangs: it ends at its timeout with what it knows."""

from __future__ import annotations

import asyncio
import time

import pytest

import servers
from agent_gateway_store import GatewayStore
from builders import make_request

pytestmark = pytest.mark.system


async def test_a_wait_ends_though_the_database_hangs() -> None:
    """What was seen before stands: PENDING, soon after the timeout, and the approval can be decided later."""
    with servers.PostgresServer() as server:
        async with GatewayStore(server.url, redis_url="", auto_migrate=True) as store:
            token = await store.approvals.issue_token(make_request())
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
