"""Waits beside servers that hang, are cut off without a word, flood or refuse: they end in time with what is known."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import pairwise

import pytest
import redis.asyncio
from sqlalchemy import make_url

import servers
from agent_gateway_store import GatewayStore
from agent_gateway_store.storage import pubsub
from agent_gateway_store.storage.cache import create_redis
from agent_gateway_store.store import parts_of
from builders import make_request
from proofs.harness import eventually

pytestmark = pytest.mark.system


async def test_a_wait_ends_though_the_database_hangs() -> None:
    """What was seen before stands: PENDING, soon after the timeout, and the approval can be decided later."""
    with servers.PostgresServer() as server:
        async with GatewayStore(server.url, redis_url="", auto_migrate=True) as store:
            token = await store.approvals.issue_token(make_request())
            waiting = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=2))
            await asyncio.sleep(1)
            await asyncio.to_thread(server.pause)
            started = time.monotonic()
            try:
                result = await asyncio.wait_for(waiting, 60)
            finally:
                server.resume()
            took_s = time.monotonic() - started

            assert result.status == "PENDING"
            assert took_s < 8
            assert (await store.approvals.approve(token, "approver-1")).status == "APPROVED"


@asynccontextmanager
async def forgetful_proxy(port: int) -> AsyncIterator[tuple[int, Callable[[], None]]]:
    """Lead to `port`, until told to pass on nothing more on the connections that there are, which stay open."""
    tasks: set[asyncio.Task[None]] = set()
    forgotten: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                if asyncio.current_task() not in forgotten:
                    writer.write(data)
                    await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection("127.0.0.1", port)
        for pair in ((reader, ours), (theirs, writer)):
            tasks.add(asyncio.create_task(pump(*pair)))

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], lambda: forgotten.update(tasks)
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("through", ["redis", "postgres"])
async def test_a_subscription_that_nobody_answers_is_made_again(
    through: str, migrated_postgres_database: Callable[[], str], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy, or a network, that forgets a connection tells neither end."""
    monkeypatch.setattr(pubsub, "_CHECK_S", 0.5)
    database, url = migrated_postgres_database(), redis_url if through == "redis" else ""
    proxied = make_url(url or database)
    assert proxied.port
    async with forgetful_proxy(proxied.port) as (port, forget):
        given = proxied.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        mine = GatewayStore(database, redis_url=given) if url else GatewayStore(given, redis_url="")
        async with mine as store, GatewayStore(database, redis_url=url) as other:
            token = await store.approvals.issue_token(make_request())
            waiting = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=60))
            live = parts_of(store).pubsub
            await eventually(lambda: asyncio.sleep(0, live.is_live))
            forget()
            await eventually(lambda: asyncio.sleep(0, not live.is_live))
            await eventually(lambda: asyncio.sleep(0, live.is_live))
            monkeypatch.setattr(pubsub.PubSub, "poll_s", 60.0)
            await asyncio.sleep(2)
            assert live.is_live  # one that is answered stays
            await other.approvals.approve(token, "approver-1")
            assert (await asyncio.wait_for(waiting, 10)).status == "APPROVED"


async def test_a_flood_of_messages_leaves_turns_to_others(
    migrated_postgres_database: Callable[[], str], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can publish costs the gateway time, and does not stop its event loop."""
    seen: list[str] = []
    monkeypatch.setattr(pubsub.PubSub, "notify_local", lambda _, key: seen.append(key))
    database = migrated_postgres_database()
    async with GatewayStore(database, redis_url=redis_url) as store, create_redis(redis_url, timeout_s=20) as client:
        parts_of(store).pubsub.subscribe("", lambda _: None)
        await eventually(lambda: asyncio.sleep(0, parts_of(store).pubsub.is_live))
        async with client.pipeline(transaction=False) as pipeline:
            for _ in range(3000):
                pipeline.publish(pubsub.CHANNEL, "flood")
            await pipeline.execute()
        turns = [0]
        while turns[-1] < 3000:
            await asyncio.sleep(0)
            turns.append(seen.count("flood"))
    assert max(later - earlier for earlier, later in pairwise(turns)) < 10


async def test_a_subscription_that_redis_refuses_is_not_called_one(
    migrated_postgres_database: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    with servers.RedisServer() as server:
        async with redis.asyncio.Redis(port=server.port) as client:
            await client.execute_command("ACL", "SETUSER", "gateway", "on", ">secret", "resetchannels", "+ping")
        url = f"redis://gateway:secret@127.0.0.1:{server.port}/0"
        async with GatewayStore(migrated_postgres_database(), redis_url=url) as store:
            token = await store.approvals.issue_token(make_request())
            waiting = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=60))
            caplog.set_level(logging.INFO, "agent_gateway_store.redis")
            for _ in range(25):
                await asyncio.sleep(0.1)
                assert not parts_of(store).pubsub.is_live
            await store.approvals.approve(token, "approver-1")
            assert (await waiting).status == "APPROVED"
    assert "Subscribed" not in caplog.text
