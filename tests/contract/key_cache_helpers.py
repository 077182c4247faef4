"""What the tests of remembered keys need: a second store, bcrypt that is counted or held, and what a key is told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any

import bcrypt
import pytest

from agent_gateway_store import GatewayStore, IssuedKey, errors

HOUR, TRUSTED = timedelta(hours=1), timedelta(seconds=30)
BOTH = pytest.mark.parametrize("redis_setting", ["no-redis", "redis"], indirect=True)


@pytest.fixture
def redis_setting(request: pytest.FixtureRequest) -> str:
    """No Redis, but where a test asks for both."""
    return request.getfixturevalue("fresh_redis_url") if getattr(request, "param", "") == "redis" else ""


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


class Gate(threading.Event):
    """bcrypt stands still while this is not set; counts the checks that have begun."""

    begun = 0


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate before bcrypt, which is open."""
    opened = Gate()
    opened.set()

    def held(secret: bytes, hashed: bytes) -> bool:
        opened.begun += 1
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


async def checking(gate: Gate, count: int) -> None:
    """Wait until bcrypt has begun so many checks since the start of the test."""

    async def has_begun() -> bool:
        return gate.begun >= count

    await until(has_begun)


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
        return store._core.pubsub._is_live

    await until(is_live)
