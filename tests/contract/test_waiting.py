"""Waiting for decisions: a message says "look", a poll stands behind it, SQL gives the answer, nothing is left behind.

Messages go through Redis where there is Redis, else through PostgreSQL, else a poll is all there is.
"""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from contract_helpers import SOON_S, WITH_REDIS, Reads, counted_statements, hears, idle, topics, until

from agent_gateway_store import ApprovalResult, GatewayStore, clock, errors
from agent_gateway_store.approval import waiting
from agent_gateway_store.storage.pubsub import PubSub
from agent_gateway_store.store import parts_of
from builders import make_request
from cases import cases

CHANNELS = pytest.mark.parametrize(
    ("database_url", "redis_setting"),
    [("sqlite", "no-redis"), ("postgres", "no-redis"), ("postgres", "redis")],
    indirect=True,
)
"""A poll, the database's messages, and Redis's."""
CHANNEL = "agent_gateway_store_changed"


@pytest.fixture
def no_poll(database_url: str, redis_setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are messages no poll stands in for one that is lost."""
    if redis_setting or database_url.startswith("postgresql"):
        monkeypatch.setattr(PubSub, "poll_s", 60.0)


async def begin(store: GatewayStore, token: str, count: int = 1) -> list[asyncio.Task[ApprovalResult]]:
    """Begin to wait, and return once nothing but a message or a poll moves the waiters."""
    pubsub = parts_of(store).pubsub
    before = pubsub.tasks_waiting
    waiters = [asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=20)) for _ in range(count)]
    if store.database.can_listen or parts_of(store).redis.client is not None:
        # On the subscription everybody looks once more.
        await hears(store)
    await until(lambda: pubsub.tasks_waiting == before + count)
    return waiters


@pytest.mark.usefixtures("no_poll")
@CHANNELS
async def test_a_decision_elsewhere_wakes_every_waiter(store: GatewayStore, other: GatewayStore) -> None:
    """Fifty tasks wait for ten approvals that another store decides; each learns its own decision, and none waits for
    the slow poll that stands behind a subscription."""
    tokens = [await store.approvals.issue_token(make_request()) for _ in range(10)]
    waiting = [waiter for token in tokens for waiter in await begin(store, token, 5)]
    started = time.monotonic()
    for number, token in enumerate(tokens):
        decide = other.approvals.approve if number % 2 else other.approvals.deny
        await decide(token, f"approver-{number}")
    results = await asyncio.gather(*waiting)

    assert time.monotonic() - started < SOON_S
    assert [(result.status, result.approver_id) for result in results[::5]] == [
        ("APPROVED" if number % 2 else "DENIED", f"approver-{number}") for number in range(10)
    ]
    assert [result.token for result in results] == [token for token in tokens for _ in range(5)]
    assert topics(store) == 0


@pytest.mark.usefixtures("no_poll")
@WITH_REDIS
async def test_a_decision_by_id_ends_a_wait_as_well(
    store: GatewayStore, other: GatewayStore, client: redis.asyncio.Redis
) -> None:
    token = await store.approvals.issue_token(make_request())
    (waiter,) = await begin(store, token)
    approval_id = (await store.approvals.check_token(token)).approval_id
    await client.flushdb()
    await other.approvals.approve(approval_id=approval_id, approver_id="approver-1")
    async with asyncio.timeout(SOON_S):
        result = await waiter

    assert (result.status, result.token) == ("APPROVED", token)


async def test_a_decision_in_the_same_store_wakes_at_once(store: GatewayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PubSub, "poll_s", 60.0)
    token = await store.approvals.issue_token(make_request())
    (waiter,) = await begin(store, token)
    await store.approvals.approve(token, "approver-1")
    async with asyncio.timeout(SOON_S):
        assert (await waiter).status == "APPROVED"


@CHANNELS
async def test_waiters_of_one_approval_share_their_reads(
    store: GatewayStore, other: GatewayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await store.approvals.issue_token(make_request())
    waiting = await begin(store, token, 100)
    reads = Reads(store, monkeypatch)
    await other.approvals.approve(token, "approver-1")
    results = await asyncio.gather(*waiting)

    assert {result.status for result in results} == {"APPROVED"}
    # A poll may fall into the same moment.
    assert reads.number <= 3


@WITH_REDIS
async def test_a_forged_message_costs_a_read_and_tells_nothing(
    store: GatewayStore, other: GatewayStore, client: redis.asyncio.Redis
) -> None:
    """Whoever can publish can have SQL read once more; the task waits on, and what has no meaning reaches nobody."""
    token = await store.approvals.issue_token(make_request())
    approval_id = str((await store.approvals.check_token(token)).approval_id)
    (waiter,) = await begin(store, token)
    for garbage in (b"\xff\xfe", b"", b"\n", f'{approval_id}\n{{"status":"APPROVED"}}'.encode(), b"x" * 1_000_000):
        await client.publish(CHANNEL, garbage)
    for _ in range(5):
        with counted_statements(store) as statements:
            await client.publish(CHANNEL, approval_id)
            await until(lambda seen=statements: len(seen) > 0)  # type: ignore[misc]
        assert not waiter.done()
    await other.approvals.deny(token, "approver-2")

    assert (await waiter).approver_id == "approver-2"


@pytest.mark.usefixtures("no_poll")
@CHANNELS
async def test_a_decision_while_the_subscription_was_cut_wakes_with_the_next_one(
    store: GatewayStore, other: GatewayStore, client: redis.asyncio.Redis | None
) -> None:
    if client is None and not store.database.can_listen:
        return  # without a subscription there is none to be cut
    token = await store.approvals.issue_token(make_request())
    (waiter,) = await begin(store, token)
    pubsub = parts_of(store).pubsub
    if client is not None:
        await client.client_kill_filter(_type="pubsub")
    else:
        async with other.database.write() as connection:
            await connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND query LIKE 'LISTEN%'"
            )
    await until(lambda: not pubsub.is_live)
    async with other.database.write() as connection:  # by somebody who tells nobody
        await connection.exec_driver_sql(
            "UPDATE approval_requests SET status = 'CANCELLED', version = 2 WHERE status = 'PENDING'"
        )
    started = time.monotonic()

    assert (await waiter).status == "CANCELLED"
    assert time.monotonic() - started < SOON_S


@pytest.mark.usefixtures("no_poll")
@CHANNELS
async def test_who_waits_by_a_token_that_was_replaced_learns_so(store: GatewayStore, other: GatewayStore) -> None:
    """The decision goes to the new token; the old one is gone, and does not learn how it went."""
    request = make_request()
    old = await store.approvals.issue_token(request)
    (waiter,) = await begin(store, old)
    new = await other.approvals.issue_token(make_request(request_id=request.request_id))
    await other.approvals.approve(new, "approver-1")

    with pytest.raises(errors.ApprovalNotFoundError):
        await waiter


@CHANNELS
async def test_votes_that_decide_nothing_end_no_wait(
    store: GatewayStore, other: GatewayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two votes makes the waiter look, and it waits on; the second ends the wait."""
    token = await store.approvals.issue_token(make_request(required_approvals=2))
    (waiter,) = await begin(store, token)
    await other.approvals.approve(token, "approver-1")
    pubsub, reads = parts_of(store).pubsub, Reads(store, monkeypatch)
    await pubsub.publish(str((await store.approvals.check_token(token)).approval_id))
    await until(lambda: reads.number > 0 and pubsub.tasks_waiting == 1)
    assert not waiter.done()
    await other.approvals.approve(token, "approver-2")

    assert ((await waiter).status, (await waiter).approver_id) == ("APPROVED", "approver-2")


@pytest.mark.usefixtures("no_poll")
@CHANNELS
async def test_a_sweep_ends_a_wait(store: GatewayStore, other: GatewayStore) -> None:
    """EXPIRED, written by a process whose clock is ahead, reaches a waiter whose own deadline is far."""
    token = await store.approvals.issue_token(make_request())
    (waiter,) = await begin(store, token)
    clock.move(timedelta(hours=2))
    assert await other.approvals.expire_stale() == 1
    clock.reset()
    async with asyncio.timeout(SOON_S):
        assert (await waiter).status == "EXPIRED"


@pytest.mark.usefixtures("no_poll")
async def test_a_deadline_that_passes_ends_the_wait(store: GatewayStore) -> None:
    """EXPIRED is a state that nobody signals; the waiter looks when the deadline is due."""
    token = await store.approvals.issue_token(make_request(expires_at=clock.utc_now() + timedelta(seconds=0.7)))
    async with asyncio.timeout(SOON_S):
        result = await store.approvals.wait_for_decision(token, timeout_s=20)

    assert result.status == "EXPIRED"


@CHANNELS
async def test_a_deadline_that_is_over_here_alone_is_not_read_again_and_again(
    store: GatewayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where this machine's clock is hours ahead, the database is asked as often as without messages, or less."""
    token = await store.approvals.issue_token(make_request())
    monkeypatch.setattr(waiting, "utc_now", lambda: clock.utc_now() + timedelta(hours=3))
    reads = Reads(store, monkeypatch)
    result = await store.approvals.wait_for_decision(token, timeout_s=0.3)

    assert result.status == "PENDING"
    assert reads.number <= 6


@CHANNELS
async def test_the_timeout_decides_nothing_and_leaves_nothing(store: GatewayStore) -> None:
    token = await store.approvals.issue_token(make_request())
    began = time.monotonic()
    result = await store.approvals.wait_for_decision(token, timeout_s=0.2)

    assert result.status == "PENDING"
    assert time.monotonic() - began < 10
    assert topics(store) == 0
    assert (await store.approvals.approve(token, "approver-1")).status == "APPROVED"
    await idle(store)


@cases("timeout_s", [None, "5", float("nan")])
async def test_a_timeout_that_is_no_number_is_refused(store: GatewayStore, timeout_s: Any) -> None:
    token = await store.approvals.issue_token(make_request())

    with pytest.raises((TypeError, ValueError), match="timeout_s must be a number, not"):
        await store.approvals.wait_for_decision(token, timeout_s=timeout_s)


@CHANNELS
async def test_cancelled_waiters_leave_nothing_and_disturb_nobody(store: GatewayStore) -> None:
    """Half of the waiters of one approval are cancelled; the others still learn the decision."""
    token = await store.approvals.issue_token(make_request())
    waiting = await begin(store, token, 40)
    for task in waiting[::2]:
        task.cancel()
    await store.approvals.approve(token, "approver-1")
    results = await asyncio.gather(*waiting, return_exceptions=True)

    assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
    assert {result.status for result in results[1::2]} == {"APPROVED"}  # type: ignore[union-attr]
    assert topics(store) == 0


@CHANNELS
async def test_a_closing_store_lets_its_waiters_go(database_url: str, redis_setting: str) -> None:
    store = await GatewayStore(database_url, redis_url=redis_setting).open()
    token = await store.approvals.issue_token(make_request())
    waiter = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=20))
    await until(lambda: topics(store) == 1)
    await store.close()
    async with asyncio.timeout(5):
        with pytest.raises(errors.StoreNotOpenError):
            await waiter


@pytest.mark.parametrize("ticks", range(0, 12, 3))
async def test_closing_while_the_subscription_begins_ends(tmp_path: Path, redis_url: str, ticks: int) -> None:
    async with GatewayStore(f"sqlite:///{tmp_path}/test.db", redis_url=redis_url) as store:
        token = await store.approvals.issue_token(make_request())
        waiting = asyncio.ensure_future(store.approvals.wait_for_decision(token, timeout_s=0.01))
        while not topics(store):  # with the first the subscription begins
            await asyncio.sleep(0)
        for _ in range(ticks):
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await parts_of(store).pubsub.close()
        await waiting
