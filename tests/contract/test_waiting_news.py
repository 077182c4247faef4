"""What a signal through Redis tells those who wait: the decision, if it can be believed; else to look."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest
import redis.asyncio
from contract_helpers import CALL, SOON_S, make_request

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


@pytest.fixture
def reads(store: GatewayStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tokens whose row the store has read."""
    tokens: list[str] = []
    row = store.approvals._row

    async def noting(token: str) -> Any:
        tokens.append(token)
        return await row(token)

    monkeypatch.setattr(store.approvals, "_row", noting)
    return tokens


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


async def heard(client: redis.asyncio.Redis, decide: Callable[[], Any]) -> str:
    """Make a decision, and return the message that went out with it."""
    async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
        await pubsub.subscribe(CHANNEL)
        await decide()
        async with asyncio.timeout(5):
            while (message := await pubsub.get_message(timeout=5)) is None:
                pass
    return str(message["data"].decode())


@pytest.mark.parametrize("move", ["approve", "deny", "cancel"])
async def test_a_waiter_is_told_without_a_read(
    store: GatewayStore, other: GatewayStore, reads: list[str], move: str
) -> None:
    """The answer is the one that SQL gives, and reads none."""
    token = await store.approvals.issue_token(make_request())
    waiter = await begin(store, token)
    before = len(reads)
    await getattr(other.approvals, move)(token, "approver-1", "because \u20ac")
    async with asyncio.timeout(SOON_S):
        result = await waiter

    assert len(reads) == before
    assert result == await store.approvals.check_token(token, fresh=True)
    assert result.note == "because \u20ac"


async def test_a_decision_by_id_is_told_as_well(store: GatewayStore, other: GatewayStore, reads: list[str]) -> None:
    """Also where Redis has forgotten which token belongs to the id."""
    token = await store.approvals.issue_token(make_request())
    waiter = await begin(store, token)
    approval_id = (await store.approvals.check_token(token)).approval_id
    assert store._core.redis.client is not None
    await store._core.redis.client.flushdb()
    before = len(reads)
    await other.approvals.approve(approval_id=approval_id, approver_id="approver-1")
    async with asyncio.timeout(SOON_S):
        result = await waiter

    assert len(reads) == before
    assert (result.status, result.token) == ("APPROVED", token)


async def test_a_long_note_is_read_from_sql(store: GatewayStore, other: GatewayStore, reads: list[str]) -> None:
    """It is too long to be sent around; the waiter gets it whole."""
    token = await store.approvals.issue_token(make_request())
    waiter = await begin(store, token)
    before = len(reads)
    await other.approvals.deny(token, "approver-1", "x" * 50_000)
    async with asyncio.timeout(SOON_S):
        result = await waiter

    assert result.note == "x" * 50_000
    assert len(reads) > before


FORGERIES: list[Callable[[dict[str, Any]], str]] = [
    lambda _: "",
    lambda _: "APPROVED",
    lambda _: "{",
    lambda _: '{"status":"APPROVED"}',
    lambda _: "\x00\n\n\n",
    lambda news: json.dumps(news | {"token_sha256": "0" * 64}),
    lambda news: json.dumps(news | {"token_sha256": None}),
    lambda news: json.dumps(news | {"approval_id": "00000000-0000-0000-0000-000000000000"}),
    lambda news: json.dumps(news | {"status": "GRANTED"}),
    lambda news: json.dumps(news | {"read_at": "1999-01-01T00:00:00Z"}),
    lambda news: json.dumps(news | {"read_at": "2999-01-01T00:00:00Z"}),
    lambda news: json.dumps(news | {"expires_at": "1999-01-01T00:00:00Z"}),
]


async def test_what_cannot_be_believed_is_looked_up(
    store: GatewayStore, other: GatewayStore, client: redis.asyncio.Redis, reads: list[str]
) -> None:
    """Garbage, a forgery by somebody who does not know the token's digest, and old news each cost a read of SQL, after
    which the waiter waits on; what is published without a meaning reaches nobody."""
    token = await store.approvals.issue_token(make_request())
    model = await store.approvals.issue_token(make_request())
    approval_id = str((await store.approvals.check_token(token)).approval_id)
    _, _, text = (await heard(client, lambda: other.approvals.approve(model, "approver-1"))).partition("\n")
    own = json.loads(await client.get(f"approval:{token}"))
    news = json.loads(text) | {"approval_id": approval_id, "token_sha256": own["token_sha256"]}
    waiter = await begin(store, token)
    for garbage in (b"\xff\xfe", b"", b"\n", f"\n{json.dumps(news)}".encode(), b"x" * 1_000_000):
        await client.publish(CHANNEL, garbage)
    for forge in FORGERIES:
        before = len(reads)
        await client.publish(CHANNEL, f"{approval_id}\n{forge(news)}")
        await until(lambda seen=before: len(reads) > seen)  # type: ignore[misc]
        await asyncio.sleep(0.01)
        assert not waiter.done()
    await other.approvals.deny(token, "approver-2")

    assert (await waiter).approver_id == "approver-2"


async def test_a_waiter_that_was_lied_to_releases_nothing(
    store: GatewayStore, other: GatewayStore, client: redis.asyncio.Redis
) -> None:
    """Somebody who reads Redis's entries and publishes can tell a waiter APPROVED; using the approval asks SQL."""
    token = await store.approvals.issue_token(make_request())
    model = await store.approvals.issue_token(make_request())
    approval_id = str((await store.approvals.check_token(token)).approval_id)
    _, _, text = (await heard(client, lambda: other.approvals.approve(model, "approver-1"))).partition("\n")
    own = json.loads(await client.get(f"approval:{token}"))
    waiter = await begin(store, token)
    lie = json.loads(text) | {"approval_id": approval_id, "token_sha256": own["token_sha256"]}
    await client.publish(CHANNEL, f"{approval_id}\n{json.dumps(lie)}")
    async with asyncio.timeout(SOON_S):
        assert (await waiter).status == "APPROVED"

    with pytest.raises(errors.ApprovalNotApprovedError):
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)


async def test_who_waits_by_a_token_that_was_replaced_is_told_so(store: GatewayStore, other: GatewayStore) -> None:
    """The decision goes to the new token; the old one is gone, and does not learn how it went."""
    request = make_request()
    old = await store.approvals.issue_token(request)
    waiter = await begin(store, old)
    new = await other.approvals.issue_token(make_request(request_id=request.request_id))
    await other.approvals.approve(new, "approver-1")

    with pytest.raises(errors.ApprovalNotFoundError):
        await waiter


async def test_votes_that_decide_nothing_wake_nobody_wrongly(store: GatewayStore, other: GatewayStore) -> None:
    """The first of two votes leaves the waiter waiting; the second is told."""
    token = await store.approvals.issue_token(make_request(required_approvals=2))
    waiter = await begin(store, token)
    await other.approvals.approve(token, "approver-1")
    await asyncio.sleep(0.05)
    assert not waiter.done()
    await other.approvals.approve(token, "approver-2")

    assert ((await waiter).status, (await waiter).approver_id) == ("APPROVED", "approver-2")


async def test_a_sweep_tells_those_who_wait(store: GatewayStore, other: GatewayStore) -> None:
    """EXPIRED, written by a process whose clock is ahead, reaches a waiter whose own deadline is far."""
    token = await store.approvals.issue_token(make_request())
    waiter = await begin(store, token)
    clock.move(timedelta(hours=2))
    assert await other.approvals.expire_stale() == 1
    clock.reset()
    async with asyncio.timeout(SOON_S):
        assert (await waiter).status == "EXPIRED"
