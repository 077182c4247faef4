"""A task that is cancelled ends, at whatever step of whatever call the cancellation comes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from agent_gateway_store import GatewayStore
from builders import make_event, make_request

pytestmark = [pytest.mark.usefixtures("no_plugins"), pytest.mark.system]

# More turns of the event loop than any of these calls takes before its last answer.
MOST_TURNS = 400


async def lost(work: Callable[[], Awaitable[Any]], turns: int) -> bool | None:
    """Cancel `work` after so many turns of the loop: True if it went on all the same, None if it had ended before."""
    task = asyncio.ensure_future(work())
    for _ in range(turns):
        await asyncio.sleep(0)
    if not task.cancel():
        return None
    await asyncio.wait([task])
    return not task.cancelled()


def doings(store: GatewayStore, token: str, waiting: str) -> Iterator[tuple[str, Callable[[], Awaitable[Any]]]]:
    approvals = store.approvals

    async def decide() -> None:
        await approvals.approve(await approvals.issue_token(make_request()), "anna")

    yield "check_token", lambda: approvals.check_token(token)
    yield "check_token fresh", lambda: approvals.check_token(token, fresh=True)
    yield "issue_token", lambda: approvals.issue_token(make_request())
    yield "approve", decide
    yield "list_requests", lambda: approvals.list_requests("PENDING", limit=5)
    yield "wait_for_decision", lambda: approvals.wait_for_decision(waiting, timeout_s=0.05)
    yield "write", lambda: store.audit.write(make_event(request_id=uuid4().hex))
    yield "list_recent", lambda: store.audit.list_recent(limit=5)
    yield "rotate", lambda: store.keys.rotate("dev-agent", timedelta())


@pytest.mark.parametrize("backend", ["postgres", "sqlite"])
async def test_every_cancelled_call_ends(
    backend: str, fresh_redis_url: str, tmp_path: Any, request: pytest.FixtureRequest
) -> None:
    """Cancelled after one turn of the event loop, after two, after three ...: the task is cancelled each time.

    redis-py sends through `asyncio.wait_for`, which returns normally before Python 3.12 if the cancellation comes in
    the turn in which the command was sent; a loop around such a call would then run for ever.
    """
    make: Callable[[], str] = request.getfixturevalue("migrated_postgres_database")
    url = make() if backend == "postgres" else f"sqlite:///{tmp_path}/gateway.db"
    async with GatewayStore(url, redis_url=fresh_redis_url, auto_migrate=True) as store:
        await store.keys.issue("dev-agent", role="developer")
        token, waiting = [await store.approvals.issue_token(make_request()) for _ in range(2)]
        await store.approvals.approve(token, "anna")
        went_on = {}
        for name, work in doings(store, token, waiting):
            for turns in range(MOST_TURNS):
                outcome = await lost(work, turns)
                if outcome:
                    went_on[name, turns] = outcome
                elif outcome is None:
                    break

    assert went_on == {}
