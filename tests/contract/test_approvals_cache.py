"""Redis makes reads of approvals fast; absent, slow, empty, stale or poisoned, it makes no answer wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import redis.asyncio
from contract_helpers import POSTGRES, approved, counted_statements

import servers
from agent_gateway_store import ApprovalManager, ApprovalScope, GatewayStore, StoreSettings, clock, errors
from agent_gateway_store.approval import ApprovalBackend, cache
from agent_gateway_store.storage.redis_cache import CacheEntry, RedisCache
from agent_gateway_store.store import parts_of
from builders import CALL, make_request

pytestmark = [POSTGRES, pytest.mark.usefixtures("no_plugins")]


@pytest.fixture
def redis_setting(fresh_redis_url: str) -> str:
    """There is always Redis here."""
    return fresh_redis_url


@pytest.fixture
def server() -> Iterator[servers.RedisServer]:
    """A Redis server that a test may stop."""
    with servers.RedisServer() as started:
        yield started


async def entry(client: redis.asyncio.Redis, token: str) -> dict[str, Any]:
    """Return the entry of a token."""
    return dict(json.loads(await client.get(f"approval:{token}")))


async def id_of(store: GatewayStore, token: str) -> UUID:
    """Return the id of the approval of a token, as SQL has it."""
    return (await store.approvals.check_token(token, fresh=True)).approval_id


@pytest.mark.parametrize("by", ["token", "id"])
async def test_decision_updates_sql_and_redis(store: GatewayStore, client: redis.asyncio.Redis, by: str) -> None:
    token = await store.approvals.issue_token(make_request())
    name = {"token": token} if by == "token" else {"approval_id": await id_of(store, token)}
    await store.approvals.approve(**name, approver_id="approver-1")

    held = await entry(client, token)
    assert (held["status"], held["approver_id"], held["version"]) == ("APPROVED", "approver-1", 2)
    assert (await store.approvals.check_token(token, fresh=True)).status == "APPROVED"
    await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    assert (await entry(client, token))["status"] == "USED"


async def test_hit_costs_no_sql(store: GatewayStore) -> None:
    """A status in Redis is answered from there, equal to what SQL says; `fresh` reads SQL."""
    output = make_request(scope=ApprovalScope.OUTPUT_RELEASE, output_payload={"rows": 1})
    tokens = [await store.approvals.issue_token(output), await approved(store)]
    with counted_statements(store, "approval_requests") as statements:
        cached = [await store.approvals.check_token(token) for token in tokens]
        assert statements == []
        fresh = [await store.approvals.check_token(token, fresh=True) for token in tokens]
        assert len(statements) == 2

    assert cached == fresh
    assert cached[0].scope is ApprovalScope.OUTPUT_RELEASE


async def test_miss_fills_the_cache_for_the_life_that_is_left(store: GatewayStore, client: redis.asyncio.Redis) -> None:
    """After Redis lost everything one read of SQL brings both entries back, to end with the approval."""
    token = await store.approvals.issue_token(make_request())
    await client.flushdb()
    with counted_statements(store, "approval_requests") as statements:
        for _ in range(3):
            assert (await store.approvals.check_token(token)).status == "PENDING"

    assert len(statements) == 1
    by_id = f"approval-token:{await id_of(store, token)}"
    assert sorted(await client.keys()) == sorted([f"approval:{token}".encode(), by_id.encode()])
    held = await entry(client, token)
    assert (held["status"], held["version"], token in json.dumps(held)) == ("PENDING", 1, False)
    assert 3_500_000 < await client.pttl(f"approval:{token}") <= 3_600_000


async def test_a_status_is_trusted_for_a_while_only(store: GatewayStore, client: redis.asyncio.Redis) -> None:
    """What is older than APPROVAL_CACHE_SECONDS, or has no end, is not believed; nor is a final one, made up or not."""
    token = await store.approvals.issue_token(make_request())
    stale = await entry(client, token)
    await store.approvals.approve(token, "approver-1")
    forged = stale | {"status": "DENIED", "version": 10**9, "approver_id": "evil"}
    for held in (stale, forged):
        await client.set(f"approval:{token}", json.dumps(held), px=held["life_ms"] - 2_100)
        assert (await store.approvals.check_token(token)).status == "APPROVED"
    await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    await client.delete(f"approval:{token}")
    for is_persistent, reads in ((False, 1), (False, 0), (True, 1)):
        if is_persistent:
            await client.persist(f"approval:{token}")
        with counted_statements(store, "approval_requests") as statements:
            assert (await store.approvals.check_token(token)).status == "USED"
        assert len(statements) == reads  # what has no end was not written by us


async def test_a_clock_that_is_behind_trusts_nothing_that_was_written_late(
    store: GatewayStore, client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that stood still writes what it saw before the decision; Redis, flushed since, knows no better."""
    token = await store.approvals.issue_token(make_request())
    stale = await entry(client, token)
    await store.approvals.approve(token, "approver-1")
    await asyncio.sleep(2.1)
    await client.set(f"approval:{token}", json.dumps(stale), px=stale["life_ms"])
    monkeypatch.setattr(cache, "utc_now", lambda: clock.utc_now() - timedelta(hours=1))

    assert (await store.approvals.check_token(token)).status == "APPROVED"


