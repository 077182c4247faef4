"""A caller that is cancelled before it has its token leaves no approval that waits for nobody."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from contract_helpers import BOTH, column, until
from delivery_helpers import Post, rows
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store import ApprovalManager, ApprovalRequest, GatewayStore, StoreSettings, errors
from agent_gateway_store.approval.issuing import Asking
from agent_gateway_store.store import parts_of
from builders import make_request

pytestmark = pytest.mark.usefixtures("no_plugins")

# More than one asking is ever suspended, connecting included.
MOST_STEPS = 500


class Watched(Coroutine[Any, Any, Any]):
    """A coroutine that says so each time it is suspended."""

    def __init__(self, inner: Coroutine[Any, Any, Any], suspended: Callable[[], None]) -> None:
        self._inner, self._suspended = inner, suspended

    def send(self, value: Any) -> Any:
        found = self._inner.send(value)
        self._suspended()
        return found

    def throw(self, *error: Any) -> Any:
        found = self._inner.throw(*error)
        self._suspended()
        return found

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner.__await__()


async def cancelled_at(step: int, work: Callable[[], Coroutine[Any, Any, str]]) -> str | None:
    """Run `work` in a task and cancel that when it, or a task that was begun since, is suspended for the n-th time.

    Return its result; None if it was cancelled.
    """
    loop, counter = asyncio.get_running_loop(), itertools.count(1)

    def suspended() -> None:
        if next(counter) == step:
            # Once the task knows what it waits for.
            loop.call_soon(task.cancel)

    loop.set_task_factory(lambda loop, work, **options: asyncio.Task(Watched(work, suspended), loop=loop, **options))
    try:
        task = loop.create_task(work())
        await asyncio.wait([task])
    finally:
        loop.set_task_factory(None)
    return None if task.cancelled() else task.result()


@asynccontextmanager
async def opened(database_url: str, redis_url: str, *plugins: Post) -> AsyncIterator[GatewayStore]:
    settings = StoreSettings(redis_timeout_seconds=5)
    async with GatewayStore(database_url, redis_url=redis_url, settings=settings, plugins=plugins) as store:
        yield store


async def withdrawn(store: GatewayStore) -> None:
    """Wait for what runs in the background."""
    background = parts_of(store).approvals.background
    assert background is not None
    await until(lambda: not len(background), 10)


@BOTH
async def test_cancelled_anywhere_nothing_waits_and_nobody_is_notified(database_url: str, redis_setting: str) -> None:
    """At every point at which the asking can be suspended, until it is through before it is cancelled."""
    post = Post()
    async with opened(database_url, redis_setting, post) as store:
        for step in range(1, MOST_STEPS):
            request = make_request(request_id=f"r-{step}")
            token = await cancelled_at(step, lambda request=request: store.approvals.issue_token(request))
            await withdrawn(store)
            if token is not None:
                break
        kept = await store.approvals.check_token(token or "")
        await until(lambda: len(post.taken) == 1)
        states = await column(store, "status", "approval_requests")
        told = await rows(store, "approval_id")

    assert step > 2
    assert states == ["CANCELLED"] * (len(states) - 1) + ["PENDING"]
    assert [notice.approval_id for notice in post.taken] == [kept.approval_id]
    assert len(told) == 1


@pytest.mark.parametrize("terms", [{}, {"risk_explanation": "another"}], ids=["same terms", "other terms"])
async def test_cancelled_while_asking_again_leaves_no_approval_without_a_token(
    database_url: str, terms: dict[str, Any]
) -> None:
    """What was pending and whose token was replaced is over, and who was notified of it is notified of that."""
    post = Post()
    async with opened(database_url, "", post) as store:
        for step in range(1, MOST_STEPS):
            first = await store.approvals.issue_token(make_request(request_id=f"r-{step}"))
            again = make_request(request_id=f"r-{step}", **terms)
            token = await cancelled_at(step, lambda again=again: store.approvals.issue_token(again))
            await withdrawn(store)
            waiting = await store.approvals.list_requests("PENDING")
            if token is not None:
                break
            assert waiting == [] or (await store.approvals.check_token(first)).status == "PENDING"
            await store.approvals.expire_stale()
        asked = step
        await until(lambda: post.events.count(("pending", "PENDING")) == asked + bool(terms))
        await until(lambda: post.events.count(("decision", "CANCELLED")) == asked - 1 + bool(terms))

    assert step > 2
    assert [approval.request_id for approval in waiting] == [f"r-{step}"]


async def test_closing_waits_for_what_is_withdrawn(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A store that is closed at once leaves nothing that waits; the log says what was withdrawn."""
    with caplog.at_level(logging.INFO, "agent_gateway_store.approvals"):
        async with opened(database_url, "") as store:
            assert await cancelled_at(3, lambda: store.approvals.issue_token(make_request())) is None
    async with opened(database_url, "") as store:
        states = await column(store, "status", "approval_requests")

    assert states == ["CANCELLED"]
    assert [record.getMessage().split(" ", 2)[2] for record in caplog.records] == [
        "was withdrawn: the task that asked was cancelled."
    ]


