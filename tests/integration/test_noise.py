"""What the log does not hold: leftovers of cancelled reads, and a line for each try of a Redis that is dead."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from database_helpers import opened

import servers
from agent_gateway_store.storage import errors
from agent_gateway_store.storage.asyncpg_pool import RawConnection
from agent_gateway_store.storage.cache import create_redis
from agent_gateway_store.storage.database import Database, create_engine
from agent_gateway_store.storage.pubsub import PubSub
from agent_gateway_store.storage.redis_cache import RedisCache
from proofs.harness import eventually


async def read(database: Database, *, raw: bool) -> None:
    if raw:
        async with database.connection("read"):
            return
    async with database.read():
        return


@pytest.mark.parametrize("raw", [False, True])
async def test_a_cancelled_read_leaves_no_exception_behind(postgres_url: str, raw: bool) -> None:
    """At whichever step of connecting it is cancelled; the connection that it began is closed."""
    loop, found = asyncio.get_running_loop(), list[dict[str, Any]]()
    loop.set_exception_handler(lambda _, context: found.append(context))
    for steps in range(80):
        database = opened(postgres_url)
        reading = asyncio.create_task(read(database, raw=raw))
        for _ in range(steps):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        await database.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others)
    gc.collect()
    await asyncio.sleep(0)

    assert found == []


@pytest.mark.parametrize("raw", [False, True])
async def test_a_read_that_anyio_cancels_logs_no_error(
    postgres_url: str, caplog: pytest.LogCaptureFixture, raw: bool
) -> None:
    """It cancels again while the connection is dropped: as under Starlette, FastMCP and the SDK of MCP."""
    database = opened(postgres_url)
    for _ in range(5):
        with anyio.move_on_after(0.05) as scope:
            await sleep(database, raw=raw)
        assert scope.cancelled_caught
    await read(database, raw=raw)
    await database.close()

    assert caplog.records == []


async def sleep(database: Database, *, raw: bool) -> None:
    if raw:
        async with database.connection("read") as connection:
            assert isinstance(connection, RawConnection)
            await connection.driver.execute("SELECT pg_sleep(10)")
    else:
        async with database.read() as connection:
            await connection.exec_driver_sql("SELECT pg_sleep(10)")


async def test_a_dead_redis_is_one_line_a_minute_and_one_when_it_is_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "agent_gateway_store")
    minutes = 0
    moved = SimpleNamespace(monotonic=lambda: time.monotonic() + 60 * minutes)
    monkeypatch.setattr(errors, "time", moved)
    database = Database(create_engine("sqlite://"), owned=True)
    with servers.RedisServer() as server:
        async with create_redis(server.url) as client:
            cache = RedisCache(client, pause_s=0)
            pubsub = PubSub(cache, database)
            pubsub.subscribe("key:", lambda _: None)
            await eventually(lambda: told(pubsub.is_live))
            server.kill()
            await eventually(lambda: told(not pubsub.is_live))
            for minutes in (0, 1):  # noqa: B007  # `moved` reads it
                for _ in range(50):
                    await cache.get("key")
            server.start()
            await eventually(lambda: cache.publish("channel", "text"))
            await eventually(lambda: told(pubsub.is_live))
            await pubsub.close()
    await database.close()
    lines = [record.getMessage() for record in caplog.records]

    assert len(lines) == 3
    assert all("for now" in line or "does not answer" in line for line in lines[:2])
    assert lines[2] in ("Redis answers again.", "Subscribed again.")


async def told(value: bool) -> bool:
    return value
