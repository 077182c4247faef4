"""Serialization failures and deadlocks, provoked for real: run again a few times, and never an outage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import cycle
from typing import Any

import asyncpg
import pytest
from database_helpers import set_defaults
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from agent_gateway_store import GatewayStore, StoreSettings, WriteOutcome
from agent_gateway_store.approval import ApprovalManager
from agent_gateway_store.clock import utc_now
from agent_gateway_store.errors import AuditUnavailableError, StoreUnavailableError, TransactionConflictError
from agent_gateway_store.models.retention import PrunedApprovals
from agent_gateway_store.storage.errors import retry_conflicts, translate_errors
from builders import CALL, make_event, make_request
from servers import connected

STORED = WriteOutcome.STORED
_FAILS = """
CREATE TABLE fails (state TEXT, times INTEGER);
CREATE SEQUENCE tries;
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- A sequence keeps its place when the transaction is rolled back.
    IF nextval('tries') <= (SELECT times FROM fails) THEN
        RAISE EXCEPTION 'in favour of another' USING ERRCODE = (SELECT state FROM fails);
    END IF;
    RETURN NULL;
END $$;
"""
"""The host's trigger that ends our transactions: in READ COMMITTED a serialization failure comes from elsewhere."""


@pytest.fixture
def url(migrated_postgres_database: Callable[[], str]) -> str:
    return migrated_postgres_database()


async def make_fail(url: str, table: str, *, state: str, times: int) -> None:
    """Let the first so many statements that write to `table` end their transactions with `state`."""
    async with connected(url) as connection:
        await connection.execute(_FAILS)
        await connection.execute("INSERT INTO fails VALUES ($1, $2)", state, times)
        await connection.execute(
            f"CREATE TRIGGER failing AFTER INSERT OR UPDATE OR DELETE ON {table} EXECUTE FUNCTION fail()"
        )


async def ask(store: GatewayStore) -> str:
    return await store.approvals.issue_token(make_request())


async def issue(store: GatewayStore) -> None:
    await store.keys.issue("dev-agent", role="developer", environment="dev")


async def nothing(_store: GatewayStore) -> None: ...


async def approved(store: GatewayStore) -> str:
    token = await ask(store)
    await store.approvals.approve(token, "anna")
    return token


async def used(store: GatewayStore) -> str:
    token = await approved(store)
    await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    return token


async def denied(store: GatewayStore) -> None:
    await store.approvals.deny(await store.approvals.issue_token(make_request(request_id="r-1")), "anna")


async def prune_approvals(store: GatewayStore) -> PrunedApprovals:
    return await store.retention.prune_approvals(utc_now(), by="ops", discard=True, below_floor=True)


async def erase(store: GatewayStore) -> None:
    await store.audit.write(make_event(request_id="r-1"))
    await store.retention.erase("r-1", reason="asked for", by="ops")


async def overdue(store: GatewayStore) -> None:
    await ask(store)
    async with store.database.write() as connection:
        await connection.execute(text("UPDATE approval_requests SET expires_at = now() - interval '1 hour'"))


CALLS: dict[
    str, tuple[str, Callable[[GatewayStore], Awaitable[Any]], Callable[[GatewayStore, Any], Awaitable[Any]]]
] = {
    "audit.write": ("audit_events", nothing, lambda store, _: store.audit.write(make_event())),
    "audit.write_many": (
        "audit_events",
        nothing,
        lambda store, _: store.audit.write_many(make_event() for _ in range(20)),
    ),
    "issue_token": ("approval_requests", nothing, lambda store, _: ask(store)),
    "approve": ("approval_requests", ask, lambda store, token: store.approvals.approve(token, "anna")),
    "vote": ("approval_votes", ask, lambda store, token: store.approvals.approve(token, "anna")),
    "deny": ("approval_requests", ask, lambda store, token: store.approvals.deny(token, "anna")),
    "cancel": ("approval_requests", ask, lambda store, token: store.approvals.cancel(token, "dev-agent")),
    "consume_token": (
        "approval_requests",
        approved,
        lambda store, token: store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL),
    ),
    "record_outcome": (
        "approval_requests",
        used,
        lambda store, token: store.approvals.record_outcome(token, "done"),
    ),
    "expire_stale": ("approval_requests", overdue, lambda store, _: store.approvals.expire_stale()),
    "keys.issue": ("api_keys", nothing, lambda store, _: issue(store)),
    "keys.rotate": ("api_keys", issue, lambda store, _: store.keys.rotate("dev-agent")),
    "keys.revoke": ("api_keys", issue, lambda store, _: store.keys.revoke("dev-agent")),
    "prune_approvals": ("approval_votes", denied, lambda store, _: prune_approvals(store)),
    "erase": ("approval_requests", denied, lambda store, _: erase(store)),
    "redrive": ("notification_deliveries", nothing, lambda store, _: store.notifications.redrive()),
}
"""By name: the table that it writes, what goes before, and the call."""


