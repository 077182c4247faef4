"""The statements of the outbox are planned for the rows they touch, whatever the planner knows of the table."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest
from contract_helpers import until
from delivery_helpers import Post, quiet
from sqlalchemy import event

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.storage import statements
from builders import CALL, make_request

pytestmark = pytest.mark.usefixtures("no_plugins")

_LOOKS_BACK = re.compile(r'AS "?before\b')
_BY_APPROVAL = "ix_notification_deliveries_approval_id"


async def quiet_times(store: GatewayStore) -> None:
    """Let the planner of PostgreSQL know of nothing but an empty table."""
    if store.database.dialect == "postgresql":
        async with store.database.write() as connection:
            await connection.exec_driver_sql("ANALYZE notification_deliveries")


def explained(store: GatewayStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plans of the statements on deliveries that look for earlier ones, as they are run."""
    plans: list[str] = []
    run = statements.CompiledStatement.run

    async def explaining(compiled: statements.CompiledStatement, driver: Any, values: Any) -> Any:
        if _LOOKS_BACK.search(compiled.text):
            given = compiled.arguments(values)
            plans.append("\n".join(row[0] for row in await driver.fetch(f"EXPLAIN {compiled.text}", *given)))
        return await run(compiled, driver, values)

    def explain(_connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if _LOOKS_BACK.search(statement):
            cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans.append("\n".join(row[3] for row in cursor.fetchall()))

    if store.database.dialect == "postgresql":
        monkeypatch.setattr(statements.CompiledStatement, "run", explaining)
    else:
        event.listen(store.database.engine.sync_engine, "before_cursor_execute", explain)
    return plans


async def test_earlier_notices_are_looked_for_by_approval(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claiming and deciding, also when the backlog has come since the planner last looked."""
    async with GatewayStore(database_url, redis_url="", plugins=[Post()], settings=quiet()) as asking:
        await quiet_times(asking)
        tokens = []
        # Few for SQLite, which plans without counting.
        crowds = 20 if asking.database.dialect == "postgresql" else 2
        for _ in range(crowds):
            tokens += await asyncio.gather(*(asking.approvals.issue_token(make_request()) for _ in range(20)))
    sends = StoreSettings(notification_poll_seconds=600)
    async with GatewayStore(database_url, redis_url="", plugins=[Post()], settings=sends) as store:
        plans = explained(store, monkeypatch)
        await store.approvals.approve(tokens[0], "alice")
        assert await store.notifications.run(once=True) == 20 * crowds + 1

    assert len(plans) >= 3  # as the row is written, as its own approval is looked at, and as all are
    for plan in plans:
        about_earlier = [line for line in plan.splitlines() if " before" in line or f"on {_BY_APPROVAL}" in line]
        assert any(_BY_APPROVAL in line for line in about_earlier), plan
        assert not any("status_notifier" in line or "Seq Scan" in line for line in about_earlier), plan


_BACKLOG = 20_000  # read whole, it costs the planner some hundred times what a few looks by index do
_FILL = f"""
    ALTER TABLE notification_deliveries SET (autovacuum_enabled = off);
    INSERT INTO notification_deliveries (delivery_id, org_id, approval_id, notifier, event, payload, status, attempts,
        next_attempt_at, created_at)
    SELECT gen_random_uuid(), 'default', gen_random_uuid(), 'log', 'pending', '{{}}', 'DUE', 1,
        now() + interval '1 day', now()
    FROM generate_series(1, {_BACKLOG})
"""


async def plans_of(driver: Any, sql: str, given: list[Any]) -> list[str]:
    """The plan for these parameters, and the one for any."""
    types = [found.name for found in (await driver.prepare(sql)).get_parameters()]
    await driver.execute("SET plan_cache_mode = force_generic_plan")
    await driver.execute(f"PREPARE any_parameters ({', '.join(types)}) AS {sql}")
    generic = await driver.fetch(f"EXPLAIN EXECUTE any_parameters ({', '.join(['NULL'] * len(types))})")
    await driver.execute("DEALLOCATE any_parameters; RESET plan_cache_mode")
    custom = await driver.fetch(f"EXPLAIN {sql}", *given)
    return ["\n".join(row[0] for row in plan) for plan in (custom, generic)]


async def _are_sent(store: GatewayStore) -> bool:
    async with store.database.read() as connection:
        count = "SELECT count(*) FROM notification_deliveries WHERE status = 'DELIVERED'"
        return bool((await connection.exec_driver_sql(count)).scalar_one() == 4)


async def test_no_statement_is_compiled_or_reads_the_whole_outbox(
    migrated_postgres_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the notifiers that are installed, on a full outbox that PostgreSQL has never analysed."""
    monkeypatch.delenv("AGENT_GATEWAY_STORE_LOAD_PLUGINS")
    plans: list[tuple[str, str]] = []
    run = statements.CompiledStatement.run

    async def explaining(compiled: statements.CompiledStatement, driver: Any, values: Any) -> Any:
        if "notification_deliveries" in compiled.text:
            given = compiled.arguments(values)
            plans.extend((compiled.text, plan) for plan in await plans_of(driver, compiled.text, given))
        return await run(compiled, driver, values)

    settings = StoreSettings(notification_poll_seconds=0.1)
    async with GatewayStore(migrated_postgres_database(), redis_url="", settings=settings) as store:
        async with store.database.write() as connection:
            for statement in _FILL.split(";"):
                await connection.exec_driver_sql(statement)
            limit = float((await connection.exec_driver_sql("SHOW jit_above_cost")).scalar_one())
        monkeypatch.setattr(statements.CompiledStatement, "run", explaining)
        approved, denied = [await store.approvals.issue_token(make_request()) for _ in range(2)]
        await store.approvals.approve(approved, "alice")
        await store.approvals.deny(denied, "alice", "no")
        await store.approvals.consume_token(approved, caller_id="dev-agent", tool_call=CALL)
        await until(lambda: _are_sent(store))

    assert len({sql for sql, _ in plans}) >= 5  # asked, decided, looked for, claimed, written down
    for sql, plan in plans:
        assert max(float(cost) for cost in re.findall(r"\.\.([\d.]+) rows", plan)) < limit, plan
        assert "Seq Scan on notification_deliveries" not in plan, plan
        # By this index a look for a few approvals goes through a whole backlog.
        assert "UUID[]" not in sql or "status_notifier" not in plan, plan
