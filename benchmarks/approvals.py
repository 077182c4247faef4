"""Approvals beside bare Redis and the bare SQL statements of each step."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
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
from agent_gateway_store.storage.statements import Statement
from benchmarks.report import Figure

LOAD_PLUGINS = "AGENT_GATEWAY_STORE_LOAD_PLUGINS"
STEPS = ("issue_token", "approve", "consume_token")
CALLERS = 20
TURNS = 20
# Ten rounds of all callers in each turn: a single one begins with all in Python, and ends with all in the server.
_STEPS = TURNS * 10 * CALLERS
# The decision and the vote.
_APPROVE = statements.sql_statement(f"""
    WITH decided AS ({statements.APPROVE_SQL.replace("{ref}", statements.REFS["token"])}), voted AS (
        {statements.VOTES_SQL}
        SELECT approval_id, org_id, :p_approver_id, :p_decision, :p_note, :p_channel, {{now}} FROM decided
    )
    SELECT * FROM decided
    """)
CALL = ToolCall(server="files", tool="delete_file", arguments={"path": "/srv/data/report.csv", "force": True})


def ask(caller_id: str = "agent-1") -> ApprovalRequest:
    """Return a request as a gateway asks it."""
    return ApprovalRequest(
        request_id=uuid4().hex, caller_id=caller_id, tool_call=CALL, risk_explanation="deletes a file for good"
    )


def ask_many(count: int) -> list[ApprovalRequest]:
    """Return requests of so many callers that few approvals of each wait at once, which are counted for each."""
    return [ask(f"agent-{number % max(100, count // 10)}") for number in range(count)]


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
    seconds, cpu = [0.0, 0.0], [0.0, 0.0]
    size = -(-len(ours[1]) // turns)
    for turn in range(turns):
        for side, (work, items) in enumerate((ours, limit)):
            part = items[turn * size : (turn + 1) * size]
            before = time.process_time()
            if part:
                seconds[side] += len(part) / await rate(work, part, callers)
            if finish is not None and side == 0:
                start = time.perf_counter()
                await finish()
                seconds[side] += time.perf_counter() - start
            cpu[side] += time.process_time() - before
    each = [used / len(items) * 1e6 for used, (_, items) in zip(cpu, (ours, limit), strict=True)]
    figure.facts = {"callers": callers, "items": len(ours[1]), "µs of CPU in this process": each}
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
        Figure(f"{step}, {CALLERS} callers", "approvals/s", "one bare statement, connections of its own", goal)
        for step, goal in zip(STEPS, (0.45, 0.6, 0.55), strict=True)
    ]
    notified = [
        Figure(f"{step}, plugins as installed", "approvals/s", "the same without plugins", 0.7) for step in STEPS
    ]
    wake = Figure("decision to wake-up, 1,000 waiters, median", "ms", "one read of SQL by id", 4, more_is_better=False)
    async with AsyncExitStack() as stores:

        async def opened(plugins: str | None) -> GatewayStore:
            with pytest.MonkeyPatch.context() as environment:
                environment.delenv(LOAD_PLUGINS, raising=False)
                if plugins is not None:
                    environment.setenv(LOAD_PLUGINS, plugins)
                settings = StoreSettings(approval_cache_seconds=600, approval_max_pending=1_000_000)
                store = GatewayStore(url, redis_url=redis_url, settings=settings, auto_migrate=True)
                return await stores.enter_async_context(store)

        store, other, notifying = await opened(""), await opened(""), await opened(None)
        for _ in range(repeat):
            await _hits(store, redis_url, hits, int(4_000 * scale))
            await _steps(store, url, steps, int(_STEPS * scale))
            await _notified_steps(notifying, store, notified, int(_STEPS * scale))
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
    await client.aclose()


def _works(store: GatewayStore, count: int) -> list[Work]:
    """Return the steps of `count` approvals, to be done in order."""
    asked: list[tuple[str, str]] = []

    async def issue(request: ApprovalRequest) -> None:
        asked.append((await store.approvals.issue_token(request), request.caller_id))

    async def approve(named: tuple[str, str]) -> None:
        await store.approvals.approve(named[0], "alice", "ok")

    async def use(named: tuple[str, str]) -> None:
        await store.approvals.consume_token(named[0], caller_id=named[1], tool_call=CALL)

    return [(issue, ask_many(count)), (approve, asked), (use, asked)]


async def _warm(store: GatewayStore) -> None:
    for work, items in _works(store, 1):
        await work(items[0])


async def _steps(store: GatewayStore, url: str, figures: list[Figure], count: int) -> None:
    await _warm(store)
    async with _bare_steps(url, count) as bare:
        for figure, step, limit in zip(figures, _works(store, count), bare, strict=True):
            await in_turns(figure, step, limit, CALLERS)


async def measure_peer(url: str, python: Path, *, repeat: int, scale: float) -> list[Figure]:
    """Measure one caller without Redis beside `mcp-hangar`, which `python` can import, in a database of its own."""
    figures = [Figure(f"{step}, 1 caller, no Redis", "approvals/s", "mcp-hangar, psycopg2", 1.0) for step in STEPS]
    async with _connected(url) as connection:
        await connection.execute("DROP DATABASE IF EXISTS hangar")
        await connection.execute("CREATE DATABASE hangar")
    script, theirs = str(Path(__file__).with_name("hangar.py")), url.rpartition("/")[0] + "/hangar"
    peer = await asyncio.create_subprocess_exec(
        str(python), script, theirs, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert peer.stdin is not None
    assert peer.stdout is not None

    async def seconds_of_peer(step: str, count: int) -> float:
        peer.stdin.write(f"{step} {count}\n".encode())
        return float(await peer.stdout.readline())

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(LOAD_PLUGINS, "")
        # The database may hold what other measurements asked for.
        settings = StoreSettings(approval_max_pending=1_000_000)
        store = GatewayStore(url, redis_url="", settings=settings, auto_migrate=True)
    async with store:
        # From the sixth time on PostgreSQL keeps a plan.
        for _ in range(8):
            await _warm(store)
            for step in STEPS:
                await seconds_of_peer(step, 1)
        turns, size = max(1, int(50 * scale)), 10
        for _ in range(repeat):
            seconds = [[0.0, 0.0] for _ in STEPS]
            for _ in range(turns):
                for sums, step, (work, items) in zip(seconds, STEPS, _works(store, size), strict=True):
                    sums[0] += size / await rate(work, items, 1)
                    sums[1] += await seconds_of_peer(step, size)
            for figure, (own, other) in zip(figures, seconds, strict=True):
                figure.ours.append(turns * size / own)
                figure.limit.append(turns * size / other)
    peer.stdin.close()
    await peer.wait()
    return figures


async def _notified_steps(notifying: GatewayStore, plain: GatewayStore, figures: list[Figure], count: int) -> None:
    """Notices are sent and written down within the turn that makes them."""
    await _warm(notifying)

    async def finish() -> None:
        await notifying.notifications.run(once=True)

    for figure, step, limit in zip(figures, _works(notifying, count), _works(plain, count), strict=True):
        await in_turns(figure, step, limit, CALLERS, turns=5, finish=finish)


@asynccontextmanager
async def _bare_steps(url: str, count: int) -> AsyncIterator[list[Work]]:
    asked = [
        issue_values(request, call=None, org_id=None, ttl_s=3_600.0, max_pending=1_000_000, hash_key=None)
        for request in ask_many(count)
    ]
    async with AsyncExitStack() as stack:
        # Each is used by one caller at a time, with nothing of a pool's between two uses.
        idle = [await stack.enter_async_context(_connected(url)) for _ in range(CALLERS)]

        def work(statement: Statement, values: Sequence[dict[str, Any]]) -> Work:
            compiled = statement.compiled(dialect())

            async def run(parameters: list[Any]) -> None:
                connection = idle.pop()
                assert await connection.fetchrow(compiled.text, *parameters) is not None
                idle.append(connection)

            return run, [compiled.arguments(each) for each in values]

        ballot = {
            "p_approver_id": "alice",
            "p_note": "ok",
            "p_channel": "api",
            "p_decision": VoteDecision.APPROVED,
            "p_allow_self": False,
            "p_ttl_s": 3_600.0,
        }
        permission = Permission("", ApprovalScope.EXECUTION, hash_tool_call(CALL))
        use_values = {f"p_{name}": value for name, value in permission._asdict().items()}
        names = [{"p_token": row["p_token"], "p_org_id": None} for row in asked]
        yield [
            work(statements.INSERT, asked),
            work(_APPROVE, [name | ballot for name in names]),
            work(
                statements.CONSUME,
                [
                    name | use_values | {"p_caller_id": row["p_caller_id"]}
                    for name, row in zip(names, asked, strict=True)
                ],
            ),
        ]


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        await connection.set_type_codec("jsonb", encoder=str, decoder=str, schema="pg_catalog")
        yield connection
    finally:
        await connection.close()


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
    changes = deciding.approvals._changes
    decided = changes.publish

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
        changes.publish = noting  # type: ignore[method-assign]
        for token in tokens[:100]:
            result = await deciding.approvals.approve(token, "alice")
            async with asyncio.timeout(10):
                while token not in woken:
                    await asyncio.sleep(0.0005)
            start = time.perf_counter()
            await waiting.approvals.get(approval_id=result.approval_id)
            single.append(time.perf_counter() - start)
        changes.publish = decided  # type: ignore[method-assign]
    delays = [woken[token] - at for token, at in zip(tokens, committed, strict=False) if token in woken]
    figure.facts |= {"woken": len(delays)}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    figure.ours.append(statistics.median(delays) * 1000)
    figure.limit.append(statistics.median(single) * 1000)
