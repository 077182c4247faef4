"""Verified keys are remembered: no row, no bcrypt, and no trust beyond what was promised."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any

import bcrypt
import pytest
from contract_helpers import counted_statements

import servers
from agent_gateway_store import CallerIdentity, GatewayStore, IssuedKey, StoreSettings, clock, errors
from agent_gateway_store.keys.format import new_key, new_key_id

pytestmark = pytest.mark.integration

HOUR, TRUSTED = timedelta(hours=1), timedelta(seconds=30)


BOTH = pytest.mark.parametrize("redis_setting", ["no-redis", "redis"], indirect=True)


@pytest.fixture
def redis_setting(request: pytest.FixtureRequest) -> str:
    """No Redis, but where a test asks for both."""
    return request.getfixturevalue("fresh_redis_url") if getattr(request, "param", "") == "redis" else ""


@pytest.fixture
async def other(store: GatewayStore, database_url: str, redis_setting: str) -> AsyncIterator[GatewayStore]:
    """A second store on the same database and Redis: what another process would be."""
    async with GatewayStore(database_url, redis_url=redis_setting) as opened:
        yield opened


@pytest.fixture
def bcrypt_calls(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The hashes that bcrypt compared something with."""
    calls: list[bytes] = []

    def counted(secret: bytes, hashed: bytes) -> bool:
        calls.append(hashed)
        return check(secret, hashed)

    check = bcrypt.checkpw
    monkeypatch.setattr(bcrypt, "checkpw", counted)
    return calls


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """bcrypt stands still while this is not set."""
    opened = threading.Event()
    opened.set()

    def held(secret: bytes, hashed: bytes) -> bool:
        assert opened.wait(10)
        return check(secret, hashed)

    check = bcrypt.checkpw
    monkeypatch.setattr(bcrypt, "checkpw", held)
    yield opened
    opened.set()


async def issue(store: GatewayStore, caller_id: str = "dev-agent", **fields: Any) -> IssuedKey:
    """Issue a key to a caller."""
    return await store.keys.issue(caller_id, role="developer", **fields)


async def answer(store: GatewayStore, key: IssuedKey | str) -> str:
    """Tell what a key is told: `good`, `invalid` or `busy`."""
    try:
        await store.keys.verify(key if isinstance(key, str) else key.plaintext)
    except errors.InvalidApiKeyError:
        return "invalid"
    except errors.StoreUnavailableError:
        return "busy"
    return "good"


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 5) -> float:
    """Return how many seconds it takes until the condition holds."""
    start = time.monotonic()
    while not await condition():
        assert time.monotonic() - start < timeout_s, "not within the time allowed"
        await asyncio.sleep(0.01)
    return time.monotonic() - start


async def hears(store: GatewayStore) -> None:
    """Wait until a store hears other processes, and has forgotten what it knew before."""

    async def is_live() -> bool:
        return store._core.signals._is_live

    await until(is_live)


@BOTH
async def test_known_key_costs_neither_row_nor_bcrypt(store: GatewayStore, bcrypt_calls: list[bytes]) -> None:
    """The second check, as text or as SecretStr, gives the very same identity without a statement."""
    issued = await issue(store)
    first = await store.keys.verify(issued.plaintext)
    await (hears(store) if store._core.redis.client else asyncio.sleep(0))
    first = await store.keys.verify(issued.plaintext)
    with counted_statements(store) as statements:
        again = [await store.keys.verify(key) for key in (issued.plaintext, issued.plaintext.get_secret_value())]

    assert again[0] is first
    assert again[1] is first
    assert statements == []
    assert len(bcrypt_calls) == 1


@pytest.mark.parametrize("is_good", [True, False])
async def test_concurrent_checks_share_one_row_and_one_bcrypt(
    store: GatewayStore, bcrypt_calls: list[bytes], is_good: bool
) -> None:
    """A hundred requests with the same new key cost what one costs, and so do a hundred with the same wrong key."""
    issued = await issue(store)
    key = issued.plaintext.get_secret_value() if is_good else new_key(issued.api_key.key_id)
    with counted_statements(store) as statements:
        answers = await asyncio.gather(*(answer(store, key) for _ in range(100)))

    assert set(answers) == {"good" if is_good else "invalid"}
    assert [statement.split()[0] for statement in statements] == ["SELECT", "UPDATE"][: 1 + is_good]
    assert len(bcrypt_calls) == 1