async def test_who_asks_for_the_same_call_meanwhile_keeps_it(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the asking and its withdrawal another task got the token: its approval stands and is notified."""
    post, inner = Post(), Asking.withdraw
    async with opened(database_url, "", post) as store:
        tokens: list[str] = []

        async def late(self: Asking, asking: asyncio.Task[Any], values: dict[str, Any]) -> None:
            await asyncio.wait([asking])
            tokens.append(await store.approvals.issue_token(ApprovalRequest(**request.model_dump(include=SAME))))
            await inner(self, asking, values)

        monkeypatch.setattr(Asking, "withdraw", late)
        request = make_request()
        assert await cancelled_at(3, lambda: store.approvals.issue_token(request)) is None
        await withdrawn(store)
        stands = await store.approvals.check_token(tokens[0], fresh=True)
        await until(lambda: len(post.taken) == 1)

    assert stands.status == "PENDING"
    assert [notice.approval_id for notice in post.taken] == [stands.approval_id]


SAME = {"request_id", "caller_id", "tool_call", "risk_explanation"}


@pytest.fixture
def withdrawals(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Until it is set, nothing is withdrawn."""
    may_go, inner = asyncio.Event(), Asking.withdraw

    async def late(self: Asking, asking: asyncio.Task[Any], values: dict[str, Any]) -> None:
        await asyncio.wait([asking])
        await may_go.wait()
        await inner(self, asking, values)

    monkeypatch.setattr(Asking, "withdraw", late)
    return may_go


async def written(store: GatewayStore, request: ApprovalRequest) -> None:
    async def is_there() -> bool:
        return request.approval_id in [each.approval_id for each in await store.approvals.list_requests()]

    await until(is_there)


@BOTH
async def test_a_retry_that_has_the_token_keeps_it(database_url: str, redis_setting: str) -> None:
    """Cancelled at every point and asked again with the same request: what is acknowledged can be decided."""
    kept, refused = [], 0
    async with opened(database_url, redis_setting) as store:
        for step in range(1, MOST_STEPS):
            request = make_request(request_id=f"r-{step}")
            if await cancelled_at(step, lambda request=request: store.approvals.issue_token(request)) is not None:
                break
            try:
                token = await store.approvals.issue_token(request)
            except errors.ApprovalError:
                refused += 1
                continue
            await store.approvals.approve(token, "anna")
            await withdrawn(store)
            kept.append((await store.approvals.check_token(token, fresh=True)).status)
        waiting = await store.approvals.list_requests("PENDING")

    assert len(kept) + refused == step - 1
    assert kept == ["APPROVED"] * len(kept)
    assert [each.request_id for each in waiting] == [f"r-{step}"]


@pytest.mark.parametrize("process", ["same process", "another process"])
async def test_a_withdrawal_leaves_what_a_retry_has_acknowledged(
    database_url: str, withdrawals: asyncio.Event, process: str
) -> None:
    """It comes after the retry with the same request: the approval stands, and is notified once."""
    post = Post()
    async with opened(database_url, "", post) as store, opened(database_url, "", post) as other:
        request = make_request()
        assert await cancelled_at(1, lambda: store.approvals.issue_token(request)) is None
        await written(store, request)
        token = await (other if process == "another process" else store).approvals.issue_token(request)
        withdrawals.set()
        await withdrawn(store)
        stands = await store.approvals.check_token(token, fresh=True)
        await until(lambda: bool(post.events))

    assert stands.status == "PENDING"
    assert post.events == [("pending", "PENDING")]


def held_back(
    store: GatewayStore, monkeypatch: pytest.MonkeyPatch, *accesses: str
) -> tuple[asyncio.Event, asyncio.Event]:
    """Hold connections of a kind back; return what is set when one is asked for, and what lets it go."""
    is_asked, may_go, inner = asyncio.Event(), asyncio.Event(), store.database.connection

    @asynccontextmanager
    async def late(access: Any) -> AsyncIterator[Any]:
        if access in accesses:
            is_asked.set()
            await may_go.wait()
        async with inner(access) as connection:
            yield connection

    monkeypatch.setattr(store.database, "connection", late)
    return is_asked, may_go


async def test_a_retry_that_comes_while_the_withdrawal_waits_for_a_connection_keeps_its_token(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(database_url, "") as store:
        is_withdrawing, has_token = held_back(store, monkeypatch, "transaction")
        request = make_request()
        assert await cancelled_at(1, lambda: store.approvals.issue_token(request)) is None
        await is_withdrawing.wait()
        token = await store.approvals.issue_token(request)
        has_token.set()
        await withdrawn(store)
        stands = await store.approvals.check_token(token, fresh=True)

    assert stands.status == "PENDING"


async def test_a_withdrawal_overwrites_no_decision(database_url: str, withdrawals: asyncio.Event) -> None:
    """A human was faster, though nobody has the token."""
    async with opened(database_url, "") as store:
        request = make_request()
        assert await cancelled_at(1, lambda: store.approvals.issue_token(request)) is None
        await written(store, request)
        await store.approvals.approve(approval_id=request.approval_id, approver_id="anna")
        withdrawals.set()
        await withdrawn(store)
        stands = await store.approvals.get(approval_id=request.approval_id)

    assert (stands.status, stands.approver_id) == ("APPROVED", "anna")


async def test_a_retry_that_is_cancelled_too_leaves_nothing_that_waits(
    database_url: str, withdrawals: asyncio.Event
) -> None:
    """The retry found what the first call had written, and is cancelled at any point."""
    async with opened(database_url, "") as store:
        for step in range(1, MOST_STEPS):
            request = make_request(request_id=f"r-{step}")
            withdrawals.clear()
            assert await cancelled_at(1, lambda request=request: store.approvals.issue_token(request)) is None
            await written(store, request)
            token = await cancelled_at(step, lambda request=request: store.approvals.issue_token(request))
            withdrawals.set()
            await withdrawn(store)
            if token is not None:
                break
        states = await column(store, "status", "approval_requests")

    assert step > 2
    assert states == ["CANCELLED"] * (step - 1) + ["PENDING"]


@pytest.mark.parametrize("reissued", [False, True], ids=["asked", "asked again by another object"])
async def test_a_token_that_was_returned_outlives_a_repetition_that_is_cancelled(
    database_url: str, reissued: bool
) -> None:
    async with opened(database_url, "") as store:
        if reissued:
            await store.approvals.issue_token(make_request(request_id="r-1"))
        request = make_request(request_id="r-1")
        token = await store.approvals.issue_token(request)
        for step in range(1, MOST_STEPS):
            again = await cancelled_at(step, lambda: store.approvals.issue_token(request))
            await withdrawn(store)
            assert (await store.approvals.check_token(token, fresh=True)).status == "PENDING"
            if again is not None:
                break

    assert step > 2


async def test_a_cancelled_call_that_comes_last_leaves_what_another_process_has_acknowledged(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes only after the retry elsewhere has its token."""
    async with opened(database_url, "") as store, opened(database_url, "") as other:
        under_way, has_token = held_back(store, monkeypatch, "read", "autocommit", "transaction")
        request = make_request()
        first = asyncio.create_task(store.approvals.issue_token(request))
        await under_way.wait()
        first.cancel()
        token = await other.approvals.issue_token(request)
        has_token.set()
        await withdrawn(store)
        stands = await other.approvals.check_token(token, fresh=True)

    assert first.cancelled()
    assert stands.status == "PENDING"


async def test_a_session_of_the_hosts_is_used_by_no_other_task(session: AsyncSession) -> None:
    """Cancelled anywhere, its owner goes on with it at once."""
    approvals = ApprovalManager(session, settings=StoreSettings())
    for step in range(1, MOST_STEPS):
        request = make_request()
        token = await cancelled_at(step, lambda request=request: approvals.issue_token(request))
        assert (await session.execute(text("SELECT 1"))).scalar() == 1
        await session.rollback()
        # A connection that was being made is finished by a task of its own, and then ended.
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.001)
        if token is not None:
            break

    assert step > 2
    assert (await approvals.check_token(token or "")).status == "PENDING"
