"""The statements of the outbox are planned for the rows they touch, whatever the planner knows of the table."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from contract_helpers import POSTGRES
from delivery_helpers import Post, quiet

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.storage import statements
from builders import make_request

pytestmark = [POSTGRES, pytest.mark.usefixtures("no_plugins")]

_LOOKS_BACK = re.compile(r'AS "?before\b')
_BY_APPROVAL = "ix_notification_deliveries_approval_id"


async def quiet_times(store: GatewayStore) -> None:
    """Let the planner know of nothing but an empty table."""
    async with store.database.write() as connection:
        await connection.exec_driver_sql("ANALYZE notification_deliveries")


def explained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plans of the statements on deliveries that look for earlier ones, as they are run."""
    plans: list[str] = []
    run = statements.CompiledStatement.run

    async def explaining(compiled: statements.CompiledStatement, driver: Any, values: Any) -> Any:
        if _LOOKS_BACK.search(compiled.text):
            given = compiled.arguments(values)
            plans.append("\n".join(row[0] for row in await driver.fetch(f"EXPLAIN {compiled.text}", *given)))
        return await run(compiled, driver, values)

    monkeypatch.setattr(statements.CompiledStatement, "run", explaining)
    return plans


async def test_earlier_notices_are_looked_for_by_approval(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claiming and deciding, also when the backlog has come since the planner last looked."""
    async with GatewayStore(database_url, redis_url="", plugins=[Post()], settings=quiet()) as asking:
        await quiet_times(asking)
        tokens = []
        for _ in range(10):
            tokens += await asyncio.gather(*(asking.approvals.issue_token(make_request()) for _ in range(20)))
    sends = StoreSettings(notification_poll_seconds=600)
    async with GatewayStore(database_url, redis_url="", plugins=[Post()], settings=sends) as store:
        plans = explained(monkeypatch)
        await store.approvals.approve(tokens[0], "alice")
        assert await store.notifications.run(once=True) == 10 * 20 + 1

    assert len(plans) >= 3  # as the row is written, as its own approval is looked at, and as all are
    for plan in plans:
        about_earlier = [line for line in plan.splitlines() if " before" in line or f"on {_BY_APPROVAL}" in line]
        assert any(_BY_APPROVAL in line for line in about_earlier), plan
        assert not any("status_notifier" in line or "Seq Scan" in line for line in about_earlier), plan
