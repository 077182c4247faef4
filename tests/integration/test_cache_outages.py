"""A Redis that hangs or is away costs one timeout, whoever's client it is."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis.asyncio
import redis.exceptions
from cache_helpers import put

import servers
from agent_gateway_store.storage import errors
from agent_gateway_store.storage import redis_cache as redis_cache_module
from agent_gateway_store.storage.cache import create_redis, delete, get_json, set_json
from agent_gateway_store.storage.redis_cache import RedisCache


@pytest.fixture(scope="module")
def own_server() -> Iterator[servers.RedisServer]:
    with servers.RedisServer() as server:
        yield server


@pytest.fixture
def pausable(own_server: servers.RedisServer) -> Iterator[servers.RedisServer]:
    yield own_server
    own_server.resume()


async def timed(awaitable: Any) -> tuple[Any, float]:
    started = time.monotonic()
    try:
        result = await awaitable
    except Exception as exc:
        result = exc
    return result, time.monotonic() - started


@pytest.mark.parametrize("connected", [True, False])
async def test_a_server_that_hangs_costs_one_timeout(pausable: servers.RedisServer, connected: bool) -> None:
    async with create_redis(pausable.url, timeout_s=0.2) as client:
        if connected:
            await client.ping()
        pausable.pause()
        answers = [
            await timed(get_json(client, "key")),
            await timed(set_json(client, "key", 1, 60)),
            await timed(delete(client, "key")),
        ]
        pausable.resume()
        await set_json(client, "key", 2, 60)

        assert await get_json(client, "key") == 2
    for error, seconds in answers:
        assert isinstance(error, redis.exceptions.TimeoutError)
        assert 0.15 < seconds < 2  # with redis-py's own ten retries it would be more


async def test_a_refused_port_costs_nothing() -> None:
    async with create_redis("redis://127.0.0.1:1") as client:
        error, seconds = await timed(get_json(client, "key"))

    assert isinstance(error, redis.exceptions.ConnectionError)
    assert seconds < 2  # with redis-py's own ten retries it would be more


@pytest.mark.parametrize("connected", [True, False])
async def test_a_patient_client_of_the_host_is_not_waited_for(pausable: servers.RedisServer, connected: bool) -> None:
    """A server that hangs costs our timeout, not the five seconds and ten retries of redis-py's default client."""
    async with redis.asyncio.Redis.from_url(pausable.url) as host:
        if connected:
            await host.ping()
        cache = RedisCache(host, timeout_s=0.2)
        pausable.pause()
        found, seconds = await timed(cache.get("key"))
        pausable.resume()

        assert found is None
        assert not cache.is_available
        assert await host.ping()
    assert 0.15 < seconds < 5


async def test_an_outage_costs_one_timeout_per_interval(
    pausable: servers.RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a fault Redis is left alone for a while, then tried again, and used when it is back."""
    intervals = 0
    moved = SimpleNamespace(monotonic=lambda: time.monotonic() + 60 * intervals)
    for module in (redis_cache_module, errors):
        monkeypatch.setattr(module, "time", moved)
    async with create_redis(pausable.url, timeout_s=0.5) as client:
        cache = RedisCache(client, timeout_s=0.5, pause_s=60)
        assert await put(cache, {"version": 1}, version=1, ttl_s=60)
        pausable.pause()
        found, first = await timed(cache.get("key"))
        meanwhile = [
            await timed(cache.get("key")),
            await timed(put(cache, {}, version=2, ttl_s=60)),
            await timed(cache.delete("key")),
        ]
        assert not cache.is_available
        intervals = 1
        assert cache.is_available
        again, second = await timed(cache.get("key"))
        pausable.resume()
        intervals = 2
        back = await cache.get("key")

    assert found is again is None
    assert 0.4 < first < 5
    assert 0.4 < second < 5
    assert [result for result, _ in meanwhile] == [None, False, False]
    assert sum(seconds for _, seconds in meanwhile) < 0.5
    assert back is not None
    assert json.loads(back[0]) == {"version": 1}
    lines = [record.getMessage() for record in caplog.records]
    assert ["does not answer" in line for line in lines] == [True, True, False]
    assert lines[2] == "Redis answers again."
    assert "key" not in caplog.text


async def test_a_cancelled_caller_is_cancelled(pausable: servers.RedisServer) -> None:
    async with create_redis(pausable.url, timeout_s=5) as client:
        cache = RedisCache(client, timeout_s=5)
        await client.ping()
        pausable.pause()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(cache.get("key"), 0.05)
        pausable.resume()

        assert cache.is_available
        assert await put(cache, {"version": 1}, version=1, ttl_s=60)
