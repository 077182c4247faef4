"""Closing a database: what is idle, what is lent, and a server that does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from database_helpers import opened

import servers
from agent_gateway_store.storage import database as database_module


@pytest.mark.system
async def test_a_server_that_hangs_does_not_hold_up_the_close() -> None:
    """Its idle connections are given up together, not each after the timeout of a command."""
    with servers.PostgresServer() as server:
        database = opened(server.url)
        all_lent = asyncio.Barrier(12)

        async def use_pool() -> None:
            async with database.read() as connection:
                await connection.exec_driver_sql("SELECT 1")
                await all_lent.wait()

        async def use_driver() -> None:
            async with database.connection("read") as runner:
                await runner.driver.fetch("SELECT 1")  # type: ignore[union-attr]
                await all_lent.wait()

        await asyncio.gather(*(use() for use in [use_pool, use_driver] * 6))
        await asyncio.to_thread(server.pause)
        try:
            async with asyncio.timeout(10):
                await database.close()
        finally:
            server.resume()


async def test_what_is_lent_at_the_close_is_closed_when_it_comes_back(
    postgres_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that outlives the patience of `close` ends as it would have, and leaves no connection behind."""
    monkeypatch.setattr(database_module, "_LAST_TRANSACTIONS_S", 0.1)
    database = opened(postgres_database())
    lent, closed = asyncio.Event(), asyncio.Event()

    async def use() -> object:
        async with database.connection("read") as runner:
            lent.set()
            await closed.wait()
            driver = runner.driver  # type: ignore[union-attr]
            assert await driver.fetchval("SELECT 1") == 1
        return driver

    task = asyncio.create_task(use())
    await lent.wait()
    await database.close()
    closed.set()

    assert (await task).is_closed()  # type: ignore[attr-defined]
