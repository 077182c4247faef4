"""A plan that PostgreSQL made while a table was small, and keeps until it analyses the table, serves a large one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from contract_helpers import CALL, make_request
from delivery_helpers import Post, quiet
from plan_helpers import Reports, copies, nodes, read_by
from test_plans import CALLS, SHORT, decide_all, fill_up, filling

from agent_gateway_store import GatewayStore
from builders import make_event
from servers import connected, run

pytestmark = pytest.mark.system

# Open approvals of many callers.
_WAITING = [
    copies(
        "approval_requests",
        3_000,
        approval_id="gen_random_uuid()",
        token="md5('w' || n) || md5(n::text)",
        request_id="'waiting-' || n",
        caller_id="'caller-' || n % 500",
        created_at="now() - n * interval '1 minute' - interval '1 year'",
        expires_at="now() + interval '1 hour'",
        decision_at="NULL",
        used_at="NULL",
        acquire_key="NULL",
        status="'PENDING'",
    )
]
_HOT = {"issue_token", "history", "release_output", "acquire", "expire_stale", "list_requests"}
_APPROVALS = [called for called in CALLS if called.names.split()[0] in _HOT]


@pytest.mark.parametrize("used", [10, 70])
async def test_a_plan_made_for_small_tables_serves_large_ones(
    migrated_postgres_database: Callable[[], str], no_plugins: None, used: int
) -> None:
    """PostgreSQL keeps the plan of a gateway's first approvals while thousands come to wait, until it analyses."""
    url = migrated_postgres_database()
    await asyncio.to_thread(run, fill_up(url, None, is_analysed=False))
    async with GatewayStore(url, redis_url="", settings=quiet()) as earlier:
        for _ in range(used):
            await decide_all(earlier)
    store = GatewayStore(url, redis_url="", settings=quiet(), plugins=[Post()])
    reports = Reports(store, "force_generic_plan")
    problems = []
    async with store:
        for called in _APPROVALS:
            await called.run(store)
        await store.audit.write(make_event())
        async with connected(url) as connection:
            for statement in [*filling(SHORT), *_WAITING]:
                await connection.execute(statement)
        for at, called in enumerate(_APPROVALS):
            reads_all = called.reads_all or called.by_statistics
            problems += await reports.faults_of(f"{called.names} ({at})", called.run(store), reads_all=reads_all)

    assert not problems, "\n".join(problems)


async def test_a_decision_reads_one_row_whatever_waits(
    migrated_postgres_database: Callable[[], str], no_plugins: None
) -> None:
    url = migrated_postgres_database()
    await asyncio.to_thread(run, fill_up(url, None, is_analysed=False))
    store = GatewayStore(url, redis_url="", settings=quiet())
    reports = Reports(store, "auto")

    async def use(token: str) -> None:
        await store.approvals.approve(token, "alice")
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)

    async with store:
        for _ in range(8):
            await use(await store.approvals.issue_token(make_request(tool_call=CALL)))
        tokens = [await store.approvals.issue_token(make_request(tool_call=CALL)) for _ in range(500)]
        reports.plans.clear()
        for token in tokens[:5]:
            await use(token)

    read = [read_by(node) for report in reports.plans for node in nodes(report["Plan"])]
    assert 0 < max(read) <= 5
