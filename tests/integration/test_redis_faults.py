"""Redis fails in every way while approvals are checked, decided and used: no wrong answer, no error, no stall."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis.asyncio

from agent_gateway_store import GatewayStore, StoreSettings, errors
from agent_gateway_store.store import parts_of
from builders import CALL, make_request
from servers import RedisServer

pytestmark = [pytest.mark.usefixtures("no_plugins"), pytest.mark.system]

BOUND_S = 0.3
"""APPROVAL_CACHE_SECONDS of these tests."""
REDIS_TIMEOUT_S = 1.0
LONGEST_CALL_S = 10.0  # 0.3 on a machine of our own, with a timeout of 0.2; redis-py alone would take a minute
CALLERS = 8


class Truth:
    """Approvals with what is known of them: how each stands, and how it stood before."""

    def __init__(self, store: GatewayStore) -> None:
        self.store = store
        self.history: dict[str, list[tuple[str, float, float]]] = {}
        self.ids: dict[str, Any] = {}

    def may_be(self, token: str, begun: float) -> set[str]:
        """The statuses that a check which began then may give."""
        return {status for status, _, end in self.history[token] if begun - end < BOUND_S}

    async def add(self) -> str:
        token = await self.store.approvals.issue_token(make_request())
        self.history[token] = [("PENDING", time.monotonic(), float("inf"))]
        self.ids[token] = (await self.store.approvals.check_token(token, fresh=True)).approval_id
        return token

    async def move(self, token: str, status: str, change: Awaitable[Any]) -> None:
        """Make a change after which the approval stands at `status`; while it runs both may be seen."""
        before, since, _ = self.history[token][-1]
        self.history[token].append((status, time.monotonic(), float("inf")))
        result = await change
        assert (result.approval_id, result.status) == (self.ids[token], status)
        self.history[token][-2] = (before, since, time.monotonic())

    async def decide(self, token: str, rng: random.Random) -> None:
        approvals, by = self.store.approvals, f"approver-{rng.randrange(100)}"
        name = {"approval_id": self.ids[token]} if rng.random() < 0.5 else {"token": token}
        status, decide = rng.choice([("APPROVED", approvals.approve), ("DENIED", approvals.deny)])
        await self.move(token, status, decide(**name, approver_id=by))

    async def use(self, token: str) -> None:
        """Try to use the approval, twice at once, and check that what SQL says decides."""
        status = self.history[token][-1][0]

        async def consume() -> Any:
            return await self.store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)

        if status == "APPROVED":
            await self.move(token, "USED", consume())
            with pytest.raises(errors.ApprovalAlreadyUsedError):
                await consume()
        else:
            with pytest.raises(errors.ApprovalError, match="already been used" if status == "USED" else status):
                await consume()


class Checks:
    """Checks by several callers, with what they met."""

    def __init__(self, truth: Truth, seed: int) -> None:
        self.truth, self.rng = truth, random.Random(seed)
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self.open_seconds: list[float] = []
        self.answered = 0

    async def run(self, number: int) -> None:
        """Check random tokens so often, and decide one now and then."""
        left = iter(range(number))

        async def caller() -> None:
            for index in left:
                if index % 25 == 7 and (token := self._one_at("PENDING")):
                    await self.truth.decide(token, self.rng)
                await self._check()

        await asyncio.gather(*(caller() for _ in range(CALLERS)))

    async def _check(self) -> None:
        token = self.rng.choice(list(self.truth.history))
        redis_is_out = not parts_of(self.truth.store).redis.is_available
        begun = time.monotonic()
        result = await self.truth.store.approvals.check_token(token, fresh=self.rng.random() < 0.05)
        seconds = time.monotonic() - begun
        self.answered += 1
        self.seconds.append(seconds)
        if redis_is_out:
            self.open_seconds.append(seconds)
        if result.approval_id != self.truth.ids[token] or str(result.status) not in self.truth.may_be(token, begun):
            self.wrong.append(f"{result.status}: {self.truth.history[token]}, asked at {begun}")

    def _one_at(self, status: str) -> str | None:
        return next((token for token, history in self.truth.history.items() if history[-1][0] == status), None)

    async def use(self, number: int) -> None:
        """Make, decide and use so many further approvals."""
        for _ in range(number):
            token = await self.truth.add()
            if self.rng.random() < 0.8:
                await self.truth.decide(token, self.rng)
            await self.truth.use(token)
            await self.truth.use(token)


def poisons(sound: bytes, other: bytes) -> list[bytes]:
    entry = json.loads(sound)
    changed: list[dict[str, Any]] = [
        {"version": 10**300},
        {"version": -1},
        {"version": "9"},
        {"version": 1e308, "token_sha256": "0" * 64, "status": "APPROVED"},
        {"token_sha256": 17, "status": "APPROVED"},
        {"status": "approved"},
        {"status": ["APPROVED"], "approver_id": {}},
        {"life_ms": 10**30},
        {"life_ms": -5},
        {"life_ms": "NaN"},
        {"read_at": "never", "status": "APPROVED"},
        {"read_at": "1970-01-01T00:00:00Z", "status": "APPROVED"},
        {"expires_at": None, "status": "APPROVED"},
        {"approval_id": "none", "status": "APPROVED"},
    ]
    garbage = [b"", b"{", b"null", b"[]", b'"APPROVED"', b"1e999", b"\xff\xfe\x00", sound[: len(sound) // 2], other]
    deep = [b"[" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b'{"version":' + b"9" * 10_000 + b"}"]
    return [*garbage, *deep, *(json.dumps(entry | change).encode() for change in changed)]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started
        started.resume()


class Faults:
    """The faults by name; each is a block within which it lasts."""

    def __init__(self, server: RedisServer, truth: Truth, rng: random.Random) -> None:
        self.server, self.truth, self.rng = server, truth, rng

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[redis.asyncio.Redis]:
        async with redis.asyncio.from_url(self.server.url) as client:
            yield client

    @asynccontextmanager
    async def down(self) -> AsyncIterator[None]:
        await asyncio.to_thread(self.server.kill)
        try:
            yield
        finally:
            await asyncio.to_thread(self.server.start)

    @asynccontextmanager
    async def hung(self) -> AsyncIterator[None]:
        await asyncio.to_thread(self.server.pause)
        try:
            yield
        finally:
            self.server.resume()

    @asynccontextmanager
    async def restarted_empty(self) -> AsyncIterator[None]:
        await asyncio.to_thread(self.server.kill)
        await asyncio.to_thread(self.server.start)
        yield

    @asynccontextmanager
    async def flushed(self) -> AsyncIterator[None]:
        async with self._client() as client:
            await client.flushall()
            yield

    @asynccontextmanager
    async def poisoned(self) -> AsyncIterator[None]:
        async with self._client() as client:
            keys = await client.keys("approval*")
            sound = [value for key in keys if (value := await client.get(key))]
            for key in keys:
                mine = await client.get(key) or b"{}"
                poison = self.rng.choice(poisons(mine, self.rng.choice(sound)))
                await client.set(key, poison, px=self.rng.choice([40, 400, 3_600_000]))
            for key in self.rng.sample(keys, len(keys) // 8):
                await client.delete(key)
                await client.rpush(key, "APPROVED")
            yield
            await client.flushall()

    @asynccontextmanager
    async def failed_over_to_stale_data(self) -> AsyncIterator[None]:
        async with self._client() as client:
            kept = [(key, await client.dump(key), await client.pttl(key)) for key in await client.keys("approval*")]
            for token in [token for token, history in self.truth.history.items() if history[-1][0] == "PENDING"][:5]:
                await self.truth.decide(token, self.rng)
            await asyncio.sleep(BOUND_S)
            await client.flushall()
            for key, dump, left_ms in kept:
                if dump is not None and left_ms > 0:
                    await client.restore(key, left_ms, dump)
            yield


NAMES = ("down", "hung", "restarted_empty", "flushed", "poisoned", "failed_over_to_stale_data")


@pytest.mark.parametrize(
    ("backend", "checks", "rounds"),
    [
        ("sqlite", 2_000, 1),
        ("postgres", 2_000, 1),
        pytest.param("sqlite", 20_000, 4, marks=pytest.mark.slow),
        pytest.param("postgres", 20_000, 4, marks=pytest.mark.slow),
    ],
)
async def test_no_fault_of_redis_makes_an_answer_wrong(
    backend: str, checks: int, rounds: int, server: RedisServer, request: pytest.FixtureRequest, tmp_path: Any
) -> None:
    """Every answer is what SQL says or said less than APPROVAL_CACHE_SECONDS before, and what is used is what SQL has
    approved; no call raises or takes long, and once the breaker is open a hung server is not felt."""
    make: Callable[[], str] = request.getfixturevalue("migrated_postgres_database")
    url = make() if backend == "postgres" else f"sqlite:///{tmp_path}/gateway.db"
    settings = StoreSettings(approval_cache_seconds=BOUND_S, redis_timeout_seconds=REDIS_TIMEOUT_S)
    async with GatewayStore(url, redis_url=server.url, settings=settings) as store:
        truth = Truth(store)
        tally = Checks(truth, seed=checks)
        for _ in range(checks // 25):
            await truth.add()
        faults = Faults(server, truth, tally.rng)
        order = [tally.rng.sample(NAMES, len(NAMES)) for _ in range(rounds)]
        for name in (name for names in order for name in names):
            async with getattr(faults, name)():
                await tally.run(checks // (2 * rounds * len(NAMES)) + 1)
                await tally.use(5)
            await tally.run(checks // (2 * rounds * len(NAMES)) + 1)
        final = {token: str((await store.approvals.check_token(token, fresh=True)).status) for token in truth.history}
        assert store.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]

    slowest, median = max(tally.seconds), statistics.median(tally.open_seconds)
    print(
        f"{backend}: {tally.answered} checks, {len(tally.wrong)} wrong, slowest {slowest:.3f} s; "
        f"breaker open: {len(tally.open_seconds)} checks, median {median:.4f} s"
    )
    assert tally.wrong == []
    assert tally.answered >= checks
    assert final == {token: history[-1][0] for token, history in truth.history.items()}
    assert slowest < LONGEST_CALL_S
    # Without a breaker each of them would wait for Redis; the slowest may have been held up by a busy machine.
    assert median < 0.5 * REDIS_TIMEOUT_S


async def test_what_a_hung_redis_did_late_is_not_believed(server: RedisServer, tmp_path: Any) -> None:
    """Redis that hung carries out what it was sent before a decision; nobody is told of the old status by that."""
    settings = StoreSettings(approval_cache_seconds=BOUND_S)
    async with GatewayStore(f"sqlite:///{tmp_path}/gateway.db", redis_url=server.url, settings=settings) as store:
        tokens = [await store.approvals.issue_token(make_request()) for _ in range(3)]
        async with redis.asyncio.from_url(server.url) as client:
            await client.flushall()
        server.pause()
        await store.approvals.check_token(tokens[0], fresh=True)
        for token in tokens:
            await store.approvals.deny(token, "approver-1")
        await asyncio.sleep(BOUND_S)
        server.resume()
        await asyncio.sleep(1.0)
        assert parts_of(store).redis.is_available
        # By now the late write is there, as new as can be for Redis.
        assert [str((await store.approvals.check_token(token)).status) for token in tokens] == ["DENIED"] * 3
