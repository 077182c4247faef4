"""Redis with Sentinel is followed through a failover; a Redis Cluster is refused, or recognised and left alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.sentinel import Sentinel
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store import ApprovalManager, GatewayStore
from agent_gateway_store.storage.cache import create_redis
from agent_gateway_store.storage.database import create_engine
from agent_gateway_store.storage.redis_cache import CacheEntry, RedisCache
from builders import make_request
from commands import gateway_store
from proofs.harness import eventually
from servers import RedisServer, SentinelServer

pytestmark = pytest.mark.system


async def put(cache: RedisCache, version: int) -> bool:
    return await cache.put_newer([CacheEntry("key", f'{{"version": {version}}}', version, 60)])


@pytest.fixture
def trio() -> Iterator[tuple[RedisServer, list[SentinelServer]]]:
    """A master with two replicas, and three sentinels."""
    with ExitStack() as stack:
        master = stack.enter_context(RedisServer())
        for _ in range(2):
            options = ("--replicaof", "127.0.0.1", str(master.port), "--repl-diskless-sync-delay", "0")
            stack.enter_context(RedisServer(options=options))
        sentinels = [stack.enter_context(SentinelServer(master, quorum=2)) for _ in range(3)]
        yield master, sentinels


async def know_each_other(sentinels: list[SentinelServer]) -> None:
    async def do_they() -> bool:
        for sentinel in sentinels:
            async with Redis(port=sentinel.port) as client:
                found = (await client.sentinel_masters())["gateway"]
            if (found["num-slaves"], found["num-other-sentinels"]) != (2, 2):
                return False
        return True

    await eventually(do_they, 30)


@pytest.mark.parametrize("given", ["url", "client"])
async def test_a_sentinel_leads_to_the_new_master(
    trio: tuple[RedisServer, list[SentinelServer]], migrated_postgres_database: Callable[[], str], given: str
) -> None:
    """The master is killed, and one sentinel hangs: decisions go on, and the new master is used."""
    master, sentinels = trio
    await know_each_other(sentinels)
    addresses = [("127.0.0.1", sentinel.port) for sentinel in sentinels]
    url = f"redis+sentinel://{','.join(f'{host}:{port}' for host, port in addresses)}/gateway/1"
    own = Sentinel(addresses)
    client = create_redis(url) if given == "url" else own.master_for("gateway", db=1)
    database = migrated_postgres_database()
    async with client, GatewayStore(database, redis=client) as store, GatewayStore(database, redis_url=url) as other:
        for name in ("before", "after"):
            token = await store.approvals.issue_token(make_request(request_id=name))
            waiting = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=60))
            if name == "after":
                await asyncio.to_thread(master.kill)
                if given == "url":  # how long a client of the host's waits for a sentinel is the host's to say
                    sentinels[0].pause()
            assert (await other.approvals.approve(token, "approver-1")).status == "APPROVED"
            assert (await asyncio.wait_for(waiting, 30)).status == "APPROVED"
        cache = RedisCache(client, timeout_s=5, pause_s=0)
        await eventually(lambda: put(cache, 2), 30)
        found = await cache.get("key")
        sentinels[0].resume()
    for sentinel in own.sentinels:
        await sentinel.aclose()

    assert found is not None
    assert found[0] == b'{"version": 2}'


@pytest.fixture(scope="module")
def member() -> Iterator[RedisServer]:
    """A member of a cluster that serves half of the keys."""
    with RedisServer(options=("--cluster-enabled", "yes")) as server:
        yield server


async def serve_half(member: RedisServer) -> None:
    async with Redis(port=member.port) as client:
        await client.execute_command("CONFIG", "SET", "cluster-require-full-coverage", "no")
        if "cluster_slots_assigned:0" in str(await client.execute_command("CLUSTER", "INFO")):
            await client.execute_command("CLUSTER", "ADDSLOTSRANGE", "0", "8191")


async def test_a_member_of_a_cluster_is_named_once_and_left_alone(
    member: RedisServer, migrated_postgres_database: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "agent_gateway_store")
    await serve_half(member)
    database = migrated_postgres_database()
    async with GatewayStore(database, redis_url=member.url) as store, GatewayStore(database, redis_url="") as other:
        for number in range(10):
            token = await store.approvals.issue_token(make_request(request_id=f"call-{number}"))
            waiting = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=60))
            await other.approvals.approve(token, "approver-1")
            assert (await waiting).status == "APPROVED"
        await store.approvals.check_token(token)
    named = [line for line in caplog.messages if "member of a cluster" in line]

    assert len(named) == 1
    assert "redis+sentinel://" in named[0]
    assert not any("does not answer" in line for line in caplog.messages)


async def test_a_cache_drops_a_member_that_answers_for_others(member: RedisServer) -> None:
    await serve_half(member)
    async with create_redis(member.url) as client:
        cache = RedisCache(client, timeout_s=5)
        for number in range(20):
            await cache.get(f"key-{number}")

        assert (cache.is_cluster, cache.client, cache.is_available) == (True, None, False)


async def test_a_replica_that_has_lost_its_master_is_away_and_no_cluster() -> None:
    with RedisServer() as server:
        async with create_redis(server.url) as client:
            cache = RedisCache(client, timeout_s=5, pause_s=0)
            await client.config_set("replica-serve-stale-data", "no")
            await client.execute_command("REPLICAOF", "127.0.0.1", "1")
            assert await cache.get("key") is None
            assert (cache.is_cluster, cache.fault.partition(":")[0]) == (False, "MasterDownError")
            await client.execute_command("REPLICAOF", "NO", "ONE")

            assert await cache.put_newer([CacheEntry("key", '{"version": 2}', 2, 60)])


def test_doctor_names_a_cluster(member: RedisServer) -> None:
    outcome = gateway_store("--database-url", "sqlite://", "--redis-url", member.url, "doctor", "--json")

    assert outcome.json["redis"]["state"] == "cluster"
    assert any("Redis Cluster" in problem for problem in outcome.json["problems"])


async def test_the_client_of_a_cluster_is_refused_at_construction() -> None:
    """In one sentence, wherever a client is handed over; so is a Sentinel that is no client yet."""
    cluster: Any = RedisCluster(host="127.0.0.1", port=1)
    session = AsyncSession(create_engine("sqlite://"))
    with pytest.raises(ValueError, match=r"does not use a Redis Cluster.*\.$"):
        GatewayStore("sqlite://", redis=cluster)
    with pytest.raises(ValueError, match="does not use a Redis Cluster"):
        ApprovalManager(session, cluster)
    sentinel: Any = Sentinel([("127.0.0.1", 1)])
    with pytest.raises(TypeError, match="master_for"):
        GatewayStore("sqlite://", redis=sentinel)
    await cluster.aclose()
