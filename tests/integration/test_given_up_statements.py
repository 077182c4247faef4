"""A statement that we gave up on, as it waits for a lock, does not stay on the server and take up its connections."""

from __future__ import annotations

import pytest

import servers
from agent_gateway_store.storage.asyncpg_pool import AsyncpgPool
from agent_gateway_store.storage.database import create_engine
from proofs.harness import eventually

LOCK = "SELECT pg_advisory_lock(77)"
WAITING = f"SELECT count(*) FROM pg_stat_activity WHERE query = '{LOCK}' AND wait_event = 'advisory'"


@pytest.mark.system
async def test_backends_that_wait_for_a_lock_end_after_us(postgres_url: str) -> None:
    """Each time-out closes a connection; its backend sees that within seconds, and is gone."""
    engine = create_engine(postgres_url)
    pool = AsyncpgPool(engine, size=2)
    try:
        async with servers.connected(postgres_url) as other:
            await other.execute(LOCK)
            for _ in range(4):
                with pytest.raises(TimeoutError):
                    async with pool.connection(0.3) as driver:
                        await driver.execute(LOCK)

            async def are_gone() -> bool:
                return await other.fetchval(WAITING) == 0

            assert await eventually(are_gone, timeout_s=10) < 10
    finally:
        await pool.close()
        await engine.dispose()
