"""Approvals beside bare Redis and the bare SQL statements of each step."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import redis.asyncio
from sqlalchemy.dialects.postgresql.asyncpg import dialect

from agent_gateway_store import ApprovalRequest, GatewayStore, StoreSettings, ToolCall
from agent_gateway_store.approval import statements
from agent_gateway_store.approval.decisions import Permission
from agent_gateway_store.approval.issuing import issue_values
from agent_gateway_store.models.approval import ApprovalScope, VoteDecision, hash_tool_call
from benchmarks.report import Figure

LOAD_PLUGINS = "AGENT_GATEWAY_STORE_LOAD_PLUGINS"
STEPS = ("issue_token", "approve", "consume_token")
CALLERS = 20
TURNS = 20
CALL = ToolCall(server="files", tool="delete_file", arguments={"path": "/srv/data/report.csv", "force": True})


def ask() -> ApprovalRequest:
    """Return a request as a gateway asks it."""
    return ApprovalRequest(
        request_id=uuid4().hex, caller_id="agent-1", tool_call=CALL, risk_explanation="deletes a file for good"
    )


async def rate(work: Callable[[Any], Awaitable[Any]], items: Sequence[Any], callers: int) -> float:
    """Return how many items a second `callers` tasks get through."""
    waiting = iter(items)

    async def caller() -> None:
        for item in waiting:
            await work(item)

    start = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return len(items) / (time.perf_counter() - start)


Work = tuple[Callable[[Any], Awaitable[Any]], Sequence[Any]]
"""What is done, and to what."""


async def in_turns(
    figure: Figure,
    ours: Work,
    limit: Work,
    callers: int,
    *,
    turns: int = TURNS,
    finish: Callable[[], Awaitable[object]] | None = None,
) -> None:
    """Measure both in small turns, since what else the machine does comes and goes.

    Args:
        figure: Gets a sample of each.
        ours: What is measured.
        limit: What it is compared with.
        callers: So many at once.
        turns: Into how many parts the items are divided.
        finish: Ends what `ours` left to do in the background; its time counts as theirs.
    """
    seconds = [0.0, 0.0]
    size = -(-len(ours[1]) // turns)
    for turn in range(turns):
        for side, (work, items) in enumerate((ours, limit)):
            part = items[turn * size : (turn + 1) * size]
            if part:
                seconds[side] += len(part) / await rate(work, part, callers)
            if finish is not None and side == 0:
                start = time.perf_counter()
                await finish()
                seconds[side] += time.perf_counter() - start
    figure.ours.append(len(ours[1]) / seconds[0])
    figure.limit.append(len(limit[1]) / seconds[1])


async def measure(url: str, redis_url: str, *, repeat: int, scale: float) -> list[Figure]:
    """Measure on PostgreSQL and Redis, in turn with the limits.

    Without notifiers, so that no step writes to the outbox; and then with the installed ones beside that.
    """
    hits = [
        Figure(f"check_token, Redis hit, {callers} callers", "checks/s", "redis GET + json.loads", 0.7)
        for callers in (1, CALLERS)
    ]
    steps = [
        Figure(f"{step}, {CALLERS} callers", "approvals/s", "its bare SQL statements by asyncpg", 0.4) for step in STEPS
    ]
    notified = [
        Figure(f"{step}, plugins as installed", "approvals/s", "the same without plugins", 0.6) for step in STEPS
    ]
    wake = Figure("decision to wake-up, 1,000 waiters, median", "ms", "one read of SQL by id", 4, more_is_better=False)
    async with AsyncExitStack() as stores:

        async def opened(plugins: str | None) -> GatewayStore:
            with pytest.MonkeyPatch.context() as environment:
                environment.delenv(LOAD_PLUGINS, raising=False)
                if plugins is not None:
                    environment.setenv(LOAD_PLUGINS, plugins)
                settings = StoreSettings(approval_cache_seconds=600)
                store = GatewayStore(url, redis_url=redis_url, settings=settings, auto_migrate=True)
                return await stores.enter_async_context(store)

        store, other, notifying = await opened(""), await opened(""), await opened(None)
        for _ in range(repeat):
            await _hits(store, redis_url, hits, int(4_000 * scale))
            await _steps(store, url, steps, int(1_000 * scale))
            await _notified_steps(notifying, store, notified, int(1_000 * scale))
            await _wake(store, other, redis_url, wake, 1_000)
    return [*hits, *steps, *notified, wake]


async def _hits(store: GatewayStore, redis_url: str, figures: list[Figure], count: int) -> None:
    token = await store.approvals.issue_token(ask())
    client = redis.asyncio.from_url(redis_url)

    async def bare(name: str) -> None:
        json.loads(await client.get(f"approval:{name}"))

    for figure, callers in zip(figures, (1, CALLERS), strict=True):
        items = [token] * count
        await in_turns(figure, (store.approvals.check_token, items), (bare, items), callers)
        figure.facts = {"checks": count, "callers": callers}
    await client.aclose()


def _works(store: GatewayStore, count: int) -> list[Work]:
    """Return the steps of `count` approvals, to be done in order."""
    tokens: list[str] = []

    async def issue(request: ApprovalRequest) -> None:
        tokens.append(await store.approvals.issue_token(request))

    async def approve(token: str) -> None:
        await store.approvals.approve(token, "alice", "ok")

    async def use(token: str) -> None:
        await store.approvals.consume_token(token, caller_id="agent-1", tool_call=CALL)

    return [(issue, [ask() for _ in range(count)]), (approve, tokens), (use, tokens)]


async def _warm(store: GatewayStore) -> None:
    for work, items in _works(store, 1):
        await work(items[0])


async def _steps(store: GatewayStore, url: str, figures: list[Figure], count: int) -> None:
    await _warm(store)
    async with _bare_steps(url, count) as bare:
        for figure, step, limit in zip(figures, _works(store, count), bare, strict=True):
            await in_turns(figure, step, limit, CALLERS)
            figure.facts = {"approvals": count, "callers": CALLERS}


async def _notified_steps(notifying: GatewayStore, plain: GatewayStore, figures: list[Figure], count: int) -> None:
    """Notices are sent and written down within the turn that makes them."""
    await _warm(notifying)

    async def finish() -> None:
        await notifying.notifications.run(once=True)

    for figure, step, limit in zip(figures, _works(notifying, count), _works(plain, count), strict=True):
        await in_turns(figure, step, limit, CALLERS, turns=5, finish=finish)
        figure.facts = {"approvals": count, "callers": CALLERS}


@asynccontextmanager
async def _bare_steps(url: str, count: int) -> AsyncIterator[list[Work]]:
    insert, approve, vote, consume = (
        statements.INSERT.compiled(dialect()),
        statements.APPROVE["token"].compiled(dialect()),
        statements.VOTE.compiled(dialect()),
        statements.CONSUME.compiled(dialect()),
    )

    def ready(compiled: Any, values: dict[str, Any]) -> list[Any]:
        return compiled.arguments(values)  # type: ignore[no-any-return]

    asked = [issue_values(ask(), call=None, org_id=None, ttl=timedelta(hours=1), hash_key=None) for _ in range(count)]
    async with asyncpg.create_pool(url, min_size=CALLERS, max_size=CALLERS, init=_text_json) as pool:

        async def issue(parameters: list[Any]) -> None:
            async with pool.acquire() as connection:
                await connection.fetchrow(insert.text, *parameters)

        async def decide(parameters: tuple[list[Any], list[Any]]) -> None:
            async with pool.acquire() as connection, connection.transaction():
                await connection.fetchrow(approve.text, *parameters[0])
                await connection.fetchrow(vote.text, *parameters[1])

        async def use(parameters: list[Any]) -> None:
            async with pool.acquire() as connection:
                await connection.fetchrow(consume.text, *parameters)

        ballot = {
            "p_approver_id": "alice",
            "p_note": "ok",
            "p_channel": "api",
            "p_decision": VoteDecision.APPROVED,
            "p_allow_self": False,
        }
        use_values = Permission("agent-1", ApprovalScope.EXECUTION, hash_tool_call(CALL)).values
        names = [{"p_token": row["p_token"], "p_org_id": None} for row in asked]
        votes = [{"p_approval_id": row["p_approval_id"], "p_org_id": "default"} for row in asked]
        decisions = [
            (ready(approve, name | ballot), ready(vote, voter | ballot))
            for name, voter in zip(names, votes, strict=True)
        ]
        yield [
            (issue, [ready(insert, row) for row in asked]),
            (decide, decisions),
            (use, [ready(consume, name | use_values) for name in names]),
        ]


async def _text_json(connection: asyncpg.Connection) -> None:
    await connection.set_type_codec("jsonb", encoder=str, decoder=str, schema="pg_catalog")


async def _wake(waiting: GatewayStore, deciding: GatewayStore, redis_url: str, figure: Figure, count: int) -> None:
    """From the end of the commit in one store to the end of the wait in another.

    One task waits for each of `count` approvals; a hundred of them are decided, one after the other. Both stores and
    the limit share one process and one event loop. The limit is one read of the approval by its id after each wake-up,
    in the same moment.
    """
    tokens = [await waiting.approvals.issue_token(ask()) for _ in range(count)]
    woken: dict[str, float] = {}
    committed: list[float] = []
    single: list[float] = []
    decided = deciding.approvals._after_commit

    async def noting(*args: Any) -> Any:
        committed.append(time.perf_counter())
        return await decided(*args)

    async def wait(token: str) -> None:
        await waiting.approvals.wait_for_decision(token, timeout_s=60)
        woken[token] = time.perf_counter()

    async with redis.asyncio.from_url(redis_url) as client:
        tasks = [asyncio.create_task(wait(token)) for token in tokens]
        await asyncio.sleep(1.5)
        subscribed = await client.client_list(_type="pubsub")
        figure.facts = {"waiters": count, "connections subscribed": len(subscribed)}
        deciding.approvals._after_commit = noting  # type: ignore[method-assign]
        for token in tokens[:100]:
            result = await deciding.approvals.approve(token, "alice")
            async with asyncio.timeout(10):
                while token not in woken:
                    await asyncio.sleep(0.0005)
            start = time.perf_counter()
            await waiting.approvals.get(approval_id=result.approval_id)
            single.append(time.perf_counter() - start)
        deciding.approvals._after_commit = decided  # type: ignore[method-assign]
    delays = [woken[token] - at for token, at in zip(tokens, committed, strict=False) if token in woken]
    figure.facts |= {"woken": len(delays)}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    figure.ours.append(statistics.median(delays) * 1000)
    figure.limit.append(statistics.median(single) * 1000)
