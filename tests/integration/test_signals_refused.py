"""A decision is committed though nobody can be notified of it, because the queue is full."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import asyncpg
import pytest

import servers
from agent_gateway_store import GatewayStore, TrustLevel
from agent_gateway_store.storage import pubsub
from builders import make_request
from proofs.harness import migrated
from servers import PostgresServer

pytestmark = pytest.mark.system


async def live(url: str) -> None:
    """Decide an approval that another store waits for, and revoke a key."""
    async with GatewayStore(url, redis_url="") as store, GatewayStore(url, redis_url="") as other:
        token = await store.approvals.issue_token(make_request())
        waiting = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=60))
        assert (await other.approvals.approve(token, "approver-1")).status == "APPROVED"
        assert (await waiting).status == "APPROVED"
        await store.keys.issue("dev-agent", role="developer", trust_level=TrustLevel.LOW, environment="dev")
        await store.keys.revoke("dev-agent")


async def test_a_full_queue_of_notifications_fails_no_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some listener stands still in a transaction, so that PostgreSQL can forget none of them."""
    monkeypatch.setattr(pubsub, "_SLOW_POLL_S", 0.5)
    with PostgresServer(settings={"max_notify_queue_pages": 64}) as server:
        url = migrated(server.url)
        async with servers.connected(url) as listener, servers.connected(url) as sender:
            await listener.execute("LISTEN other")
            await listener.execute("BEGIN")
            await listener.execute("SELECT 1")
            for length in (7900, 100):
                with suppress(asyncpg.ProgramLimitExceededError):
                    while True:
                        await sender.execute(f"SELECT pg_notify('other', repeat('x', {length}))")
            await live(url)
            await listener.execute("ROLLBACK")
