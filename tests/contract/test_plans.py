"""No statement is planned badly: on empty and on large tables, analysed or never, for these parameters and for any.

PostgreSQL itself reports the plan of every statement that the public methods send (`auto_explain`), so that none
escapes; a method that nobody calls here fails `test_every_method_is_called`.
"""

from __future__ import annotations

import asyncio
import inspect
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import pytest
from contract_helpers import RefusingSink
from delivery_helpers import Post, quiet
from plan_helpers import FEW_ROWS, Reports, copies, nodes, read_by
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store import GatewayStore
from agent_gateway_store.approval import ApprovalManager
from agent_gateway_store.audit.manager import AuditManager
from agent_gateway_store.delivery.manager import NotificationManager
from agent_gateway_store.keys.manager import KeyManager
from agent_gateway_store.shipping.manager import SinkManager
from agent_gateway_store.storage.asyncpg_pool import RawConnection
from builders import CALL, CALLER, make_event, make_request
from servers import connected, run

pytestmark = pytest.mark.system

_TABLES = ("audit_events", "approval_requests", "approval_votes", "notification_deliveries")
_OLD = "ordinary-call"


class Size(NamedTuple):
    events: int
    approvals: int
    deliveries: int


# Large enough for an index to be worth it; filled and analysed in a few seconds.
SHORT = Size(20_000, 10_000, 20_000)
_LONG = Size(300_000, 50_000, 100_000)


def filling(size: Size) -> list[str]:
    """SQL of a long history: few approvals are open, and a fifth of the notices waits for a receiver that is away."""
    ago = "now() - n * interval '1 minute'"
    return [
        copies(
            "audit_events",
            size.events,
            request_id="'event-' || n",
            content_hash="md5(n::text) || md5(n::text)",
            timestamp=ago,
            caller_id="'caller-' || n % 50",
            tool_name="'tool-' || n % 40",
            session_id="'session-' || n % 5000",
            decision="CASE WHEN n % 20 = 0 THEN 'DENY' ELSE 'ALLOW' END",
            transaction_id="NULL",
            # Of ten events one says that a call begins, and the next one how it ended.
            extra="""jsonb_build_object('phase', CASE n % 10 WHEN 0 THEN 'intent' WHEN 1 THEN 'outcome' END)""",
            parent_request_id="CASE WHEN n % 10 = 1 THEN 'event-' || n - 1 END",
        ),
        copies(
            "approval_requests",
            size.approvals,
            approval_id="gen_random_uuid()",
            token="md5(n::text) || md5(n::text)",
            request_id="'request-' || n",
            caller_id="'caller-' || n % 50",
            created_at=ago,
            expires_at=f"{ago} + interval '1 hour'",
            decision_at=ago,
            used_at=ago,
            # Half of them are runs of one call.
            acquire_key="CASE WHEN n % 2 = 0 THEN old.acquire_key END",
            status="CASE WHEN n % 100 = 0 THEN 'EXPIRED' WHEN n % 50 = 1 THEN 'DENIED' ELSE 'USED' END",
        ),
        """INSERT INTO approval_votes (approval_id, org_id, approver_id, decision, note, channel, voted_at)
           SELECT approval_id, org_id, 'alice', 'APPROVED', '', 'api', created_at FROM approval_requests
           WHERE status IN ('USED', 'DENIED') ON CONFLICT DO NOTHING""",
        copies(
            "notification_deliveries",
            size.deliveries,
            delivery_id="gen_random_uuid()",
            approval_id="gen_random_uuid()",
            notifier="CASE WHEN n % 5 = 0 THEN 'away' ELSE 'post' END",
            status="CASE WHEN n % 5 = 0 THEN 'DUE' ELSE 'DELIVERED' END",
            next_attempt_at="now() + interval '1 day'",
            created_at=ago,
            delivered_at="CASE WHEN n % 5 = 0 THEN NULL ELSE now() END",
        ),
    ]


async def fill_up(url: str, size: Size | None, *, is_analysed: bool) -> None:
    async with connected(url) as connection:
        for table in _TABLES:
            await connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
    if size is None:
        return
    async with GatewayStore(url, redis_url="", settings=quiet(), plugins=[Post()]) as store:
        await _acquire(store)
        await store.audit.write(make_event(risk_labels=["pii"], caller_id=_OLD))
    async with connected(url) as connection:
        for statement in filling(size):
            await connection.execute(statement)
        if is_analysed:
            await connection.execute("ANALYZE")


