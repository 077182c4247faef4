"""Which of several servers a new connection leads to, and how long each of them is asked."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

from agent_gateway_store.storage.connecting import Connector

pytestmark = pytest.mark.unit


class Pooler:
    """Stands for a PgBouncer, which lets in whoever comes; without an answer it has no free connection for us."""

    def __init__(self, answers: bool = True, *, is_standby: bool = False) -> None:
        self.answers, self.is_standby, self.open = answers, is_standby, 0

    async def execute(self, _sql: str) -> None:
        if not self.answers:
            await asyncio.Event().wait()

    async def fetchrow(self, _sql: str) -> dict[str, bool]:
        return {"primary": self.is_standby, "read-write": self.is_standby}

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


async def test_a_pooler_that_never_answers_keeps_no_other_from_being_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    hung, promoted = Pooler(answers=False), Pooler()

    assert await connected(monkeypatch, hung, promoted, timeout_s=0.2) is promoted
    assert hung.open == 0


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_primary_that_gave_no_answer_is_no_standby(monkeypatch: pytest.MonkeyPatch, is_first: bool) -> None:
    busy, standby = Pooler(answers=False), Pooler(is_standby=True)
    with pytest.raises(TimeoutError):
        await connected(monkeypatch, *((busy, standby) if is_first else (standby, busy)), timeout_s=0.2)

    assert (busy.open, standby.open) == (0, 0)
