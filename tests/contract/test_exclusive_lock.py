"""One at a time in all processes: what prunes, erases or ships lets go of its lock however it ends."""

from __future__ import annotations

import asyncio
import gc

import pytest

from agent_gateway_store import GatewayStore
from agent_gateway_store.retention.manager import retention_lock


@pytest.mark.parametrize("while_asking", [True, False], ids=["in a statement", "between two statements"])
async def test_a_cancelled_holder_lets_go(store: GatewayStore, other: GatewayStore, while_asking: bool) -> None:
    """Whoever is cancelled holds the lock no longer, also in the middle of a statement, and without the collector."""
    held = asyncio.Event()

    async def hold() -> None:
        async with retention_lock(store.database)() as still_held:
            held.set()
            while True:
                await (still_held() if while_asking else asyncio.sleep(60))
                await asyncio.sleep(0)

    gc.disable()
    try:
        for _ in range(5):
            held.clear()
            holder = asyncio.create_task(hold())
            await held.wait()
            await asyncio.sleep(0.05)
            holder.cancel()
            with pytest.raises(asyncio.CancelledError):
                await holder
            async with asyncio.timeout(5), retention_lock(other.database)():
                pass
    finally:
        gc.enable()
