"""A decision is committed though nobody can be told of it: no right to notify, a queue that is full."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from contextlib import suppress

import asyncpg
import pytest
from sqlalchemy import make_url

import servers
from agent_gateway_store import GatewayStore, TrustLevel
from agent_gateway_store.storage import pubsub
from builders import CALL, make_request
from proofs.harness import execute, migrated
from servers import PostgresServer

pytestmark = pytest.mark.system


@pytest.fixture(autouse=True)
def _short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was not told looks again after half a second, in place of five."""
    monkeypatch.setattr(pubsub, "_SLOW_POLL_S", 0.5)


async def live(url: str) -> None:
    """Decide an approval that another store waits for, and revoke a key."""
    async with GatewayStore(url, redis_url="") as store, GatewayStore(url, redis_url="") as other:
        token = await store.approvals.issue_token(make_request())
        waiting = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=60))
        assert (await other.approvals.approve(token, "approver-1")).status == "APPROVED"
        assert (await waiting).status == "APPROVED"
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
        await store.keys.issue("dev-agent", role="developer", trust_level=TrustLevel.LOW, environment="dev")
        await store.keys.revoke("dev-agent")


async def test_who_may_not_notify_decides_all_the_same(
    migrated_postgres_database: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    url = migrated_postgres_database()
    role = f"gateway_{secrets.token_hex(4)}"
    await execute(
        url,
        f"CREATE ROLE {role} LOGIN",
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
        f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}",
        "REVOKE EXECUTE ON FUNCTION pg_notify(text, text) FROM PUBLIC",
    )
    limited = make_url(url).set(username=role).render_as_string(hide_password=False)
    try:
        await live(f"{limited}?listen=false")
        quiet = caplog.messages
        await live(limited)
    finally:
        await execute(url, f"DROP OWNED BY {role}", f"DROP ROLE {role}")

    assert quiet == []
    # One for each of the two stores.
    assert 1 <= sum("No notification can be sent" in line for line in caplog.messages) <= 2


async def test_a_full_queue_of_notifications_fails_no_decision() -> None:
    """Some listener stands still in a transaction, so that PostgreSQL can forget none of them."""
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
