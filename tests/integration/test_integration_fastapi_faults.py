"""The FastAPI integration when its PostgreSQL is killed."""

from __future__ import annotations

import pytest
from fastapi_helpers import Bench, build_app, running

from agent_gateway_store import GatewayStore
from servers import PostgresServer

pytestmark = pytest.mark.system


async def test_killed_database_is_503_and_passes(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody gets in and nothing is decided meanwhile; the answer says when to ask again, the log says what is away."""
    with PostgresServer(durable=True) as server:
        store = GatewayStore(server.url, auto_migrate=True)
        app = build_app(store)
        async with running(app) as client:
            bench = Bench(store, client, app)
            alice, agent = await bench.key("alice", role="approver"), await bench.key("dev-agent")
            approval_id, token = await bench.ask()
            # A key that is still trusted opens the router; what the router asks then fails the same way.
            assert (await client.get("/approvals", headers=alice)).status_code == 200

            server.kill()
            away = [
                await client.get("/whoami", headers=agent),
                await client.get("/follow", headers=alice, params={"token": token}),
                await client.get(f"/approvals/{approval_id}", headers=alice),
                await client.get("/approvals", headers=alice),
                await bench.decide(approval_id, alice, decision="approve"),
            ]
            server.start()
            back = await bench.decide(approval_id, alice, decision="approve")

    assert {(answer.status_code, answer.headers["Retry-After"], answer.text) for answer in away} == {
        (503, "5", '{"detail":"The gateway cannot reach its records: try again later."}')
    }
    assert (back.status_code, back.json()["status"]) == (200, "APPROVED")
    assert "StoreUnavailableError" in caplog.text
    assert token not in caplog.text
