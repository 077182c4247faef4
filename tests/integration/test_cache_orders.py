"""Every order in which a reader, a decider and a lost entry meet in Redis: nothing too old is served or released."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any
from uuid import uuid4

import pytest
import redis.asyncio

from agent_gateway_store import ApprovalManager, GatewayStore, StoreSettings, errors
from agent_gateway_store.approval import ApprovalBackend
from agent_gateway_store.storage.redis_cache import CacheEntry, RedisCache
from builders import CALL, make_request

pytestmark = [pytest.mark.usefixtures("no_plugins"), pytest.mark.system]

BOUND_S = 0.5
"""APPROVAL_CACHE_SECONDS of these tests."""
STALL_S = BOUND_S * 1.2
LOST = "delete cache"
MOVES = {"deny": "DENIED", "approve": "APPROVED", "cancel": "CANCELLED", "ask again": "gone"}


class Held(RedisCache):
    """Redis as one actor has it: what it does after its transaction waits for `go_on`."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        super().__init__(client)
        self.arrived, self.may_go = asyncio.Event(), asyncio.Event()

    async def _wait(self) -> None:
        self.arrived.set()
        await self.may_go.wait()

    async def get(self, key: str) -> tuple[bytes | str, int] | None:
        await self._wait()
        return await super().get(key)

    async def put_newer(self, entries: Sequence[CacheEntry], *, message: tuple[str, str] | None = None) -> bool:
        await self._wait()
        return await super().put_newer(entries, message=message)

    async def delete(self, key: str) -> None:
        await self._wait()
        await super().delete(key)