async def test_trust_can_be_switched_off(database_url: str, redis_setting: str) -> None:
    settings = StoreSettings(approval_cache_seconds=0)
    async with GatewayStore(database_url, redis_url=redis_setting, settings=settings) as store:
        token = await store.approvals.issue_token(make_request())
        with counted_statements(store, "approval_requests") as statements:
            await store.approvals.check_token(token)

    assert len(statements) == 1


@pytest.mark.parametrize(
    ("is_approved", "wait_s", "use_s"), [(False, 30, 3_600), (True, 3_600, 30)], ids=["pending", "approved"]
)
async def test_what_is_cached_ends_with_its_own_deadline(
    database_url: str, redis_setting: str, is_approved: bool, wait_s: float, use_s: float
) -> None:
    """Within the time of trust, too: one that waits ends with `expires_at`, one that is approved with `use_before`."""
    now = clock.utc_now()
    deadlines = {"expires_at": now + timedelta(seconds=wait_s), "use_before": now + timedelta(seconds=use_s)}
    settings = StoreSettings(approval_cache_seconds=60)
    async with GatewayStore(database_url, redis_url=redis_setting, settings=settings) as store:
        token = await store.approvals.issue_token(make_request(**deadlines))
        if is_approved:
            await store.approvals.approve(token, "approver-1")
        with counted_statements(store, "approval_requests") as statements:
            before = await store.approvals.check_token(token)
        clock.move(timedelta(seconds=30))
        after = await store.approvals.check_token(token)

    assert (before.status, statements) == ("APPROVED" if is_approved else "PENDING", [])
    assert after.status == "EXPIRED"


class GatedRedis(RedisCache):
    """Holds every write back until the gate opens."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        super().__init__(client)
        self.gate, self.waits = asyncio.Event(), asyncio.Event()

    async def put_newer(self, entries: Sequence[CacheEntry], *, message: tuple[str, str] | None = None) -> bool:
        self.waits.set()
        await self.gate.wait()
        return await super().put_newer(entries, message=message)


async def test_older_version_never_replaces_a_newer_one(store: GatewayStore, client: redis.asyncio.Redis) -> None:
    """A reader that saw PENDING and writes it to Redis after the decision does not undo the decision there."""
    token = await store.approvals.issue_token(make_request())
    slow = GatedRedis(client)
    reader = ApprovalManager(ApprovalBackend(store.database, slow, store.settings))
    reading = asyncio.create_task(reader.check_token(token, fresh=True))
    await asyncio.wait_for(slow.waits.wait(), 10)
    await store.approvals.deny(token, "approver-1")
    slow.gate.set()

    assert (await reading).status == "PENDING"
    assert (await entry(client, token))["status"] == "DENIED"
    assert (await store.approvals.check_token(token)).status == "DENIED"


async def test_entry_of_another_token_is_not_believed(store: GatewayStore, client: redis.asyncio.Redis) -> None:
    pending = await store.approvals.issue_token(make_request())
    agreed = await approved(store)
    await client.copy(f"approval:{agreed}", f"approval:{pending}", replace=True)

    assert (await store.approvals.check_token(pending)).status == "PENDING"


async def test_wrong_token_behind_an_id_is_not_believed(store: GatewayStore, client: redis.asyncio.Redis) -> None:
    """A decision by id whose entry leads to another token does not write that token's entry."""
    tokens = [await store.approvals.issue_token(make_request()) for _ in range(2)]
    decided, other = [await id_of(store, token) for token in tokens]
    await client.copy(f"approval-token:{other}", f"approval-token:{decided}", replace=True)
    await store.approvals.approve(approval_id=decided, approver_id="approver-1")

    assert (await entry(client, tokens[1]))["approval_id"] == str(other)
    assert (await store.approvals.check_token(tokens[1])).status == "PENDING"
    assert (await store.approvals.check_token(tokens[0], fresh=True)).status == "APPROVED"


POISON: list[Callable[[dict[str, Any]], Any]] = [
    *(lambda _, text=text: text for text in ("", "no JSON", "[]", "{}", "null", "1e999", "\xff", "[" * 100_000)),
    *(
        lambda entry, change=change: json.dumps(entry | change)
        for change in (
            {"approval_id": 5},
            {"approval_id": "x"},
            {"status": "MAYBE"},
            {"scope": None},
            {"org_id": 7},
            {"approver_note": {"a": 1}},
            {"expires_at": "2999-01-01T00:00:00"},
            {"expires_at": None},
            {"use_before": "soon"},
            {"life_ms": 10**400},
            {"life_ms": "long"},
            {"token_sha256": "0" * 64, "status": "APPROVED"},
            {"token_sha256": None, "status": "APPROVED"},
        )
    ),
    lambda entry: json.dumps({name: value for name, value in entry.items() if name != "use_before"}),
]