async def test_row_is_read_again_but_bcrypt_runs_only_for_a_new_hash(
    store: GatewayStore, other: GatewayStore, bcrypt_calls: list[bytes]
) -> None:
    """After API_KEY_CACHE_SECONDS one statement renews the trust; bcrypt sees each key and hash once."""
    first = await issue(store)
    wrong = new_key(first.api_key.key_id)
    assert (await answer(store, first), await answer(store, wrong)) == ("good", "invalid")
    for _ in range(3):
        clock.move(TRUSTED)
        with counted_statements(store) as statements:
            assert (await answer(store, first), await answer(store, wrong)) == ("good", "invalid")
        assert len([statement for statement in statements if statement.startswith("SELECT")]) == 2
    assert len(bcrypt_calls) == 2

    second = await other.keys.rotate("dev-agent", overlap=HOUR)
    clock.move(TRUSTED)
    assert [await answer(store, key) for key in (first, second, first, second)] == ["good"] * 4
    assert len(bcrypt_calls) == 3
    third = await other.keys.rotate("dev-agent", overlap=HOUR)
    clock.move(TRUSTED)
    assert [await answer(store, key) for key in (first, second, third)] == ["invalid", "good", "good"]


async def test_zero_switches_the_cache_off(database_url: str, redis_setting: str, bcrypt_calls: list[bytes]) -> None:
    """With API_KEY_CACHE_SECONDS=0 each check reads its row and runs bcrypt; at the same time they share bcrypt."""
    settings = StoreSettings(api_key_cache_seconds=0)
    async with GatewayStore(database_url, redis_url=redis_setting, settings=settings) as store:
        issued = await issue(store)
        await store.keys.verify(issued.plaintext)
        with counted_statements(store) as statements:
            for _ in range(3):
                await store.keys.verify(issued.plaintext)
        assert (len(statements), len(bcrypt_calls)) == (3, 4)
        assert set(await asyncio.gather(*(answer(store, issued) for _ in range(20)))) == {"good"}
        async with GatewayStore(database_url, redis_url=redis_setting) as other:
            await other.keys.revoke("dev-agent")
        assert await answer(store, issued) == "invalid"


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
    """With Redis a key that ended in another process is refused within a second, without it after its trust."""
    issued = await issue(store)
    await store.keys.verify(issued.plaintext)
    if redis_setting:
        await hears(store)
    assert await answer(store, issued) == "good"
    await change(other)

    async def is_refused() -> bool:
        return await answer(store, issued) == "invalid"

    if redis_setting:
        assert await until(is_refused) < 1
    else:
        assert await answer(store, issued) == "good"
        clock.move(TRUSTED)
        assert await is_refused()


async def test_new_key_from_elsewhere_is_good_at_once(store: GatewayStore, other: GatewayStore) -> None:
    """What this process knows of the key before does not make it refuse the one after."""
    old = await issue(store)
    assert await answer(store, old) == "good"
    new = await other.keys.rotate("dev-agent")

    assert await answer(store, new) == "good"


async def test_no_key_is_trusted_beyond_its_end(store: GatewayStore) -> None:
    """`expires_at` and the end of an overlap come without a signal, and within the time of trust."""
    soon = timedelta(seconds=0.6)
    expiring = await issue(store, "expiring", expires_at=clock.utc_now() + soon)
    old = await issue(store)
    new = await store.keys.rotate("dev-agent", overlap=soon)
    during = [await answer(store, key) for key in (expiring, old, new) for _ in range(2)]
    await asyncio.sleep(soon.total_seconds())

    assert during == ["good"] * 6
    assert [await answer(store, key) for key in (expiring, old, new)] == ["invalid", "invalid", "good"]


async def test_check_that_overlaps_a_revocation_leaves_no_trust(store: GatewayStore, gate: threading.Event) -> None:
    """What was read before a change is not remembered after it, and nobody joins a check that began before."""
    issued = await issue(store)
    gate.clear()
    early = asyncio.create_task(answer(store, issued))
    await until(lambda: asyncio.to_thread(lambda: store.keys._hasher._room._value < 64))
    await store.keys.revoke("dev-agent")
    late = asyncio.create_task(answer(store, issued))
    await asyncio.sleep(0.05)
    gate.set()

    assert await late == "invalid"
    await early
    assert await answer(store, issued) == "invalid"


