"""A Redis that answers nonsense, and a store that closes while it connects to Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from contract_helpers import make_request

from agent_gateway_store import GatewayStore

NONSENSE = {"no number": b":abc\r\n", "a blob error": b"!!garbage!!\r\n\x00\xff", "too deep": b"*1\r\n" * 5_000}


@pytest.fixture(params=NONSENSE)
async def nonsense_url(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """The URL of a server that answers whatever it is sent with the same bytes, which are no Redis reply."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            writer.write(NONSENSE[request.param])
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"


async def test_a_redis_that_answers_nonsense_is_a_miss(tmp_path: Path, nonsense_url: str) -> None:
    """Whatever redis-py makes of a reply, the answer comes from SQL."""
    async with GatewayStore(f"sqlite:///{tmp_path}/test.db", redis_url=nonsense_url) as store:
        token = await store.approvals.issue_token(make_request())
        asked = await asyncio.gather(*(store.approvals.check_token(token) for _ in range(20)))

    assert {result.status for result in asked} == {"PENDING"}


@pytest.mark.parametrize("ticks", range(12))
async def test_closing_while_the_subscription_begins_ends(tmp_path: Path, redis_url: str, ticks: int) -> None:
    """Wherever the cancellation meets redis-py, also where it is swallowed."""
    async with GatewayStore(f"sqlite:///{tmp_path}/test.db", redis_url=redis_url) as store:
        token = await store.approvals.issue_token(make_request())
        waiting = asyncio.ensure_future(store.approvals.wait_for_decision(token, timeout_s=0.01))
        await asyncio.sleep(0)
        while store._core.pubsub._subscription is None:
            await asyncio.sleep(0)
        for _ in range(ticks):
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await store._core.pubsub.close()
        await waiting
