"""The threads that compare keys: they leave the event loop free, are few, and end with the store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from unittest.mock import Mock

import bcrypt
import pytest
from contract_helpers import POSTGRES
from key_cache_helpers import issue

from agent_gateway_store import CallerIdentity, GatewayStore, errors

pytestmark = POSTGRES


async def hold(
    store: GatewayStore, monkeypatch: pytest.MonkeyPatch, count: int
) -> tuple[list[asyncio.Task[CallerIdentity]], Callable[[], None]]:
    """Start checks that end when released, the first one in a thread, and wait until all have read their row."""
    keys = [(await issue(store, f"agent-{number}")).plaintext for number in range(count)]
    release, read = threading.Event(), list[str]()

    def noted(plaintext: str) -> bytes:
        read.append(plaintext)
        return b"digest"

    monkeypatch.setattr("agent_gateway_store.keys.manager.digest", noted)
    monkeypatch.setattr(bcrypt, "checkpw", lambda *_: release.wait(10))
    tasks = []
    for expected in (1, count):
        tasks += [asyncio.create_task(store.keys.verify(key)) for key in keys[len(tasks) : expected]]
        while len(read) < expected:
            await asyncio.sleep(0.001)
    return tasks, release.set


async def test_full_queue_is_told(store: GatewayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, release = await hold(store, monkeypatch, 65)
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    with pytest.raises(errors.StoreUnavailableError, match="Too many keys wait to be checked"):
        await done.pop()
    release()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(answer, CallerIdentity) for answer in answers) == 64


async def test_check_under_way_counts_until_its_thread_is_done(
    store: GatewayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, release = await hold(store, monkeypatch, 64)
    tasks[0].cancel()  # the first is in a thread, the others wait
    await asyncio.wait(tasks[:1])

    with pytest.raises(errors.StoreUnavailableError):
        await store.keys.issue("other-agent", role="r")
    release()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (await store.keys.issue("other-agent", role="r")).api_key.caller_id == "other-agent"


async def test_closing_ends_the_checks_that_wait(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with GatewayStore(database_url) as store:
        (gone, *tasks), release = await hold(store, monkeypatch, 8)
        gone.cancel()
        await asyncio.wait([gone])
    later = Mock(return_value=True)
    monkeypatch.setattr(bcrypt, "checkpw", later)
    release()
    answers = await asyncio.gather(*tasks, return_exceptions=True)

    assert {type(answer) for answer in answers} == {errors.StoreNotOpenError}
    assert not later.called