async def test_wrong_keys_of_one_id_cannot_occupy_bcrypt(store: GatewayStore, bcrypt_calls: list[bytes]) -> None:
    """Eight are checked; the rest is told to wait. The owner's known key and other callers notice nothing."""
    victim, neighbour = await issue(store), await issue(store, "neighbour")
    assert await answer(store, victim) == "good"
    bcrypt_calls.clear()
    wrong = [new_key(victim.api_key.key_id) for _ in range(200)]
    answers = Counter(await asyncio.gather(*(answer(store, key) for key in wrong)))
    answers += Counter([await answer(store, key) for key in wrong])

    assert set(answers) == {"invalid", "busy"}
    assert 8 <= len(bcrypt_calls) <= 12
    assert await answer(store, victim) == "good"
    assert await answer(store, neighbour) == "good"


async def test_new_good_key_is_never_called_wrong(store: GatewayStore, other: GatewayStore) -> None:
    """Under attack the new key of the same id is told to come back, and is accepted when it does."""
    old = await issue(store)
    new = await other.keys.rotate("dev-agent")
    wrong = [new_key(old.api_key.key_id) for _ in range(30)]
    for key in wrong:
        await answer(store, key)

    assert await answer(store, new) == "busy"
    clock.move(timedelta(seconds=2))
    assert await answer(store, new) == "good"


async def test_callers_that_hang_up_count(store: GatewayStore, gate: threading.Event) -> None:
    """Whoever leaves while bcrypt is at a wrong key has failed all the same."""
    issued = await issue(store)
    gate.clear()
    for _ in range(8):
        task = asyncio.create_task(answer(store, new_key(issued.api_key.key_id)))
        held = store.keys._hasher._room._value
        await until(lambda held=held: asyncio.to_thread(lambda: store.keys._hasher._room._value < held))
        task.cancel()
        await asyncio.wait([task])
    gate.set()

    assert await answer(store, new_key(issued.api_key.key_id)) == "busy"


async def test_cancelled_caller_disturbs_nobody(store: GatewayStore, gate: threading.Event) -> None:
    """Of fifty that share a check half leave; the others get their answer, and when all leave nothing is left."""
    issued = await issue(store)
    gate.clear()
    tasks = [asyncio.create_task(store.keys.verify(issued.plaintext)) for _ in range(50)]
    await asyncio.sleep(0.05)
    for task in tasks[::2]:
        task.cancel()
    gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(found) for found in answers[::2]} == {asyncio.CancelledError}
    assert {type(found) for found in answers[1::2]} == {CallerIdentity}

    others = [asyncio.create_task(answer(store, new_key(new_key_id()))) for _ in range(5)]
    await asyncio.sleep(0)
    for task in others:
        task.cancel()
    await asyncio.wait(others)
    assert store._core.key_cache._flights._flights == {}


async def test_unknown_id_is_looked_up_once_a_second(store: GatewayStore, bcrypt_calls: list[bytes]) -> None:
    """Keys of an id that does not exist, whatever their secret, cost one row a second and no bcrypt."""
    key_id = new_key_id()
    with counted_statements(store) as statements:
        for _ in range(20):
            assert await answer(store, new_key(key_id)) == "invalid"
        assert len(statements) == 1
        clock.move(timedelta(seconds=1))
        assert await answer(store, new_key(key_id)) == "invalid"

    assert len(statements) == 2
    assert bcrypt_calls == []


async def test_known_key_of_another_organisation_is_refused(store: GatewayStore) -> None:
    """What one view knows is no answer for another."""
    issued = await issue(store, org_id="acme")
    for view, expected in (
        (store, "good"),
        (store.for_org("acme"), "good"),
        (store.for_org("other"), "invalid"),
        (store, "good"),
        (store.for_org("acme"), "good"),
    ):
        assert await answer(view, issued) == expected


