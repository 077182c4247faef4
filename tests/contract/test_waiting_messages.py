"""A message through Redis tells a task that waits to look, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta

import pytest
import redis.asyncio
from contract_helpers import SOON_S, counted_statements, make_request

from agent_gateway_store import ApprovalResult, GatewayStore, clock, errors

pytestmark = pytest.mark.integration

CHANNEL = "agent_gateway_store_changed"


@pytest.fixture
def redis_setting(fresh_redis_url: str) -> str:
    """There is always Redis here."""
    return fresh_redis_url


@pytest.fixture
async def client(redis_setting: str) -> AsyncIterator[redis.asyncio.Redis]:
    """Somebody else who can reach Redis."""
    async with redis.asyncio.from_url(redis_setting) as connected:
        yield connected


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def begin(store: GatewayStore, token: str) -> asyncio.Task[ApprovalResult]:
    """Begin to wait, and return once nothing but a signal or a poll moves the waiter."""
    signals = store._core.pubsub
    waiter = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=20))
    await until(lambda: signals._is_live and any(topic._waiting for topic in signals._topics.values()))
    return waiter


@pytest.mark.parametrize("move", ["approve", "deny", "cancel"])
async def test_a_decision_ends_a_wait_at_once(store: GatewayStore, other: GatewayStore, move: str) -> None:
    """The answer is the one that SQL gives, with its note whole."""
    token = await store.approvals.issue_token(make_request())
    waiter = await begin(store, token)
    await getattr(other.approvals, move)(token, "approver-1", "because \u20ac" * 1_000)
    async with asyncio.timeout(SOON_S):
        result = await waiter

    assert result == await store.approvals.check_token(token, fresh=True)
    assert result.note == "because \u20ac" * 1_000


async def test_a_decision_by_id_ends_a_wait_as_well(store: GatewayStore, other: GatewayStore) -> None:
    """Also where Redis has forgotten which token belongs to the id."""
    token = await store.approvals.issue_token(make_request())
    waiter = await begin(store, token)
    approval_id = (await store.approvals.check_token(token)).approval_id
    assert store._core.redis.client is not None
    await store._core.redis.client.flushdb()
    await other.approvals.approve(approval_id=approval_id, approver_id="approver-1")
    async with asyncio.timeout(SOON_S):
        result = await waiter

    assert (result.status, result.token) == ("APPROVED", token)


async def test_the_tasks_that_wait_for_one_approval_share_one_read(store: GatewayStore, other: GatewayStore) -> None:
    """A hundred of them, and the message of a decision costs one statement."""
    token = await store.approvals.issue_token(make_request())
    waiters = [await begin(store, token) for _ in range(100)]
    with counted_statements(store) as statements:
        await other.approvals.approve(token, "approver-1")
        async with asyncio.timeout(SOON_S):
            results = await asyncio.gather(*waiters)

    assert {result.status for result in results} == {"APPROVED"}
    assert len([each for each in statements if "SELECT" in each and "approval_requests" in each]) <= 1 + 4


async def test_a_forged_message_costs_a_read_and_tells_nothing(
    store: GatewayStore, other: GatewayStore, client: redis.asyncio.Redis
) -> None:
    """Whoever can publish can have SQL read once more; the task waits on, and what has no meaning reaches nobody."""
    token = await store.approvals.issue_token(make_request())
    approval_id = str((await store.approvals.check_token(token)).approval_id)
    waiter = await begin(store, token)
    for garbage in (b"\xff\xfe", b"", b"\n", f'{approval_id}\n{{"status":"APPROVED"}}'.encode(), b"x" * 1_000_000):
        await client.publish(CHANNEL, garbage)
    for _ in range(5):
        with counted_statements(store) as statements:
            await client.publish(CHANNEL, approval_id)
            await until(lambda seen=statements: len(seen) > 0)  # type: ignore[misc]
        assert not waiter.done()
    await other.approvals.deny(token, "approver-2")

    assert (await waiter).approver_id == "approver-2"


async def test_who_waits_by_a_token_that_was_replaced_learns_so(store: GatewayStore, other: GatewayStore) -> None:
    """The decision goes to the new token; the old one is gone, and does not learn how it went."""
    request = make_request()
    old = await store.approvals.issue_token(request)
    waiter = await begin(store, old)
    new = await other.approvals.issue_token(make_request(request_id=request.request_id))
    await other.approvals.approve(new, "approver-1")

    with pytest.raises(errors.ApprovalNotFoundError):
        await waiter


async def test_votes_that_decide_nothing_end_no_wait(store: GatewayStore, other: GatewayStore) -> None:
    """The first of two votes leaves the waiter waiting; the second ends it."""
    token = await store.approvals.issue_token(make_request(required_approvals=2))
    waiter = await begin(store, token)
    await other.approvals.approve(token, "approver-1")
    await asyncio.sleep(0.05)
    assert not waiter.done()
    await other.approvals.approve(token, "approver-2")

    assert ((await waiter).status, (await waiter).approver_id) == ("APPROVED", "approver-2")


async def test_a_sweep_ends_a_wait(store: GatewayStore, other: GatewayStore) -> None:
    """EXPIRED, written by a process whose clock is ahead, reaches a waiter whose own deadline is far."""
    token = await store.approvals.issue_token(make_request())
    waiter = await begin(store, token)
    clock.move(timedelta(hours=2))
    assert await other.approvals.expire_stale() == 1
    clock.reset()
    async with asyncio.timeout(SOON_S):
        assert (await waiter).status == "EXPIRED"
