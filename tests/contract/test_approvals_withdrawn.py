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

from agent_gateway_store import ApprovalManager, ApprovalRequest, GatewayStore, StoreSettings
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
