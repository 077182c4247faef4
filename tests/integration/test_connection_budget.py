"""DATABASE_POOL_SIZE: all connections of a store together stay below it, and those that are idle are given back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

import servers
from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.storage import asyncpg_pool
from builders import make_event
from proofs.harness import eventually

MINE = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


@pytest.mark.parametrize("size", [7, 15])
async def test_a_store_stays_within_its_connections(
    migrated_postgres_database: Callable[[], str], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under reads and writes of both kinds at once; a while later few are left, and the store works on."""
    monkeypatch.setattr(asyncpg_pool, "IDLE_S", 0.2)
    url = migrated_postgres_database()
    settings = StoreSettings(database_pool_size=size, notification_worker=False)
    async with servers.connected(url) as observer, GatewayStore(url, redis_url="", settings=settings) as store:
        most = 0

        async def look() -> None:
            nonlocal most
            while True:
                most = max(most, await observer.fetchval(MINE))

        looking = asyncio.create_task(look())
        share = (size - 3) // 2
        async with AsyncExitStack() as held:
            for number in range(share):
                await held.enter_async_context(store.database.connection("read"))
                if number:
                    # The engine makes each connection, also of the other kind, so one of its places stays free.
                    await held.enter_async_context(store.database.read())
            await asyncio.gather(*(store.audit.write(make_event()) for _ in range(200)))
        await asyncio.gather(*(store.audit.list_recent() for _ in range(50)), *(store.audit.stats() for _ in range(50)))
        looking.cancel()
        await asyncio.wait([looking])

        async def few_are_left() -> bool:
            return int(await observer.fetchval(MINE)) <= 3 + share // 2

        assert 2 * share - 1 <= most <= size
        await eventually(few_are_left)
        assert len(await store.audit.list_recent(1)) == 1
