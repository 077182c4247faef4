"""Redis on a real server: every entry ends, every fault is a miss, an outage costs one timeout per interval."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import redis.asyncio
import redis.exceptions
from cache_helpers import put

from agent_gateway_store.storage.cache import RedisClient, create_redis, delete, get_json, get_redis, set_json
from agent_gateway_store.storage.redis_cache import CacheEntry, RedisCache

NESTED: Any = "[" * 100_000


@pytest.fixture
async def client(fresh_redis_url: str) -> AsyncIterator[RedisClient]:
    async with create_redis(fresh_redis_url, timeout_s=5) as opened:
        yield opened


@pytest.mark.parametrize("value", [None, 0, {"a": [1.5, {"b": "\u20ac"}]}])
async def test_json_comes_back(client: RedisClient, value: Any) -> None:
    await set_json(client, "key", value, 60)

    assert await get_json(client, "key") == value
    assert await delete(client, "key") is True
    assert await delete(client, "key") is False
    assert await get_json(client, "key") is None


@pytest.mark.parametrize(("ttl", "milliseconds"), [(7.5, 7_500), (timedelta(minutes=2), 120_000)])
async def test_every_entry_has_an_end(client: RedisClient, ttl: Any, milliseconds: int) -> None:
    await set_json(client, "key", 1, ttl)

    assert milliseconds - 5_000 < await client.pttl("key") <= milliseconds


@pytest.mark.parametrize("ttl", [0, -0.001, math.nan, math.inf, timedelta()])
async def test_an_entry_without_an_end_is_refused(client: RedisClient, ttl: Any) -> None:
    with pytest.raises(ValueError, match="ttl must be above zero"):
        await set_json(client, "key", 1, ttl)
    if not isinstance(ttl, timedelta):
        with pytest.raises(ValueError, match="ttl must be above zero"):
            await put(RedisCache(client, timeout_s=5), {}, version=1, ttl_s=ttl)

    assert await client.exists("key") == 0


@pytest.mark.parametrize("value", [math.nan, {"a": math.inf}, {1, 2}, b"x"])
async def test_what_is_no_json_is_refused(client: RedisClient, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        await set_json(client, "key", value, 60)

    assert await client.exists("key") == 0


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff\xfe", b"nul", NESTED])
async def test_garbage_reads_as_absent(client: RedisClient, garbage: Any) -> None:
    await client.set("key", garbage)

    assert await get_json(client, "key") is None


async def test_get_redis_gives_a_client_or_none(monkeypatch: pytest.MonkeyPatch, fresh_redis_url: str) -> None:
    assert [found async for found in get_redis()] == [None]
    monkeypatch.setenv("REDIS_URL", fresh_redis_url)
    async for found in get_redis():
        assert found is not None
        await set_json(found, "key", 1, 60)
        await found.client_setname("given")
    async with redis.asyncio.from_url(fresh_redis_url) as client, asyncio.timeout(5):
        # The server sees the end of a connection a moment later.
        while "given" in [each["name"] for each in await client.client_list()]:
            await asyncio.sleep(0.01)


async def test_without_a_client_everything_is_a_miss() -> None:
    cache = RedisCache(None)
    await cache.delete("key")

    assert not cache.is_available
    assert await cache.get("key") is None
    assert await put(cache, {}, version=1, ttl_s=1) is False


async def test_an_entry_comes_back_with_its_remaining_life(client: RedisClient) -> None:
    cache = RedisCache(client, timeout_s=5)
    entry = {"version": 1, "text": "\u20ac"}

    assert await put(cache, entry, version=1, ttl_s=60) is True
    found = await cache.get("key")
    assert found is not None
    assert json.loads(found[0]) == entry
    assert 59_000 < found[1] <= 60_000
    await cache.delete("key")
    assert await cache.get("key") is None


async def test_an_older_version_never_replaces_a_newer_one(client: RedisClient) -> None:
    """The same version may be written again; in whatever order fifty writers come, the newest stays."""
    cache = RedisCache(client, timeout_s=5)
    for version, stored in ((5, True), (4, False), (5, True), (6, True), (1, False)):
        entry = {"version": version}
        assert await put(cache, entry, version=version, ttl_s=60) is stored
    versions = random.sample(range(10, 60), 50)
    await asyncio.gather(*(put(cache, {"version": v}, version=v, ttl_s=60) for v in versions))
    found = await cache.get("key")

    assert found is not None
    assert json.loads(found[0]) == {"version": 59}


@pytest.mark.parametrize("garbage", [b"", b"{", b"[1]", b"5", b'{"version":"99"}', b'{"version":null}', NESTED])
async def test_garbage_is_replaced(client: RedisClient, garbage: Any) -> None:
    await client.set("key", garbage)
    cache = RedisCache(client, timeout_s=5)

    assert await put(cache, {"version": 1}, version=1, ttl_s=60) is True
    assert await cache.get("key") == (b'{"version": 1}', pytest.approx(60_000, abs=500))


async def test_a_key_of_another_type_is_a_miss_and_replaced(
    client: RedisClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis answers with an error, which is the key's and no fault of the server: it stays in use."""
    await client.hset("key", "field", "value")
    cache = RedisCache(client, timeout_s=5)

    assert await cache.get("key") is None
    assert cache.is_available
    assert await put(cache, {"version": 1}, version=1, ttl_s=60) is True
    assert await cache.get("key") == (b'{"version": 1}', pytest.approx(60_000, abs=500))
    assert caplog.records == []