class Actor:
    """Somebody who works on SQL in one step and on Redis in the next."""

    def __init__(
        self, store: GatewayStore, client: redis.asyncio.Redis, work: Callable[[ApprovalManager], Awaitable[Any]]
    ) -> None:
        self._redis = Held(client)
        self._work = work
        self._approvals = ApprovalManager(ApprovalBackend(store.database, self._redis, store.settings))
        self._task: asyncio.Future[Any] | None = None

    async def step(self) -> None:
        """Do the transaction the first time, the work on Redis the second time."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._work(self._approvals))
            arriving = asyncio.ensure_future(self._redis.arrived.wait())
            await asyncio.wait([self._task, arriving], return_when=asyncio.FIRST_COMPLETED)
            arriving.cancel()
        else:
            self._redis.may_go.set()
            await asyncio.gather(self._task, return_exceptions=True)


def orders(*actors: str, lost: bool = True) -> Iterator[tuple[str, ...]]:
    """Every order of two steps of each actor, and of the loss of the entry; each name stands for the next step."""
    steps = [name for name in actors for _ in range(2)] + [LOST] * lost
    yield from sorted(set(itertools.permutations(steps)))


Plan = tuple[tuple[str, ...], int | None, bool]
"""An order; the step after which everybody stands still for `STALL_S`; whether somebody looks after every step."""


async def seen(approvals: ApprovalManager, token: str) -> str:
    try:
        return str((await approvals.check_token(token)).status)
    except errors.ApprovalNotFoundError:
        return "gone"


class Round:
    """One approval, and the actors that meet at it in one order."""

    def __init__(self, store: GatewayStore, client: redis.asyncio.Redis, move: str) -> None:
        self.store, self.client, self.move = store, client, move
        self.sql = ApprovalManager(ApprovalBackend(store.database, RedisCache(None), store.settings))
        self.request = make_request()
        self.token = ""
        self.later = ""
        self.current = "PENDING"
        self.past: list[tuple[str, float]] = []

    async def begin(self) -> None:
        self.token = await self.store.approvals.issue_token(self.request)

    async def _decide(self, approvals: ApprovalManager) -> None:
        if self.move == "ask again":
            again = self.request.model_copy(update={"approval_id": uuid4(), "token": f"later-{uuid4().hex}"})
            self.later = await approvals.issue_token(again)
        else:
            await getattr(approvals, self.move)(self.token, "approver-1")

    async def run(self, plan: Plan) -> list[str]:
        order, stall_after, is_watched = plan
        actors = {
            "reader": Actor(self.store, self.client, lambda it: it.check_token(self.token, fresh=True)),
            "second reader": Actor(self.store, self.client, lambda it: it.check_token(self.token, fresh=True)),
            "decider": Actor(self.store, self.client, self._decide),
        }
        wrong = []
        for number, name in enumerate(order):
            if name == LOST:
                await self.client.delete(f"approval:{self.token}")
            else:
                await actors[name].step()
            if name == "decider" and (now := await seen(self.sql, self.token)) != self.current:
                self.past.append((self.current, time.monotonic()))
                self.current = now
            if number == stall_after:
                await asyncio.sleep(STALL_S)
            if is_watched:
                wrong += await self._look(order[: number + 1])
        wrong += await self._look(order)
        return [f"{problem} (stall after {stall_after})" for problem in wrong]

    async def _look(self, done: tuple[str, ...]) -> list[str]:
        begun = time.monotonic()
        answer = await seen(self.store.approvals, self.token)
        allowed = {status for status, end in self.past if begun - end < BOUND_S} | {self.current}
        return [] if answer in allowed else [f"{done}: {answer} and not {allowed}"]

    async def use(self) -> bool:
        """Use the approval; True if the call was released."""
        try:
            await self.store.approvals.consume_token(self.token, caller_id="dev-agent", tool_call=CALL)
        except errors.ApprovalError:
            return False
        return True


@pytest.fixture
async def store(
    backend: str, request: pytest.FixtureRequest, tmp_path: Any, fresh_redis_url: str
) -> AsyncIterator[GatewayStore]:
    """A store on an empty database and an empty Redis."""
    make: Callable[[], str] = request.getfixturevalue("migrated_postgres_database")
    url = make() if backend == "postgres" else f"sqlite:///{tmp_path}/gateway.db"
    settings = StoreSettings(approval_cache_seconds=BOUND_S)
    async with GatewayStore(url, redis_url=fresh_redis_url, settings=settings) as opened:
        yield opened
        assert opened.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def meet(store: GatewayStore, redis_url: str, move: str, plans: list[Plan]) -> None:
    """Run a round for each plan, many beside each other."""
    wrong: list[str] = []
    limit = asyncio.Semaphore(100)
    async with redis.asyncio.from_url(redis_url) as client:

        async def one(plan: Plan) -> Round:
            async with limit:
                round_ = Round(store, client, move)
                await round_.begin()
                wrong.extend(await round_.run(plan))
                return round_

        rounds = await asyncio.gather(*map(one, plans))
        await asyncio.sleep(BOUND_S)
        final = await asyncio.gather(*(seen(store.approvals, round_.token) for round_ in rounds))
        released = await asyncio.gather(*(round_.use() for round_ in rounds))
        twice = await asyncio.gather(*(round_.use() for round_ in rounds))

    assert wrong == []
    assert final == [MOVES[move]] * len(rounds)
    assert [round_.current for round_ in rounds] == final
    assert released == [move == "approve"] * len(rounds)
    assert not any(twice)
    if move == "ask again":
        assert {await seen(store.approvals, round_.later) for round_ in rounds} == {"PENDING"}


def plans(every: list[tuple[str, ...]], *stalls: int) -> list[Plan]:
    """Each order watched, unwatched, and unwatched with a stall after each of these steps."""
    return [(order, None, True) for order in every] + [(order, at, False) for order in every for at in (None, *stalls)]


SHORT = {("sqlite", "approve"), ("postgres", "deny"), ("postgres", "ask again")}
EVERY = [(backend, move) for backend in ("sqlite", "postgres") for move in MOVES]


@pytest.mark.parametrize(
    ("backend", "move"), [pytest.param(*case, marks=[] if case in SHORT else pytest.mark.slow) for case in EVERY]
)
async def test_no_order_serves_what_is_too_old(store: GatewayStore, fresh_redis_url: str, move: str) -> None:
    """A reader's and a decider's steps and the loss of the entry, in all 30 orders, without a stall and with one that
    is longer than APPROVAL_CACHE_SECONDS."""
    every = list(orders("reader", "decider"))
    await meet(store, fresh_redis_url, move, plans(every, 1, 2, 3))

    assert len(every) == 30


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "move"), EVERY)
async def test_no_order_of_two_readers_serves_what_is_too_old(
    store: GatewayStore, fresh_redis_url: str, move: str
) -> None:
    every = list(orders("reader", "second reader", "decider"))
    await meet(store, fresh_redis_url, move, plans(every, 2, 4))

    assert len(every) == 630