@pytest.fixture(scope="module")
def histories(lasting_postgres_database: Callable[[], str]) -> Callable[[str], str]:
    @cache
    def fill(kind: str) -> str:
        url, size = lasting_postgres_database(), None if kind == "empty" else _LONG if "long" in kind else SHORT
        run(fill_up(url, size, is_analysed=kind.startswith("analysed")))
        return url

    return fill


@pytest.fixture(
    params=[
        "empty",
        "analysed",
        "never analysed",
        pytest.param("analysed, long", marks=pytest.mark.slow),
        pytest.param("never analysed, long", marks=pytest.mark.slow),
    ]
)
def filled(
    request: pytest.FixtureRequest, migrated_postgres_database: Callable[..., str], histories: Callable[[str], str]
) -> str:
    return migrated_postgres_database(histories(request.param))


class Called(NamedTuple):
    """One use of the public methods.

    Attributes:
        names: The methods.
        run: Calls them.
        reads_all: They read everything that matches, or are documented as slow.
        by_statistics: They read as `reads_all` where PostgreSQL takes every range of time for a third of the table: it
            was never analysed, or any time may be meant.
    """

    names: str
    run: Callable[[GatewayStore], Awaitable[Any]]
    reads_all: bool = False
    by_statistics: bool = False


async def _all_of(rows: Any) -> None:
    async with aclosing(rows) as found:
        async for _ in found:
            pass


async def decide_all(store: GatewayStore) -> None:
    asked = [await store.approvals.issue_token(request) for request in (make_request() for _ in range(4))]
    approvals = store.approvals
    await approvals.approve(asked[0], "alice")
    await approvals.deny(asked[1], "alice")
    await approvals.cancel(asked[2], "alice")
    await approvals.consume_token(asked[0], caller_id="dev-agent", tool_call=CALL)
    await approvals.record_outcome(asked[0], "done")
    await approvals.check_token(asked[1])
    await approvals.wait_for_decision(asked[1], timeout_s=0)
    await approvals.issue_token(await approvals.get(approval_id=(await approvals.check_token(asked[3])).approval_id))


async def _of_two(store: GatewayStore) -> None:
    token = await store.approvals.issue_token(make_request(required_approvals=2))
    await store.approvals.approve(token, "alice")
    await store.approvals.approve(token, "bob")
    await store.approvals.history((await store.approvals.check_token(token)).approval_id)


async def _acquire(store: GatewayStore) -> None:
    acquire = partial(store.approvals.acquire, make_request(caller_id=_OLD))
    asked = await acquire()
    await store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
    used = await acquire()
    assert used.status == "USED"
    await store.approvals.record_outcome(approval_id=used.approval_id, outcome="done")


async def _acquire_again(store: GatewayStore) -> None:
    acquire = partial(store.approvals.acquire, bind=uuid4().hex)
    asked = await acquire(make_request())
    await store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
    # A higher quorum cancels what stands.
    asked = await acquire(make_request(required_approvals=2))
    await _execute(store, f"UPDATE approval_requests SET expires_at = now() WHERE approval_id = '{asked.approval_id}'")
    asked = await acquire(make_request())
    await store.approvals.deny(approval_id=asked.approval_id, approver_id="alice")
    assert (await acquire(make_request())).status == "DENIED"


async def _call(store: GatewayStore) -> None:
    async with store.audit.call(CALL, CALLER, decision="ALLOW", intent=True):
        pass


async def _release(store: GatewayStore) -> None:
    token = await store.approvals.issue_token(make_request(scope="OUTPUT_RELEASE", output_payload={"rows": 1}))
    await store.approvals.approve(token, "alice")
    await store.approvals.release_output(token, caller_id="dev-agent")


async def _expire(store: GatewayStore) -> None:
    ids = [(await store.approvals.check_token(await store.approvals.issue_token(make_request()))).approval_id]
    await _execute(store, f"UPDATE approval_requests SET expires_at = now() WHERE approval_id = '{ids[0]}'")
    assert await store.approvals.expire_stale() == 1


async def _execute(store: GatewayStore, sql: str) -> None:
    async with connected(str(store.database.url)) as connection:
        await connection.execute(sql)


async def _record(store: GatewayStore) -> None:
    async with AsyncSession(store.database.engine) as session:
        await store.audit.record(make_event(), session=session)
        await session.commit()


async def _export(store: GatewayStore) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.jsonl"
        await store.audit.export(path, caller_id=_OLD)
        await store.audit.import_file(path)


async def _follow(store: GatewayStore) -> None:
    async with aclosing(store.audit.follow(start="now", poll_s=0.01)) as events:
        waiting = asyncio.ensure_future(anext(events))
        while not waiting.done():
            await store.audit.write(make_event())
            await asyncio.wait([waiting], timeout=0.05)