async def test_garbage_in_redis_is_no_answer(store: GatewayStore, client: redis.asyncio.Redis) -> None:
    """Whatever stands in the entries, checking, deciding and using go by SQL and raise nothing."""
    token = await store.approvals.issue_token(make_request())
    by_id = f"approval-token:{await id_of(store, token)}"
    sound = await entry(client, token)
    for poison in POISON:
        for key in (f"approval:{token}", by_id):
            await client.set(key, poison(sound), px=sound["life_ms"])
        assert (await store.approvals.check_token(token)).status == "PENDING"
    await client.set(by_id, json.dumps({"token": 5}), px=1000)
    decided = await store.approvals.approve(approval_id=await id_of(store, token), approver_id="approver-1")

    assert decided.status == "APPROVED"
    await client.set(f"approval:{token}", json.dumps(sound))
    assert (await store.approvals.check_token(token)).status == "APPROVED"
    await client.set(f"approval:{token}", "garbage")
    assert (await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)).status == "USED"


async def test_entry_of_another_kind_is_no_answer_and_is_replaced(
    store: GatewayStore, client: redis.asyncio.Redis
) -> None:
    """A key that holds a list rather than text is a miss, which the next read of SQL mends; Redis stays in use."""
    token = await store.approvals.issue_token(make_request())
    for key in (f"approval:{token}", f"approval-token:{await id_of(store, token)}"):
        await client.delete(key)
        await client.lpush(key, "x")

    assert (await store.approvals.check_token(token)).status == "PENDING"
    assert parts_of(store).redis.is_available
    assert (await entry(client, token))["status"] == "PENDING"
    assert (await store.approvals.approve(approval_id=await id_of(store, token), approver_id="a")).status == "APPROVED"
    assert (await entry(client, token))["status"] == "APPROVED"


@pytest.mark.parametrize("token", ["\ud800-unspeakable", "t" * 10_000], ids=["surrogate", "long"])
async def test_token_that_redis_does_not_take_works_without(store: GatewayStore, token: str) -> None:
    """A token of the gateway's own making that is no key for Redis is kept in SQL alone."""
    assert await store.approvals.issue_token(make_request(token=token)) == token

    await store.approvals.approve(token, "approver-1")
    assert (await store.approvals.check_token(token)).status == "APPROVED"
    assert (await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)).status == "USED"


async def nothing() -> None:
    """Disturb nobody."""


async def live(store: GatewayStore, disturb: Callable[[], Awaitable[Any]] = nothing) -> None:
    """Lead one approval from asking to its outcome, with a disturbance before each step, and check every answer."""
    token = await store.approvals.issue_token(make_request())
    await disturb()
    assert (await store.approvals.check_token(token)).status == "PENDING"
    await disturb()
    await store.approvals.approve(approval_id=await id_of(store, token), approver_id="approver-1")
    await disturb()
    assert (await store.approvals.check_token(token, fresh=True)).status == "APPROVED"
    await disturb()
    await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    await disturb()
    assert (await store.approvals.check_token(token)).status == "USED"
    with pytest.raises(errors.ApprovalAlreadyUsedError):
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)


@pytest.mark.parametrize("fault", ["pause", "kill"])
async def test_redis_that_fails_costs_one_timeout(
    database_url: str, server: servers.RedisServer, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With Redis hung or gone everything goes on, and one line in the log says so; back again, it is used."""
    async with GatewayStore(database_url, redis_url=server.url) as store:
        token = await store.approvals.issue_token(make_request())
        getattr(server, fault)()
        await live(store)
        assert (await store.approvals.check_token(token)).status == "PENDING"
        server.resume() if fault == "pause" else server.start()
        await live(store)

    faults = [record for record in caplog.records if "Redis does not answer" in record.message]
    assert len(faults) == 1


async def test_decision_made_while_redis_hangs_is_seen_after(database_url: str, server: servers.RedisServer) -> None:
    """An entry that missed a decision is not believed once it is older than APPROVAL_CACHE_SECONDS."""
    settings = StoreSettings(approval_cache_seconds=0.1)
    async with GatewayStore(database_url, redis_url=server.url, settings=settings) as store:
        token = await approved(store)
        server.pause()
        await store.approvals.cancel(token, "dev-agent")
        server.resume()
    async with GatewayStore(database_url, redis_url=server.url, settings=settings) as other:
        assert (await other.approvals.check_token(token)).status == "CANCELLED"
        with pytest.raises(errors.ApprovalNotApprovedError):
            await other.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)


async def test_redis_flushed_at_every_step_changes_nothing(store: GatewayStore, client: redis.asyncio.Redis) -> None:
    await live(store, client.flushall)


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


async def test_a_redis_that_answers_nonsense_is_a_miss(database_url: str, nonsense_url: str) -> None:
    async with GatewayStore(database_url, redis_url=nonsense_url) as store:
        token = await store.approvals.issue_token(make_request())
        asked = await asyncio.gather(*(store.approvals.check_token(token) for _ in range(20)))

    assert {result.status for result in asked} == {"PENDING"}
