"""Many who check a token that Redis does not know: few reads of SQL, and every answer as new as if read alone."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import redis.asyncio
from contract_helpers import make_request

from agent_gateway_store import GatewayStore, StoreSettings, errors
from agent_gateway_store.approval import queries

pytestmark = pytest.mark.integration


class Reads:
    """The reads of SQL by token, counted."""

    def __init__(self) -> None:
        self.number = self.at_once = self.most_at_once = 0


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Count the reads of the store and of its views."""
    counted = Reads()
    get = queries.get

    async def counting(*args: Any) -> queries.StoredApproval:
        counted.number += 1
        counted.at_once += 1
        counted.most_at_once = max(counted.most_at_once, counted.at_once)
        try:
            return await get(*args)
        finally:
            counted.at_once -= 1

    monkeypatch.setattr(queries, "get", counting)
    return counted


@pytest.fixture
async def cold(store: GatewayStore, redis_setting: str) -> str:
    """The token of an approval that Redis has forgotten."""
    token = await store.approvals.issue_token(make_request())
    if redis_setting:
        async with redis.asyncio.from_url(redis_setting) as client:
            await client.flushdb()
    return token


async def test_a_thousand_checkers_read_one_at_a_time(
    store: GatewayStore, cold: str, reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand tasks, through views made for each of them: one read under way at any moment, and no more in all than
    the packets in which Redis is asked; and the crowd is no fault of Redis."""
    results = await asyncio.gather(*(store.for_org("default").approvals.check_token(cold) for _ in range(1_000)))

    assert {result.status for result in results} == {"PENDING"}
    assert {result.token for result in results} == {cold}
    assert reads.most_at_once == 1
    assert reads.number <= 1_000 // 128 + 2
    assert caplog.records == []


async def test_a_check_sees_what_was_decided_before_it(store: GatewayStore, cold: str, redis_setting: str) -> None:
    """Checks run without end; one that begins after a decision never answers with what was read before."""
    is_over = asyncio.Event()

    async def check() -> None:
        while not is_over.is_set():
            await store.approvals.check_token(cold)

    checking = [asyncio.create_task(check()) for _ in range(20)]
    await asyncio.sleep(0.05)
    await store.approvals.deny(cold, "approver-1")
    after = await asyncio.gather(*(store.approvals.check_token(cold) for _ in range(20)))
    is_over.set()
    await asyncio.gather(*checking)

    assert {result.status for result in after} == {"DENIED"}


async def test_fresh_checks_read_by_themselves(store: GatewayStore, cold: str, reads: Reads) -> None:
    """`fresh=True` joins nobody."""
    await asyncio.gather(*(store.approvals.check_token(cold, fresh=True) for _ in range(10)))

    assert reads.number == 10


async def test_cancelled_checkers_disturb_no_other(store: GatewayStore, cold: str) -> None:
    """Half of a hundred checkers are cancelled, the first among them; the others are answered."""
    tasks = [asyncio.create_task(store.approvals.check_token(cold)) for _ in range(100)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert {result.status for result in results[1::2]} == {"PENDING"}  # type: ignore[union-attr]


async def test_views_of_other_organisations_share_nothing(store: GatewayStore, cold: str) -> None:
    """At the same moment the token is there for its organisation, and absent for another."""
    own, foreign = store.for_org("default").approvals, store.for_org("other").approvals

    async def absent() -> bool:
        with suppress(errors.ApprovalNotFoundError):
            return not await foreign.check_token(cold)
        return True

    answers = await asyncio.gather(*(work for _ in range(50) for work in (absent(), own.check_token(cold))))

    assert all(answers[::2])
    assert {result.status for result in answers[1::2]} == {"PENDING"}  # type: ignore[union-attr]


async def test_sharing_does_not_need_trust(database_url: str, redis_setting: str) -> None:
    """With APPROVAL_CACHE_SECONDS=0, too, every answer is read after it was asked for."""
    settings = StoreSettings(approval_cache_seconds=0)
    async with GatewayStore(database_url, redis_url=redis_setting, settings=settings) as store:
        token = await store.approvals.issue_token(make_request())
        before = asyncio.gather(*(store.approvals.check_token(token) for _ in range(20)))
        await asyncio.sleep(0)
        await store.approvals.deny(token, "approver-1")
        after = await asyncio.gather(*(store.approvals.check_token(token) for _ in range(20)))

        assert {result.status for result in after} == {"DENIED"}
        assert {result.status for result in await before} <= {"PENDING", "DENIED"}