async def _first_pages(store: GatewayStore) -> None:
    cursor: str | None = "beginning"
    for _ in range(3):
        cursor = (await store.audit.changes(cursor, limit=100)).next_cursor


async def _ship(store: GatewayStore) -> None:
    await store.audit.ship(RefusingSink(), once=True, start="now")
    await store.audit.write(make_event())
    await store.audit.ship(RefusingSink(), once=True)
    await store.sinks.list()
    assert len(await store.sinks.dead_letters()) == await store.sinks.redrive("sink") == 1
    await store.audit.ship(RefusingSink(), once=True)
    await store.sinks.forget("sink")


async def _keys(store: GatewayStore) -> None:
    issued = await store.keys.issue("dev-agent", role="developer")
    await store.keys.verify(issued.plaintext)
    await store.keys.rotate("dev-agent")
    await store.keys.get("dev-agent")
    await store.keys.read("dev-agent")
    await store.keys.list()
    await store.keys.revoke("dev-agent")


CALLS = [
    Called(
        "issue_token approve deny cancel consume_token record_outcome check_token wait_for_decision get",
        decide_all,
    ),
    Called("history", _of_two),
    Called("release_output", _release),
    Called("acquire", _acquire),
    Called("acquire", _acquire_again),
    Called("expire_stale", _expire),
    *(
        Called("list_requests", lambda store, status=status: store.approvals.list_requests(status, limit=5))
        for status in ("PENDING", "APPROVED", "DENIED", "CANCELLED", "USED", "EXPIRED", None)
    ),
    Called("search", lambda store: store.approvals.search(status=["PENDING", "EXPIRED"], limit=5)),
    Called("search", lambda store: store.approvals.search(request_id="request-7")),
    Called("search", lambda store: store.approvals.search(caller_id="nobody", since="1h"), by_statistics=True),
    Called("stream", lambda store: _all_of(store.approvals.stream(status="PENDING"))),
    Called("stats", lambda store: store.approvals.stats("status"), reads_all=True),
    Called("stats", lambda store: store.approvals.stats("tool_name", status="PENDING"), by_statistics=True),
    Called(
        "export",
        lambda store: store.approvals.export("approvals.jsonl", status="PENDING", overwrite=True),
        by_statistics=True,
    ),
    Called("write", lambda store: store.audit.write(make_event())),
    Called("write_many", lambda store: store.audit.write_many([make_event() for _ in range(20)])),
    Called("record", _record),
    Called("flush", lambda store: store.audit.flush()),
    Called("export import_file", _export),
    Called("call", _call),
    Called("orphans", lambda store: store.audit.orphans(), reads_all=True),
    Called("get_by_request_id", lambda store: store.audit.get_by_request_id("event-7")),
    Called("list_by_caller", lambda store: store.audit.list_by_caller("caller-7")),
    Called("list_by_decision", lambda store: store.audit.list_by_decision("DENY")),
    Called("list_recent", lambda store: store.audit.list_recent()),
    Called("search", lambda store: store.audit.search(tool_name="tool-3", caller_id="caller-3")),
    Called("search", lambda store: store.audit.search(session_id="session-3")),
    Called("search", lambda store: store.audit.search(text="nowhere", since="1h"), by_statistics=True),
    Called("search", lambda store: store.audit.search(caller_id="caller-3", tool_name="tool-2"), reads_all=True),
    Called("stats", lambda store: store.audit.stats("risk_label"), reads_all=True),
    Called("stats", lambda store: store.audit.stats(["caller_id", "tool_name"], "1d"), reads_all=True),
    Called("stats", lambda store: store.audit.stats("risk_label", since="1h"), by_statistics=True),
    Called("stream", lambda store: _all_of(store.audit.stream(since="1h")), by_statistics=True),
    Called("stream", lambda store: _all_of(store.audit.stream()), reads_all=True),
    Called("to_arrow", lambda store: store.audit.to_arrow(), reads_all=True),
    Called("changes", lambda store: store.audit.changes(limit=10)),
    Called("changes", _first_pages),
    Called("follow", _follow),
    Called("ship list dead_letters redrive forget", _ship),
    Called("to_arrow", lambda store: store.audit.to_arrow(since="1h"), by_statistics=True),
    Called("to_pandas", lambda store: store.audit.to_pandas(since="1h"), by_statistics=True),
    Called("to_polars", lambda store: store.audit.to_polars(since="1h"), by_statistics=True),
    Called("issue verify rotate get read list revoke", _keys),
    Called("list", lambda store: store.notifications.list("DUE", limit=5)),
    Called("list", lambda store: store.notifications.list(approval_id=UUID(int=1))),
    Called("counts", lambda store: store.notifications.counts(), reads_all=True),
    Called("redrive", lambda store: store.notifications.redrive()),
    Called("run", lambda store: store.notifications.run(once=True)),
    Called("prune", lambda store: store.notifications.prune(timedelta(days=30))),
]


