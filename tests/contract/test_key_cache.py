"""Verified keys are remembered: no row, no bcrypt, and no trust beyond what was promised."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from types import FunctionType, MethodType

import key_cache_helpers
import pytest
from contract_helpers import BOTH, POSTGRES, counted_statements, hears
from key_cache_helpers import HOUR, TRUSTED, Gate, answer, checking, issue

from agent_gateway_store import CallerIdentity, GatewayStore, StoreSettings, clock, errors
from agent_gateway_store.keys.format import new_key, new_key_id
from agent_gateway_store.keys.hashing import Hasher
from agent_gateway_store.storage.pubsub import PubSub
from agent_gateway_store.store import parts_of

bcrypt_calls = key_cache_helpers.bcrypt_calls
gate = key_cache_helpers.gate


pytestmark = POSTGRES


@BOTH
async def test_known_key_costs_neither_row_nor_bcrypt(
    store: GatewayStore, redis_setting: str, bcrypt_calls: list[bytes]
) -> None:
    """The second check, as text or as SecretStr, gives the very same identity without a statement."""
    issued = await issue(store)
    first = await store.keys.verify(issued.plaintext)
    if redis_setting:
        await hears(store)
    first = await store.keys.verify(issued.plaintext)
    with counted_statements(store, "api_keys") as statements:
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
    with counted_statements(store, "api_keys") as statements:
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
        with counted_statements(store, "api_keys") as statements:
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
        with counted_statements(store, "api_keys") as statements:
            for _ in range(3):
                await store.keys.verify(issued.plaintext)
        assert (len(statements), len(bcrypt_calls)) == (3, 4)
        assert set(await asyncio.gather(*(answer(store, issued) for _ in range(20)))) == {"good"}
        async with GatewayStore(database_url, redis_url=redis_setting) as other:
            await other.keys.revoke("dev-agent")
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


async def test_callers_that_hang_up_count(store: GatewayStore, gate: Gate) -> None:
    issued = await issue(store)
    for number in range(8):
        gate.clear()
        key = new_key(issued.api_key.key_id)
        task = asyncio.create_task(answer(store, key))
        await checking(gate, number + 1)
        task.cancel()
        await asyncio.wait([task])
        gate.set()
        # Joins the check.
        await answer(store, key)

    assert await answer(store, new_key(issued.api_key.key_id)) == "busy"


async def test_callers_of_a_right_key_that_give_up_lock_nobody_out(store: GatewayStore, gate: Gate) -> None:
    """The check that the first one began goes on, is joined by whoever comes next, and its answer is remembered."""
    issued = await issue(store)
    gate.clear()
    for _ in range(9):
        with suppress(TimeoutError):
            await asyncio.wait_for(answer(store, issued), 0.05)
    gate.set()

    assert await answer(store, issued) == "good"
    assert gate.begun == 1


async def test_cancelled_caller_disturbs_nobody(store: GatewayStore, gate: Gate) -> None:
    issued = await issue(store)
    gate.clear()
    tasks = [asyncio.create_task(store.keys.verify(issued.plaintext)) for _ in range(50)]
    await checking(gate, 1)
    for task in tasks[::2]:
        task.cancel()
    gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(found) for found in answers[::2]} == {asyncio.CancelledError}
    assert {type(found) for found in answers[1::2]} == {CallerIdentity}


async def test_unknown_id_is_looked_up_once_a_second(store: GatewayStore, bcrypt_calls: list[bytes]) -> None:
    """Keys of an id that does not exist, whatever their secret, cost one row a second and no bcrypt."""
    key_id = new_key_id()
    with counted_statements(store, "api_keys") as statements:
        for _ in range(20):
            assert await answer(store, new_key(key_id)) == "invalid"
        assert len(statements) == 1
        clock.move(timedelta(seconds=1))
        assert await answer(store, new_key(key_id)) == "invalid"

    assert len(statements) == 2
    assert bcrypt_calls == []


async def test_known_key_of_another_organisation_is_refused(store: GatewayStore) -> None:
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
    store: GatewayStore, redis_setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database is away a known key is accepted, then told that nothing can be said of it."""
    issued = await issue(store)
    await answer(store, issued)

    def refuse(*_: object) -> None:
        raise errors.StoreUnavailableError("The database is away.")

    if redis_setting:
        await hears(store)
        await answer(store, issued)
    for name in ("read", "write"):
        monkeypatch.setattr(store.database, name, refuse)
    assert await answer(store, issued) == "good"
    clock.move(TRUSTED)
    assert await answer(store, issued) == "busy"


async def test_known_key_is_no_answer_of_a_closed_store(database_url: str) -> None:
    """After `close` a key that was known raises; opened again, the store asks the database."""
    store = await GatewayStore(database_url, redis_url="").open()
    issued = await issue(store)
    await store.keys.verify(issued.plaintext)
    await store.close()
    with pytest.raises(errors.StoreNotOpenError):
        await store.keys.verify(issued.plaintext)
    async with store:
        with counted_statements(store, "api_keys") as statements:
            assert await answer(store, issued) == "good"
    assert len(statements) == 1


async def test_cache_holds_no_key(store: GatewayStore) -> None:
    """Nothing that can be reached from the cache is a key, or what bcrypt is given for it."""
    keys = [(await issue(store, f"agent-{number}")).plaintext.get_secret_value() for number in range(3)]
    keys += [new_key(key.split("_")[1]) for key in keys]
    for key in keys:
        await answer(store, key)
    seen: set[int] = set()
    waiting: list[object] = [parts_of(store).key_cache]
    held: list[str | bytes] = []
    while waiting:
        found = waiting.pop()
        # Code and other parts of the store lead to everything there is.
        if id(found) in seen or isinstance(found, (type, FunctionType, MethodType, PubSub, Hasher)):
            continue
        seen.add(id(found))
        if isinstance(found, (str, bytes)):
            held.append(found)
        else:
            waiting.extend(gc.get_referents(found))

    assert len(held) > 10
    secrets = [key.split("_")[2][:20] for key in keys]
    assert not [text for text in map(str, held) for secret in secrets if secret in text]
