"""The lock of retention is in a connection of its own. Where that ends, a hold is still what it says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

import servers
from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.errors import GatewayStoreError
from builders import make_event

OLD = datetime(2025, 3, 1, 12, tzinfo=UTC)
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
END_HOLDER = """
SELECT count(pg_terminate_backend(pid)) FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database
WHERE locktype = 'advisory' AND granted AND datname = current_database()
"""


@pytest.mark.parametrize("work", ["erase", "prune"])
async def test_no_hold_is_in_force_before_the_work_has_ended(
    migrated_postgres_database: Callable[[], str], work: str
) -> None:
    """The rows are blanked or deleted before `hold` returns, or not at all."""
    url = migrated_postgres_database()
    settings = StoreSettings(audit_seal_seconds=0)
    opened = (GatewayStore(url, redis_url="", settings=settings) for _ in range(2))
    async with next(opened) as store, next(opened) as other, servers.connected(url) as driver:
        await store.audit.write_many(make_event(request_id=name, timestamp=OLD) for name in ("r-1", "r-2"))
        await store.audit.write(make_event(request_id="newest"))
        await store.evidence.seal()
        async with servers.connected(url) as blocker:
            transaction = blocker.transaction()
            await transaction.start()
            await blocker.execute("SELECT FROM audit_events WHERE request_id = 'r-1' FOR UPDATE")
            working = asyncio.create_task(
                store.retention.erase("r-1", reason="r", by="dpo")
                if work == "erase"
                else store.retention.prune("400d", by="ops", discard=True)
            )
            while not await driver.fetchval(WAITING):
                await asyncio.sleep(0.01)
            assert await driver.fetchval(END_HOLDER) == 1
            holding = asyncio.create_task(other.retention.hold("case", reason="r", by="counsel"))
            while await driver.fetchval(WAITING) < 2:
                assert not holding.done()
                await asyncio.sleep(0.01)
            await transaction.rollback()
            await asyncio.wait([working, holding])
        assert holding.result().name == "case"
        before = await driver.fetch("SELECT * FROM audit_events WHERE request_id IN ('r-1', 'r-2') ORDER BY id")
        with pytest.raises(GatewayStoreError):
            await store.retention.erase("r-2", reason="r", by="dpo")
        await store.retention.prune("400d", by="ops", discard=True)
        after = await driver.fetch("SELECT * FROM audit_events WHERE request_id IN ('r-1', 'r-2') ORDER BY id")
    assert before == after