def test_every_method_is_called() -> None:
    services = (ApprovalManager, AuditManager, KeyManager, NotificationManager, SinkManager)
    methods = {
        name
        for service in services
        for name, found in vars(service).items()
        if inspect.isfunction(found) and not name.startswith("_")
    }

    assert {name for called in CALLS for name in called.names.split()} == methods


async def test_no_plan_surprises(filled: str, no_plugins: None) -> None:
    """No JIT, no whole table, no estimate far off, no sort on disk, and few rows read for one that is returned."""
    async with connected(filled) as connection:
        is_analysed = await connection.fetchval(
            "SELECT count(*) FROM pg_statistic JOIN pg_class ON oid = starelid AND relname = $1", _TABLES[0]
        )
    problems = []
    for setting in ("force_custom_plan", "force_generic_plan"):
        store = GatewayStore(filled, redis_url="", settings=quiet(), plugins=[Post(), Post("away")])
        reports = Reports(store, setting)
        async with store:
            for at, called in enumerate(CALLS):
                reads_all = called.reads_all or (
                    called.by_statistics and not (is_analysed and setting == "force_custom_plan")
                )
                # A percentile is of sorted values; and without statistics PostgreSQL sorts what an index would give.
                sorts_all = called.names == "stats" or (called.reads_all and not is_analysed)
                name = f"{called.names} ({at})"
                problems += await reports.faults_of(name, called.run(store), reads_all=reads_all, sorts_all=sorts_all)
                assert at or reports.plans, "PostgreSQL reports no plans"

    assert not problems, "\n".join(problems)


async def test_looking_for_orphans_reads_each_intent_and_its_outcome_once(filled: str, no_plugins: None) -> None:
    read: list[float] = []
    for setting in ("force_custom_plan", "force_generic_plan"):
        store = GatewayStore(filled, redis_url="", settings=quiet())
        reports = Reports(store, setting)
        async with store:
            await store.audit.orphans()
        scans = (node for report in reports.plans for node in nodes(report["Plan"]) if "Scan" in node["Node Type"])
        read.append(sum(node["Actual Rows"] * node["Actual Loops"] for node in scans))

    async with connected(filled) as connection:
        events = await connection.fetchval("SELECT count(*) FROM audit_events")
    # A tenth of the events are intents; each entry of an index and each row counts.
    assert max(read) <= max(events, FEW_ROWS)


async def test_a_long_page_of_a_log_never_analysed_is_read_by_its_index(
    migrated_postgres_database: Callable[[], str], no_plugins: None
) -> None:
    """A follower that begins at the beginning does not read and sort 100,000 events for each of its pages."""
    url = migrated_postgres_database()
    await asyncio.to_thread(run, fill_up(url, Size(100_000, 1, 1), is_analysed=False))
    read = []
    for setting in ("force_custom_plan", "force_generic_plan"):
        store = GatewayStore(url, redis_url="", settings=quiet())
        reports = Reports(store, setting)
        async with store:
            first = await store.audit.changes("beginning", limit=10_000)
            second = await store.audit.changes(first.next_cursor, limit=10_000)
            assert (len(first), len(second)) == (10_000, 10_000)
        read += [read_by(node) for report in reports.plans for node in nodes(report["Plan"])]

    assert 0 < max(read) <= FEW_ROWS


async def test_asking_and_deciding_are_not_planned_each_time(filled: str, no_plugins: None) -> None:
    """From the sixth time on PostgreSQL keeps one plan: making it takes longer than running it."""
    async with GatewayStore(filled, redis_url="", settings=quiet(), plugins=[Post(), Post("away")]) as store:
        for decide in (store.approvals.approve, store.approvals.deny, store.approvals.cancel):
            for _ in range(8):
                await decide(await store.approvals.issue_token(make_request()), "alice")
        async with store.database.connection("read") as connection:
            assert isinstance(connection, RawConnection)
            statements = await connection.driver.fetch("SELECT statement, generic_plans FROM pg_prepared_statements")

    found = [each for each in statements if each["statement"].lstrip().startswith(("WITH asked", "WITH decided"))]
    assert len(found) == 4
    assert [each["statement"] for each in found if each["generic_plans"] < 3] == []