@BOTH
async def test_known_key_outlives_the_database_for_its_time_of_trust(
    store: GatewayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database is away a known key is accepted, then told that nothing can be said of it."""
    issued = await issue(store)
    await answer(store, issued)

    def refuse(*_: object) -> None:
        raise errors.StoreUnavailableError("The database is away.")

    if store._core.redis.client:
        await hears(store)
        await answer(store, issued)
    for name in ("read", "write"):
        monkeypatch.setattr(store.database, name, refuse)
    assert await answer(store, issued) == "good"
    clock.move(TRUSTED)
    assert await answer(store, issued) == "busy"


async def test_use_is_noted_although_no_row_is_read(database_url: str) -> None:
    """With a trust longer than a minute the use is still noted once a minute, by one statement."""
    async with GatewayStore(database_url, redis_url="", settings=StoreSettings(api_key_cache_seconds=600)) as store:
        issued = await issue(store)
        await store.keys.verify(issued.plaintext)
        first = (await store.keys.get("dev-agent")).last_used_at
        clock.move(timedelta(seconds=61))
        with counted_statements(store) as statements:
            for _ in range(5):
                await store.keys.verify(issued.plaintext)
        second = (await store.keys.get("dev-agent")).last_used_at

    assert [statement.split()[0] for statement in statements] == ["UPDATE"]
    assert first is not None
    assert second is not None
    assert second - first >= timedelta(minutes=1)


async def test_known_key_is_no_answer_of_a_closed_store(database_url: str) -> None:
    """After `close` a key that was known raises; opened again, the store asks the database."""
    store = await GatewayStore(database_url, redis_url="").open()
    issued = await issue(store)
    await store.keys.verify(issued.plaintext)
    await store.close()
    with pytest.raises(errors.StoreNotOpenError):
        await store.keys.verify(issued.plaintext)
    async with store:
        with counted_statements(store) as statements:
            assert await answer(store, issued) == "good"
    assert len(statements) == 1


async def test_cache_holds_no_key(store: GatewayStore) -> None:
    """Nothing that can be reached from the cache is a key, or what bcrypt is given for it."""
    keys = [(await issue(store, f"agent-{number}")).plaintext.get_secret_value() for number in range(3)]
    keys += [new_key(key.split("_")[1]) for key in keys]
    for key in keys:
        await answer(store, key)
    cache = store._core.key_cache
    seen: set[int] = set()
    waiting: list[object] = [cache._good, cache._wrong, cache._unknown, cache.checker._good, cache.checker._wrong]
    held: list[str | bytes] = []
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, type):
            continue
        seen.add(id(found))
        if isinstance(found, (str, bytes)):
            held.append(found)
        else:
            waiting.extend(gc.get_referents(found))

    assert len(held) > 10
    secrets = [key.split("_")[2][:20] for key in keys]
    assert not [text for text in map(str, held) for secret in secrets if secret in text]


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
            assert time.monotonic() - start < 1
            clock.move(TRUSTED)
            assert [await answer(store, key) for key in keys] == ["invalid", "good", "good"]

            server.kill()
            await other.keys.revoke("agent-1")
            server.start()

            async def is_refused() -> bool:
                return await answer(store, keys[1]) == "invalid"

            assert await until(is_refused, 10) < 10
            await hears(store)
            await asyncio.sleep(1.1)  # the other store leaves Redis alone for a second after a fault
            assert await answer(store, keys[2]) == "good"
            await other.keys.revoke("agent-2")

            async def is_heard() -> bool:
                return await answer(store, keys[2]) == "invalid"

            assert await until(is_heard) < 1


_GATEWAY = """
import asyncio, sys
from agent_gateway_store import GatewayStore, errors

async def main():
    async with GatewayStore() as store:
        key, was = sys.stdin.readline().strip(), None
        while True:
            try:
                await store.keys.verify(key)
                now = "good"
            except errors.InvalidApiKeyError:
                now = "invalid"
            if now != was:
                print(now, flush=True)
            was = now
            if now == "invalid":
                break
            await asyncio.sleep(0.01)

asyncio.run(main())
"""


@BOTH
async def test_revocation_reaches_another_process(store: GatewayStore, database_url: str, redis_setting: str) -> None:
    """A real second process that trusts a key refuses it: within a second by Redis, else after its time of trust."""
    issued = await issue(store)
    environment = os.environ | {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_setting,
        "API_KEY_CACHE_SECONDS": "30" if redis_setting else "1.5",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _GATEWAY),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(issued.plaintext.get_secret_value().encode() + b"\n")
        assert await asyncio.wait_for(process.stdout.readline(), 20) == b"good\n"
        await asyncio.sleep(0.5)  # it subscribes after the first key
        await store.keys.revoke("dev-agent")
        start = time.monotonic()
        assert await asyncio.wait_for(process.stdout.readline(), 20) == b"invalid\n"
        assert time.monotonic() - start < (1 if redis_setting else 1.7)
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