@pytest.mark.parametrize(("name", "state"), [*zip(CALLS, cycle(("40001", "40P01")))])
async def test_every_write_is_run_again(url: str, name: str, state: str) -> None:
    """It fails twice and succeeds as if nothing had been: nothing is spooled, nothing is done twice."""
    table, before, call = CALLS[name]
    async with GatewayStore(url, redis_url="") as store:
        given = await before(store)
        await make_fail(url, table, state=state, times=2)
        answer = await call(store, given)
        spooled = store.audit.counters.spooled
    async with connected(url) as connection:
        tries = await connection.fetchval("SELECT last_value FROM tries")
        rows = await connection.fetchval("SELECT count(*) FROM audit_events")

    assert tries >= 3
    # The retention says in the log what it did.
    written = {"audit.write": 1, "audit.write_many": 20, "prune_approvals": 1, "erase": 2}
    assert (spooled, rows) == (0, written.get(name, 0))
    assert answer not in (WriteOutcome.SPOOLED, WriteOutcome.LOST)


async def test_what_goes_is_said_once_where_the_log_cannot_be_sealed(url: str) -> None:
    """The sealer gives up after four tries; what is committed by then is not written again."""
    async with GatewayStore(url, redis_url="", settings=StoreSettings(audit_seal_seconds=0)) as store:
        await store.audit.write_many(make_event() for _ in range(3))
        await store.evidence.seal()
        await make_fail(url, "audit_leaves", state="40001", times=4)
        with pytest.raises(TransactionConflictError):
            await store.retention.prune(utc_now(), by="ops", discard=True, below_floor=True)

        assert [each.tool_name for each in await store.audit.search(caller_id="ops")] == ["audit.prune"]


async def test_it_gives_up_and_says_so(url: str) -> None:
    """After four tries: an error of its own, which says what to do; nothing was written."""
    async with GatewayStore(url, redis_url="") as store:
        token = await ask(store)
        await make_fail(url, "approval_requests", state="40001", times=4)
        with pytest.raises(TransactionConflictError, match=r"in favour of another one .* run the whole") as given_up:
            await store.approvals.approve(token, "anna")
        pending = await store.approvals.check_token(token, fresh=True)
        approved = await store.approvals.approve(token, "anna")

    assert (given_up.value.sqlstate, given_up.value.in_session) == ("40001", False)
    assert (pending.status, approved.status) == ("PENDING", "APPROVED")


async def test_events_that_give_up_are_kept_and_others_go_on(url: str) -> None:
    """They are spooled and come in by themselves; it is no outage: the next event is stored at once."""
    async with GatewayStore(url, redis_url="") as store:
        # A batch is tried by COPY only: nothing else follows, as no row was refused.
        await make_fail(url, "audit_events", state="40P01", times=4)
        first = await store.audit.write_many(make_event() for _ in range(20))
        second = await store.audit.write(make_event())
        waiting = await store.audit.flush()
        stored = await store.audit.stats()

    assert (first, second, waiting) == ({WriteOutcome.SPOOLED: 20}, STORED, 0)
    assert stored[0]["calls"] == 21


