"""A remembered key that is revoked, rotated or expires is refused: here at once, elsewhere as promised."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any

import key_cache_helpers
import pytest
import redis.asyncio
from contract_helpers import BOTH, POSTGRES, WITH_REDIS, hears, until
from key_cache_helpers import TRUSTED, Gate, answer, checking, issue, refused
from sqlalchemy.ext.asyncio import AsyncConnection

import servers
from agent_gateway_store import GatewayStore, clock, errors
from agent_gateway_store.store import parts_of
from builders import make_request

pytestmark = POSTGRES

gate = key_cache_helpers.gate


async def revoke(store: GatewayStore) -> None:
    """End the key."""
    await store.keys.revoke("dev-agent")


async def rotate(store: GatewayStore) -> None:
    """Replace the key at once."""
    await store.keys.rotate("dev-agent", overlap=timedelta())


async def reissue(store: GatewayStore) -> None:
    """End the key and issue another."""
    await store.keys.revoke("dev-agent")
    await issue(store)


@BOTH
@pytest.mark.parametrize("change", [revoke, rotate, reissue])
async def test_change_counts_in_this_process_at_once(store: GatewayStore, change: Callable[..., Any]) -> None:
    """A key that is known in several views of a store is refused by each from the moment the change returns."""
    issued = await issue(store)
    views = [store, store.for_org("default")]
    for view in views * 2:
        assert await answer(view, issued) == "good"
    await change(views[1])

    assert [await answer(view, issued) for view in views] == ["invalid"] * 2


@BOTH
@pytest.mark.parametrize("change", [revoke, rotate, reissue])
async def test_change_elsewhere_is_heard(
    store: GatewayStore, other: GatewayStore, redis_setting: str, change: Callable[..., Any]
) -> None:
    """With Redis a key that ended in another process is refused long before its trust ends, without it by then."""
    issued = await issue(store)
    await store.keys.verify(issued.plaintext)
    if redis_setting:
        await hears(store)
    assert await answer(store, issued) == "good"
    await change(other)

    if redis_setting:
        await refused(store, issued)
    else:
        assert await answer(store, issued) == "good"
        clock.move(TRUSTED)
        assert await answer(store, issued) == "invalid"


async def test_change_elsewhere_is_heard_through_postgresql_while_somebody_waits(
    store: GatewayStore, other: GatewayStore
) -> None:
    """Without Redis the connection that listens for decisions hears of keys, too, long before the trust ends."""
    issued = await issue(store)
    token = await store.approvals.issue_token(make_request())
    waiting = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=20))
    await store.keys.verify(issued.plaintext)
    await hears(store)
    assert await answer(store, issued) == "good"
    await revoke(other)
    await refused(store, issued)
    await store.approvals.cancel(token, "dev-agent")
    await waiting


@WITH_REDIS
async def test_whoever_subscribes_again_trusts_nothing_from_before(
    store: GatewayStore, client: redis.asyncio.Redis
) -> None:
    """While the subscription was cut a key has ended, of which no message will ever come."""
    issued = await issue(store)
    await store.keys.verify(issued.plaintext)
    await hears(store)
    assert await answer(store, issued) == "good"
    await client.client_kill_filter(_type="pubsub")
    await until(lambda: not parts_of(store).pubsub.is_live)
    async with store.database.write() as connection:
        await connection.exec_driver_sql("UPDATE api_keys SET is_active = false")
    assert await answer(store, issued) == "good"  # it cannot know

    await refused(store, issued)


@contextmanager
def answers_lost(store: GatewayStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every commit arrives, and the connection is cut before it says so."""
    write = store.database.write

    @asynccontextmanager
    async def cut_off() -> AsyncIterator[AsyncConnection]:
        async with write() as connection:
            yield connection
        raise errors.StoreUnavailableError("The connection was cut.")

    with monkeypatch.context() as patch:
        patch.setattr(store.database, "write", cut_off)
        yield


async def test_a_revocation_whose_answer_was_lost_leaves_no_trust(
    store: GatewayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = await issue(store)
    assert await answer(store, issued) == "good"
    with answers_lost(store, monkeypatch), pytest.raises(errors.StoreUnavailableError):
        await revoke(store)

    assert await answer(store, issued) == "invalid"


async def test_a_key_whose_answer_was_lost_is_handed_over(store: GatewayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried again, a rotation would end the key that is in use, and an issue find one that nobody has seen."""
    with answers_lost(store, monkeypatch):
        first = await issue(store)
        second = await store.keys.rotate("dev-agent")

    assert [await answer(store, key) for key in (first, second)] == ["good", "good"]
    assert second.previous_valid_until is not None
    assert len(await store.keys.list()) == 1


async def test_no_key_is_trusted_beyond_its_end(store: GatewayStore) -> None:
    """`expires_at` and the end of an overlap come without a signal, and within the time of trust."""
    soon = TRUSTED / 2
    expiring = await issue(store, "expiring", expires_at=clock.utc_now() + soon)
    old = await issue(store)
    new = await store.keys.rotate("dev-agent", overlap=soon)
    during = [await answer(store, key) for key in (expiring, old, new) for _ in range(2)]
    clock.move(soon)

    assert during == ["good"] * 6
    assert [await answer(store, key) for key in (expiring, old, new)] == ["invalid", "invalid", "good"]


async def test_check_that_overlaps_a_revocation_leaves_no_trust(store: GatewayStore, gate: Gate) -> None:
    """What was read before a change is not remembered after it, and nobody joins a check that began before."""
    issued = await issue(store)
    gate.clear()
    early = asyncio.create_task(answer(store, issued))
    await checking(gate, 1)
    await store.keys.revoke("dev-agent")
    late = asyncio.create_task(answer(store, issued))
    async with asyncio.timeout(5):
        assert await late == "invalid"  # while the one before still stands
    gate.set()

    await early
    assert await answer(store, issued) == "invalid"


@pytest.mark.system
async def test_hung_or_restarted_redis_lets_no_revoked_key_live_longer(database_url: str) -> None:
    """While Redis hangs a revocation is late by the time of trust at most; when it is back, all is read again."""
    with servers.RedisServer() as server:
        options: dict[str, Any] = {"redis_url": server.url}
        async with GatewayStore(database_url, **options) as store, GatewayStore(database_url, **options) as other:
            keys = [await issue(store, f"agent-{number}") for number in range(3)]
            await answer(store, keys[0])
            await hears(store)
            assert [await answer(store, key) for key in keys] == ["good"] * 3

            server.pause()
            start = time.monotonic()
            await other.keys.revoke("agent-0")
            assert [await answer(store, key) for key in keys] == ["good"] * 3
            assert time.monotonic() - start < 5  # redis-py alone would take a minute
            clock.move(TRUSTED)
            assert [await answer(store, key) for key in keys] == ["invalid", "good", "good"]

            server.kill()
            await other.keys.revoke("agent-1")
            server.start()

            await refused(store, keys[1], 10)
            await hears(store)
            await until(lambda: parts_of(other).redis.is_available)
            assert await answer(store, keys[2]) == "good"
            await other.keys.revoke("agent-2")

            await refused(store, keys[2])
