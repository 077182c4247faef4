"""Which of several servers a new connection leads to, and how long each of them is asked."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

from agent_gateway_store.storage.connecting import Connector

pytestmark = pytest.mark.unit


class Pooler:
    """Stands for a PgBouncer, which lets in whoever comes.

    Args:
        free_after_s: When it has a connection to its server for us, in seconds from now; None: never.
        is_standby: What its server is.
    """

    def __init__(self, free_after_s: float | None = 0, *, is_standby: bool = False) -> None:
        self.free_at = None if free_after_s is None else asyncio.get_running_loop().time() + free_after_s
        self.is_standby, self.open = is_standby, 0

    async def execute(self, _sql: str) -> None:
        await self._answer()

    async def fetchrow(self, _sql: str) -> dict[str, bool]:
        await self._answer()
        return {"primary": self.is_standby, "read-write": self.is_standby}

    async def _answer(self) -> None:
        if self.free_at is None:
            await asyncio.Event().wait()
        else:
            await asyncio.sleep(max(0, self.free_at - asyncio.get_running_loop().time()))

    def terminate(self) -> None:
        self.open -= 1


async def connected(monkeypatch: pytest.MonkeyPatch, *poolers: Pooler, timeout_s: float) -> Any:
    async def connect(*, host: int, **_options: Any) -> Pooler:
        poolers[host].open += 1
        return poolers[host]

    monkeypatch.setattr(asyncpg, "connect", connect)
    hosts = list(range(len(poolers)))
    async with asyncio.timeout(20):
        return await Connector()(host=hosts, port=hosts, timeout=timeout_s, ask_for="read-write")


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_busy_pool_of_the_primary_is_waited_for(monkeypatch: pytest.MonkeyPatch, is_first: bool) -> None:
    """As long as for one host, whatever the standby said meanwhile."""
    primary, standby = Pooler(0.7), Pooler(is_standby=True)
    poolers = (primary, standby) if is_first else (standby, primary)

    assert await connected(monkeypatch, *poolers, timeout_s=1) is primary
    assert (primary.open, standby.open) == (1, 0)


async def test_a_pooler_that_never_answers_keeps_no_other_from_being_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its server hangs: the other one has been promoted."""
    hung, promoted = Pooler(None), Pooler()

    assert await connected(monkeypatch, hung, promoted, timeout_s=0.2) is promoted
    assert hung.open == 0


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_primary_that_gave_no_answer_is_no_standby(monkeypatch: pytest.MonkeyPatch, is_first: bool) -> None:
    """To promote the other one would be wrong."""
    busy, standby = Pooler(None), Pooler(is_standby=True)
    with pytest.raises(TimeoutError):
        await connected(monkeypatch, *((busy, standby) if is_first else (standby, busy)), timeout_s=0.2)

    assert (busy.open, standby.open) == (0, 0)


async def test_two_that_are_found_to_be_standbys_are_no_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one of them said so late."""
    with pytest.raises(asyncpg.TargetServerAttributeNotMatched):
        await connected(monkeypatch, Pooler(0.7, is_standby=True), Pooler(is_standby=True), timeout_s=1)
