"""The FastMCP middleware when the store is away or says no: nothing runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from fastmcp_helpers import Bench
from sqlalchemy import text

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.store import parts_of
from servers import PostgresServer

UNDECIDED = "Nobody decided about this call within 2 seconds, so it was not run: call again later."
AWAY = "The gateway cannot reach its records, so the call was not run: try again later."


async def test_closed_store_runs_nothing() -> None:
    """Also what the policy allows."""
    bench = Bench(GatewayStore())
    refusals = [await bench.refusal(bench.server(), tool, path="a.txt") for tool in ("read_file", "delete_file")]

    assert (refusals, bench.ran) == ([AWAY] * 2, [])


@pytest.mark.system
async def test_database_killed_during_the_wait_runs_nothing() -> None:
    """The wait goes on until its end, as a failover may be shorter; the event comes from the spool afterwards."""
    with PostgresServer(durable=True) as server:
        async with GatewayStore(server.url, auto_migrate=True) as store:
            bench = Bench(store)
            waiting = asyncio.create_task(
                bench.refusal(bench.server(approval_timeout_s=2), "delete_file", path="a.txt")
            )
            await bench.pending()
            # The wait has read once: where nothing could be read all the time, the records are away.
            async with asyncio.timeout(10):
                while not parts_of(store).pubsub.tasks_waiting:
                    await asyncio.sleep(0.01)
            server.kill()
            refusal = await waiting
            server.start()
            async with asyncio.timeout(30):
                while not await store.audit.list_recent():
                    await asyncio.sleep(0.1)
            event = await bench.event()

    assert (refusal, bench.ran) == (UNDECIDED, [])
    assert (event.decision, event.execution_status) == ("APPROVAL_REQUIRED", None)


@pytest.mark.parametrize("mode", ["spool", "strict"])
async def test_allowed_call_without_database_runs_only_where_it_can_be_recorded(mode: str) -> None:
    """With the spool the event is kept, so the tool runs; in strict mode it does not run at all."""
    with PostgresServer(durable=True) as server:
        settings = StoreSettings.model_validate({"audit_mode": mode})
        async with GatewayStore(server.url, auto_migrate=True, settings=settings) as store:
            bench = Bench(store)
            server.kill()
            if mode == "strict":
                refusal = await bench.refusal(bench.server(), "read_file", path="a.txt")
                assert (refusal, bench.ran) == (AWAY, [])
            else:
                await bench.call(bench.server(), "read_file", path="a.txt")
                assert (bench.ran, store.audit.counters.spooled) == (["a.txt"], 1)


async def test_result_that_cannot_be_recorded_is_withheld(migrated_postgres_database: Callable[[], str]) -> None:
    """In strict mode, where the audit table goes away while the tool runs."""
    settings = StoreSettings(audit_mode="strict")
    async with GatewayStore(migrated_postgres_database(), settings=settings) as store:
        server = Bench(store).server()

        @server.tool
        async def read_secret() -> str:
            async with store.database.write() as connection:
                await connection.execute(text("ALTER TABLE audit_events RENAME TO away"))
            return "the secret"

        refusal = await Bench(store).refusal(server, "read_secret")

    assert refusal == "The call could not be recorded, so its result is withheld: tell the operator."


@pytest.mark.parametrize("mode", ["spool", "strict"])
async def test_a_call_whose_tool_outlives_the_store_is_lost_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """Its result stands, but for the strict mode."""
    settings = StoreSettings.model_validate({"audit_mode": mode})
    async with GatewayStore(f"sqlite:///{tmp_path}/gateway.db", settings=settings) as store:
        server = Bench(store).server()

        @server.tool
        async def read_last() -> str:
            await store.close()
            return "done"

        if mode == "strict":
            assert "its result is withheld" in await Bench(store).refusal(server, "read_last")
        else:
            assert (await Bench(store).call(server, "read_last")).data == "done"

    lost = [each.getMessage() for each in caplog.records if each.name == "agent_gateway_store.audit.lost"]
    assert ["read_last" in each for each in lost] == [True] * (mode == "spool")


async def test_refusal_at_the_last_step_runs_nothing(migrated_postgres_database: Callable[[], str]) -> None:
    """Approved, but the store does not let it be used: the call does not run, and its approval is withdrawn."""
    skip = "CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$"
    when = "CREATE TRIGGER no_use BEFORE UPDATE ON approval_requests FOR EACH ROW WHEN (NEW.status = 'USED')"
    async with GatewayStore(migrated_postgres_database()) as store:
        bench = Bench(store)
        async with store.database.write() as connection:
            await connection.execute(text(skip))
            await connection.execute(text(f"{when} EXECUTE FUNCTION skip()"))
        waiting = asyncio.create_task(bench.refusal(bench.server(approval_timeout_s=20), "delete_file", path="a.txt"))
        asked = await bench.pending()
        await store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
        refusal = await waiting
        event = await bench.event()
        stored = await store.approvals.get(approval_id=asked.approval_id)

    assert refusal.startswith("The approval is not approved: it stands at APPROVED by alice")
    assert (bench.ran, event.decision, event.execution_status) == ([], "DENY", None)
    assert stored.status == "CANCELLED"