async def test_entries_and_a_message_go_in_one_round_trip(client: RedisClient) -> None:
    cache = RedisCache(client, timeout_s=5)
    await cache.put_newer([CacheEntry("key-0", '{"version": 1}', 1, 60)])
    async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
        await pubsub.subscribe("channel")
        before = (await client.info("stats"))["total_reads_processed"]
        entries = [CacheEntry(f"key-{number}", '{"version": 1}', 1, 60) for number in (1, 2)]
        assert await cache.put_newer(entries, message=("channel", "hello"))
        assert (await client.info("stats"))["total_reads_processed"] - before == 2  # one of them is this `info`
        async with asyncio.timeout(5):
            while (message := await pubsub.get_message(timeout=5)) is None:
                pass
        assert message["data"] == b"hello"
        assert await client.exists("key-0", "key-1", "key-2") == 3


async def test_what_many_tasks_put_shares_a_few_round_trips(client: RedisClient) -> None:
    cache = RedisCache(client, timeout_s=5)
    await cache.put_newer([CacheEntry("key-3", '{"version": 2}', 2, 60)])

    async def scripts() -> int:
        return int((await client.info("commandstats"))["cmdstat_evalsha"]["calls"])

    before = await scripts()
    async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
        await pubsub.subscribe("channel")
        puts = (
            cache.put_newer([CacheEntry(f"key-{number}", '{"version": 1}', 1, 60)], message=("channel", str(number)))
            for number in range(20)
        )
        stored = await asyncio.gather(*puts)
        heard = set()
        async with asyncio.timeout(5):
            while len(heard) < 20:
                if (message := await pubsub.get_message(timeout=5)) is not None:
                    heard.add(int(message["data"]))

    assert stored == [number != 3 for number in range(20)]
    # One for what came first, and one for all that came meanwhile.
    assert await scripts() - before <= 2


async def test_a_put_goes_on_without_the_task_that_was_cancelled(client: RedisClient) -> None:
    cache = RedisCache(client, timeout_s=5)
    tasks = [asyncio.create_task(cache.put_newer([CacheEntry(f"key-{n}", '{"version": 1}', 1, 60)])) for n in range(3)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await cache.join()

    assert await client.exists("key-0", "key-1", "key-2") == 3


async def test_a_message_goes_out_from_a_redis_whose_memory_is_full(client: RedisClient) -> None:
    cache = RedisCache(client, timeout_s=5)
    limit = (await client.config_get("maxmemory"))["maxmemory"]
    async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
        await pubsub.subscribe("channel")
        await client.config_set("maxmemory", 1)
        try:
            entry = CacheEntry("key", '{"version": 1}', 1, 60)
            assert await cache.put_newer([entry], message=("channel", "hello")) is False
        finally:
            await client.config_set("maxmemory", limit)
        async with asyncio.timeout(5):
            while (message := await pubsub.get_message(timeout=5)) is None:
                pass

    assert message["data"] == b"hello"
    assert cache.is_available


async def test_a_redis_that_forgot_the_scripts_is_given_them_again(client: RedisClient) -> None:
    cache = RedisCache(client, timeout_s=5)
    assert await cache.put_newer([CacheEntry("key", '{"version": 1}', 1, 60)])
    await client.script_flush()

    assert await cache.get("key") == (b'{"version": 1}', pytest.approx(60_000, abs=5_000))
    assert await cache.put_newer([CacheEntry("key", '{"version": 2}', 2, 60)])


async def test_what_is_larger_than_any_entry_is_not_fetched(client: RedisClient) -> None:
    """Whoever can write to Redis would otherwise cost a reader its memory, and the time to parse it."""
    cache = RedisCache(client, timeout_s=20)
    await client.set("key", b"x" * (2**23 + 1), px=60_000)

    assert await cache.get("key") is None
    assert await put(cache, {"version": 1}, version=1, ttl_s=60)


@pytest.mark.parametrize("decode_responses", [False, True])
async def test_a_client_of_the_hosts_own_kind_serves_as_well(fresh_redis_url: str, decode_responses: bool) -> None:
    class Unusual(redis.asyncio.Connection):
        async def read_response(self, *args: Any, **options: Any) -> Any:
            return await super().read_response(*args, **options)

    for kind in (redis.asyncio.Connection, Unusual):
        options = {"decode_responses": decode_responses, "connection_class": kind}
        pool = redis.asyncio.ConnectionPool.from_url(fresh_redis_url, **options)
        async with redis.asyncio.Redis(connection_pool=pool) as host:
            cache = RedisCache(host, timeout_s=5)
            assert await put(cache, {"version": 1}, version=1, ttl_s=60) is True
            found = await cache.get("key")
            assert found is not None
            assert json.loads(found[0]) == {"version": 1}
            await host.set("key", b"\xff\xfe")
            await cache.get("key")
            await host.delete("key")
            await host.lpush("key", "x")
            assert await cache.get("key") is None
            assert cache.is_available
            await cache.delete("key")
        await pool.aclose()


async def test_a_crowd_waits_in_line(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A thousand readers at once are answered through the connections that there may be, 32 of them at most; where the
    host itself uses all of its pool they are told to ask SQL, and that is not taken for a fault of Redis."""
    for allowed, most in ((1, 1), (1_000, 32)):
        pool = redis.asyncio.ConnectionPool.from_url(redis_url, max_connections=allowed)
        async with redis.asyncio.Redis(connection_pool=pool) as host:
            await host.set("key", "value", px=60_000)
            cache = RedisCache(host, timeout_s=5)
            before = (await host.info("stats"))["total_connections_received"]
            answers = await asyncio.gather(*(cache.get("key") for _ in range(1_000)))
            opened = (await host.info("stats"))["total_connections_received"] - before
            assert {answer and answer[0] for answer in answers} == {b"value"}
            assert opened < most
            if allowed == 1:
                taken = await pool.get_connection()
                assert await cache.get("key") is None
                await pool.release(taken)
            assert cache.is_available
        await pool.aclose()

    assert caplog.records == []
