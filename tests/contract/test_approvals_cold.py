"""Many who check a token that Redis does not know: few reads of SQL, and every answer as new as if read alone."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
import redis.asyncio
from contract_helpers import EACH, Reads, until

from agent_gateway_store import GatewayStore, errors
from builders import make_request

pytestmark = [EACH, pytest.mark.usefixtures("no_plugins")]


@pytest.fixture
async def cold(store: GatewayStore, client: redis.asyncio.Redis | None) -> str:
    """The token of an approval that Redis has forgotten."""
    token = await store.approvals.issue_token(make_request())
    if client is not None:
        await client.flushdb()
    return token


@pytest.fixture
def reads(store: GatewayStore, cold: str, monkeypatch: pytest.MonkeyPatch) -> Reads:
    """The reads of the store and of its views, counted."""
    return Reads(store, monkeypatch)


async def test_a_thousand_checkers_read_one_at_a_time(
    store: GatewayStore, cold: str, reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand tasks, through views made for each: one read under way at any moment, and no more in all than the
    packets in which Redis is asked; the crowd is no fault of Redis. Fresh checks read by themselves."""
    results = await asyncio.gather(*(store.for_org("default").approvals.check_token(cold) for _ in range(1_000)))

    assert {(result.status.value, result.token) for result in results} == {("PENDING", cold)}
    assert reads.most_at_once == 1
    assert (shared := reads.number) <= 1_000 // 128 + 2
    assert caplog.records == []
    await asyncio.gather(*(store.approvals.check_token(cold, fresh=True) for _ in range(10)))
    assert reads.number == shared + 10


async def test_a_check_sees_what_was_decided_before_it(store: GatewayStore, cold: str, reads: Reads) -> None:
    """A read of the time before stands still; checks that begin after the decision answer with none of it."""
    reads.gate.clear()
    early = [asyncio.create_task(store.approvals.check_token(cold)) for _ in range(20)]
    await until(lambda: reads.held > 0)
    await store.approvals.deny(cold, "approver-1")
    late = [asyncio.create_task(store.approvals.check_token(cold)) for _ in range(20)]
    await asyncio.sleep(0)
    reads.gate.set()

    assert {result.status for result in await asyncio.gather(*late)} == {"DENIED"}
    await asyncio.gather(*early)


async def test_cancelled_checkers_disturb_no_other(store: GatewayStore, cold: str, reads: Reads) -> None:
    """Half of a hundred checkers are cancelled, the first among them; the others are answered."""
    reads.gate.clear()
    tasks = [asyncio.create_task(store.approvals.check_token(cold)) for _ in range(100)]
    await until(lambda: reads.held > 0)
    for task in tasks[::2]:
        task.cancel()
    reads.gate.set()
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
