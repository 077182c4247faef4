"""What the tests of remembered keys need: a second store, bcrypt that is counted or held, and what a key is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import bcrypt
import pytest
from contract_helpers import until

from agent_gateway_store import GatewayStore, IssuedKey, errors

HOUR, TRUSTED = timedelta(hours=1), timedelta(seconds=30)


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
    await until(lambda: gate.begun >= count)


async def refused(store: GatewayStore, key: IssuedKey, timeout_s: float = 5) -> float:
    """Return how many seconds it takes until a store refuses a key."""

    async def is_refused() -> bool:
        return await answer(store, key) == "invalid"

    return await until(is_refused, timeout_s)
