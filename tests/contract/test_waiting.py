"""Waiting for decisions: signals, the polls behind them, and nothing left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from contract_helpers import SOON_S

from agent_gateway_store import ApprovalRequest, GatewayStore, ToolCall, clock, errors
from agent_gateway_store.approval import queries

pytestmark = pytest.mark.integration


def ask(**fields: object) -> ApprovalRequest:
    defaults: dict[str, object] = {
        "request_id": uuid4().hex,
        "caller_id": "dev-agent",
        "tool_call": ToolCall(server="files", tool="delete_file", arguments={"path": "/tmp/x"}),
        "risk_explanation": "deletes a file",
    }
    return ApprovalRequest(**(defaults | fields))


def topics(store: GatewayStore) -> int:
    return len(store._core.pubsub._topics)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_decision_elsewhere_wakes_every_waiter(store: GatewayStore, other: GatewayStore) -> None:
    """Fifty tasks wait for ten approvals that another store decides; each learns its own decision."""
    tokens = [await store.approvals.issue_token(ask()) for _ in range(10)]
    waiting = [asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=20)) for token in tokens * 5]
    await until(lambda: topics(store) == 10)
    for number, token in enumerate(tokens):
        decide = other.approvals.approve if number % 2 else other.approvals.deny
        await decide(token, f"approver-{number}")
    results = await asyncio.gather(*waiting)

    for result, token in zip(results, tokens * 5, strict=True):
        number = tokens.index(token)
        assert (result.status, result.approver_id) == ("APPROVED" if number % 2 else "DENIED", f"approver-{number}")
    assert topics(store) == 0


async def test_a_decision_in_the_same_store_wakes_at_once(store: GatewayStore) -> None:
    """Without any network between them the waiter need not wait for a poll."""
    token = await store.approvals.issue_token(ask())
    waiter = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=20))
    await until(lambda: topics(store) == 1)
    await store.approvals.approve(token, "approver-1")
    async with asyncio.timeout(SOON_S):
        result = await waiter

    assert result.status == "APPROVED"


@pytest.mark.parametrize("timeout_s", [None, "5", float("nan")])
async def test_a_timeout_that_is_no_number_is_refused(store: GatewayStore, timeout_s: Any) -> None:
    """With a sentence that names it, and before anything is waited for."""
    token = await store.approvals.issue_token(ask())

    with pytest.raises((TypeError, ValueError), match="timeout_s must be a number, not"):
        await store.approvals.wait_for_decision(token, timeout_s=timeout_s)


async def test_the_timeout_decides_nothing_and_leaves_nothing(store: GatewayStore) -> None:
    """At the timeout the waiter gets PENDING; the approval can still be decided."""
    token = await store.approvals.issue_token(ask())
    began = time.monotonic()
    result = await store.approvals.wait_for_decision(token, timeout_s=0.2)

    assert result.status == "PENDING"
    assert time.monotonic() - began < 10
    assert topics(store) == 0
    assert (await store.approvals.approve(token, "approver-1")).status == "APPROVED"


async def test_cancelled_waiters_leave_nothing_and_disturb_nobody(store: GatewayStore) -> None:
    """Half of the waiters of one approval are cancelled; the others still learn the decision."""
    token = await store.approvals.issue_token(ask())
    waiting = [asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=20)) for _ in range(40)]
    await until(lambda: topics(store) == 1)
    for task in waiting[::2]:
        task.cancel()
    await store.approvals.approve(token, "approver-1")
    results = await asyncio.gather(*waiting, return_exceptions=True)

    assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
    assert {result.status for result in results[1::2]} == {"APPROVED"}  # type: ignore[union-attr]
    assert topics(store) == 0


async def test_waiters_of_one_approval_share_their_reads(
    store: GatewayStore, other: GatewayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decision costs one read at most, not one for each of a hundred waiters."""
    token = await store.approvals.issue_token(ask())
    waiting = [asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=20)) for _ in range(100)]
    await until(lambda: topics(store) == 1)
    await asyncio.sleep(0.3)
    reads = 0
    get = queries.get

    async def counting(*args: Any) -> object:
        nonlocal reads
        reads += 1
        return await get(*args)

    monkeypatch.setattr(queries, "get", counting)
    await other.approvals.approve(token, "approver-1")
    await asyncio.gather(*waiting)

    # A poll may fall into the same moment.
    assert reads <= 3


async def test_a_deadline_that_passes_ends_the_wait(store: GatewayStore) -> None:
    """EXPIRED is a state that nobody signals; the waiter looks when the deadline is due."""
    token = await store.approvals.issue_token(ask(expires_at=clock.utc_now() + timedelta(seconds=0.7)))
    result = await store.approvals.wait_for_decision(token, timeout_s=20)

    assert result.status == "EXPIRED"


async def test_an_unknown_token_is_told_at_once(store: GatewayStore) -> None:
    """Nobody waits for what does not exist."""
    with pytest.raises(errors.ApprovalNotFoundError):
        await store.approvals.wait_for_decision("no-such-token", timeout_s=20)

    assert topics(store) == 0


async def test_a_closing_store_lets_its_waiters_go(database_url: str, redis_setting: str) -> None:
    """`close` does not leave tasks behind that wait for ever."""
    store = await GatewayStore(database_url, redis_url=redis_setting).open()
    token = await store.approvals.issue_token(ask())
    waiter = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=20))
    await until(lambda: topics(store) == 1)
    await store.close()
    async with asyncio.timeout(5):
        with pytest.raises(errors.StoreNotOpenError):
            await waiter