async def test_strict_says_that_it_was_no_outage(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUDIT_MODE", "strict")
    async with GatewayStore(url, redis_url="") as store:
        await make_fail(url, "audit_events", state="40001", times=4)
        with pytest.raises(AuditUnavailableError, match="other transactions were in its way, so try again"):
            await store.audit.write(make_event())
        assert await store.audit.write(make_event()) is STORED


async def wait_for_locks(connection: asyncpg.Connection, count: int = 1) -> None:
    """Return once so many other connections of this database wait for a lock."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with asyncio.timeout(20):
        while await connection.fetchval(waiting) < count:
            await asyncio.sleep(0.01)


WAYS = ["own", "host's engine"]


@asynccontextmanager
async def store_on(url: str, way: str) -> AsyncIterator[GatewayStore]:
    engine = create_async_engine(url) if way == "host's engine" else None
    async with GatewayStore(None if engine else url, engine=engine, redis_url="") as store:
        yield store
    if engine:
        await engine.dispose()


@pytest.fixture
async def watchful_url(url: str) -> str:
    """A database where our connections look for a deadlock at once, and the host's never give way.

    Whoever waits last finds it: `stand_still` lets ours wait until the host does.
    """
    await set_defaults(url, deadlock_timeout="10ms")
    async with connected(url) as connection:
        await connection.execute(
            "CREATE TABLE h (n INTEGER); INSERT INTO h VALUES (0);"
            "CREATE FUNCTION stand_still() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " PERFORM pg_advisory_lock(1); PERFORM pg_advisory_unlock(1);"
            " IF TG_WHEN = 'AFTER' THEN UPDATE h SET n = n + 1; END IF; RETURN NEW; END $$"
        )
    return url


_NEVER_GIVES_WAY = "SET deadlock_timeout = '1min'"


async def deadlock(watcher: asyncpg.Connection, ours: Awaitable[Any], host: Callable[[], Awaitable[Any]]) -> Any:
    """Begin with ours, which stands still, and have the host wait for it before it goes on; return the task."""
    await watcher.execute("SELECT pg_advisory_lock(1)")
    task = asyncio.ensure_future(ours)
    await wait_for_locks(watcher)
    asking = asyncio.ensure_future(host())
    await wait_for_locks(watcher, 2)
    await watcher.execute("SELECT pg_advisory_unlock(1)")
    await asking
    return task


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "when"),
    [("consume_token", "AFTER UPDATE ON approval_requests"), ("vote", "AFTER INSERT ON approval_votes")],
)
async def test_a_real_deadlock_beside_a_row_of_the_hosts(watchful_url: str, way: str, name: str, when: str) -> None:
    """The host locks its own row and then the approval, ours the approval and then, by the host's trigger, its row: in
    one statement, and in a transaction of several.
    """
    url = watchful_url
    _, before, call = CALLS[name]
    async with store_on(url, way) as store, connected(url) as host, connected(url) as watcher:
        token = await before(store)
        await host.execute(_NEVER_GIVES_WAY)
        await watcher.execute(f"CREATE TRIGGER counting {when} FOR EACH ROW EXECUTE FUNCTION stand_still()")
        async with host.transaction():
            await host.execute("UPDATE h SET n = n + 10")
            lock = "SELECT FROM approval_requests FOR UPDATE"
            ours = await deadlock(watcher, call(store, token), lambda: host.execute(lock))
        result = await ours
        counted = await host.fetchval("SELECT n FROM h")

    assert (result.status, counted) == ("USED" if name == "consume_token" else "APPROVED", 11)


async def test_a_prune_of_approvals_locks_in_the_order_of_gateways(url: str) -> None:
    """Who holds an approval reaches its votes and notices; a deadlock would end that transaction, not ours.

    A notice that is delivered meanwhile is neither counted nor removed.
    """
    await set_defaults(url, deadlock_timeout="1min")
    idle = StoreSettings(notification_worker=False)
    async with (
        GatewayStore(url, redis_url="", settings=idle) as store,
        connected(url) as gateway,
        connected(url) as watcher,
    ):
        await denied(store)
        await gateway.execute("SET deadlock_timeout = '10ms'")
        async with gateway.transaction():
            await gateway.execute("SELECT FROM approval_requests FOR UPDATE")
            pruning = asyncio.create_task(prune_approvals(store))
            await wait_for_locks(watcher)
            voted = await gateway.execute("UPDATE approval_votes SET note = 'seen'")
            await gateway.execute("UPDATE notification_deliveries SET status = 'DELIVERED', delivered_at = now()")
        pruned = await pruning
        left = await watcher.fetchval("SELECT count(*) FROM notification_deliveries")

    assert (voted, pruned.approvals, pruned.notices, left) == ("UPDATE 1", 1, 0, 2)


@pytest.mark.parametrize("way", WAYS)
async def test_a_real_deadlock_of_a_batch(watchful_url: str, way: str) -> None:
    """The host records two of a batch's events in its own transaction, in the other order."""
    url = watchful_url
    one, two = make_event(request_id="r-1"), make_event(request_id="r-2")
    async with store_on(url, way) as store, connected(url) as watcher, AsyncSession(store.database.engine) as session:
        await watcher.execute(
            "CREATE TRIGGER holding BEFORE INSERT ON audit_events FOR EACH ROW WHEN (NEW.request_id = 'r-2') "
            "EXECUTE FUNCTION stand_still()"
        )
        await session.execute(text(_NEVER_GIVES_WAY))
        await store.audit.record(two, session=session)
        batch = await deadlock(
            watcher, store.audit.write_many([one, two]), lambda: store.audit.record(one, session=session)
        )
        await session.commit()
        outcomes = await batch
        stored = await store.audit.stats()

    assert outcomes == {WriteOutcome.DUPLICATE: 2}
    assert stored[0]["calls"] == 2


@pytest.mark.parametrize("way", WAYS)
async def test_a_real_serialization_failure_of_single_statements(url: str, way: str) -> None:
    """Each waits for a row of another transaction that commits: our statement sees it, or is run again."""
    await set_defaults(url, default_transaction_isolation="serializable")
    event = make_event()
    async with store_on(url, way) as store, connected(url) as host, connected(url) as watcher:
        token = await approved(store)
        async with host.transaction():
            await host.execute("UPDATE approval_requests SET approver_note = 'seen'")
            use = store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
            using = asyncio.create_task(use)
            await wait_for_locks(watcher)
        result = await using
        async with AsyncSession(store.database.engine) as session:
            await store.audit.record(event, session=session)
            writing = asyncio.create_task(store.audit.write(event))
            await wait_for_locks(watcher)
            await session.commit()
        outcome = await writing

    assert (result.status, outcome) == ("USED", WriteOutcome.DUPLICATE)


async def test_in_a_session_of_the_hosts_nothing_is_run_again(url: str) -> None:
    """Its earlier work would be missing in the second run; the host, who can run it all again, is told."""
    engine = create_async_engine(url, isolation_level="REPEATABLE READ")
    async with GatewayStore(url, redis_url="") as store, AsyncSession(engine) as session:
        token = await approved(store)
        await session.execute(text("CREATE TABLE earlier AS SELECT 1 AS n"))
        await store.approvals.cancel(token, "dev-agent")
        with pytest.raises(TransactionConflictError) as failed:
            await ApprovalManager(session).consume_token(token, caller_id="dev-agent", tool_call=CALL)
        found = await session.scalar(text("SELECT to_regclass('earlier')"))
    await engine.dispose()

    assert (failed.value.sqlstate, failed.value.in_session, found) == ("40001", True, None)


async def test_an_event_in_the_hosts_transaction_tells_the_host(url: str) -> None:
    """`record` raises what the host's own retry can go by, with the driver's error as its cause."""
    engine = create_async_engine(url, isolation_level="SERIALIZABLE")
    event = make_event()
    async with GatewayStore(url, redis_url="") as store, AsyncSession(engine) as session:
        await session.execute(text("SELECT 1"))
        await store.audit.write(event)
        with pytest.raises(TransactionConflictError) as failed:
            await store.audit.record(event, session=session)
        await session.rollback()
        again = await store.audit.record(event, session=session)
    await engine.dispose()

    assert (failed.value.sqlstate, failed.value.in_session) == ("40001", True)
    assert again is WriteOutcome.DUPLICATE


async def test_other_errors_are_not_run_again(url: str) -> None:
    """Only what may succeed the next time."""
    tries = 0

    @retry_conflicts
    async def work() -> None:
        nonlocal tries
        tries += 1
        with translate_errors("be written"):
            async with connected(url) as connection:
                await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(StoreUnavailableError):
        await work()

    assert tries == 1
