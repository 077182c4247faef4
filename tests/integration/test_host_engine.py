"""An engine that the host hands in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from agent_gateway_store import GatewayStore
from agent_gateway_store.storage.database import Database

pytestmark = pytest.mark.integration


def test_an_engine_that_shares_one_connection_is_refused() -> None:
    """Its tasks would commit and roll back each other's transactions; the error says what to hand in instead."""
    with pytest.raises(ValueError, match=r"StaticPool.*give the URL sqlite://"):
        GatewayStore(engine=create_async_engine("sqlite+aiosqlite://"))


@pytest.mark.parametrize(
    ("limits", "most"), [({"pool_size": 2, "max_overflow": 1}, 3), ({"pool_size": 1, "max_overflow": 0}, 1)]
)
async def test_the_size_of_its_pool_limits_the_drivers_connections_too(
    postgres_database: Callable[[], str], limits: dict[str, Any], most: int
) -> None:
    """A host that gives the store three connections does not find twenty in use."""
    engine = create_async_engine(postgres_database(), **limits)
    database = Database(engine, owned=False)
    database.bind_to_loop()
    in_use: set[object] = set()
    seen: list[int] = []

    async def use() -> None:
        async with database.connection("read") as runner:
            in_use.add(runner)
            seen.append(len(in_use))
            await runner.driver.fetch("SELECT pg_sleep(0.02)")  # type: ignore[union-attr]
            in_use.remove(runner)

    await asyncio.gather(*(use() for _ in range(12)))
    await database.close()
    await engine.dispose()

    assert max(seen) == most
