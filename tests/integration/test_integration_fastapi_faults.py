"""The FastAPI integration when its PostgreSQL is killed."""

from __future__ import annotations

import pytest
from fastapi_helpers import Bench, build_app, running

from agent_gateway_store import GatewayStore, StoreSettings
from servers import PostgresServer


async def test_killed_database_is_503_and_passes(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody gets in and nothing is decided meanwhile; the answer says when to ask again, the log says what is away."""
    with PostgresServer(durable=True) as server:
        store = GatewayStore(server.url, auto_migrate=True, settings=StoreSettings(api_key_cache_seconds=0))
        app = build_app(store)
        async with running(app) as client:
            bench = Bench(store, client, app)
            alice, agent = await bench.key("alice", role="approver"), await bench.key("dev-agent")
            approval_id, token = await bench.ask()

            server.kill()
            away = [
                await client.get("/whoami", headers=agent),
                await client.get("/follow", headers=agent, params={"token": token}),
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


async def test_database_lost_behind_a_verified_key_is_503_too() -> None:
    """A key that is still trusted opens the router; what the router asks then fails the same way."""
    with PostgresServer() as server:
        store = GatewayStore(server.url, auto_migrate=True)
        app = build_app(store)
        async with running(app) as client:
            bench = Bench(store, client, app)
            alice = await bench.key("alice", role="approver")
            approval_id, token = await bench.ask()
            assert (await client.get("/approvals", headers=alice)).status_code == 200

            server.kill()
            answers = [
                await client.get("/approvals", headers=alice),
                await client.get(f"/approvals/{approval_id}", headers=alice),
                await bench.decide(approval_id, alice, decision="approve"),
                await client.get("/follow", headers=alice, params={"token": token}),
            ]
            server.start()  # a store whose database is away takes seconds to close

    assert [answer.status_code for answer in answers] == [503] * 4
    assert {answer.headers["Retry-After"] for answer in answers} == {"5"}
