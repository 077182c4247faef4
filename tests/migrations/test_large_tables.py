"""Migrations of large tables of PostgreSQL: no limit of time, one migrator at a time, writers go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from agent_gateway_store.errors import SchemaOutOfDateError, StoreUnavailableError
from agent_gateway_store.storage import database, migrate, online
from agent_gateway_store.storage.database import create_engine
from servers import connected

pytestmark = [pytest.mark.integration, pytest.mark.system]

INDEX = "ix_audit_events_transaction_id"
FILL = """
INSERT INTO audit_events (request_id, org_id, timestamp, caller_id, caller_role, environment, mcp_server, tool_name,
    raw_args_hash, sanitized_args, risk_labels, risk_score, matched_policy_rule, decision, latency_ms, output_decision,
    redaction_flags, deterministic_rationale)
SELECT 'r' || n || random(), 'acme', now(), 'c', 'r', 'e', 's', 't', repeat('0', 64), '{}', '[]', 0.5, 'p', 'ALLOW', 1,
    'ALLOW', '[]', 'd' FROM generate_series(1, $1::int) AS n
"""
FILL_OTHERS = """
INSERT INTO notification_deliveries (delivery_id, org_id, approval_id, notifier, event, payload, status, attempts,
    next_attempt_at, created_at)
VALUES (gen_random_uuid(), 'acme', gen_random_uuid(), 'n', 'pending', '{}', 'DUE', 0, now(), now());
INSERT INTO approval_requests (approval_id, token, request_id, caller_id, org_id, tool_call, tool_call_hash,
    risk_explanation, created_at, expires_at, status, scope, required_approvals, approver_note, version)
SELECT gen_random_uuid(), repeat('0', 64), 'r', 'c', 'acme', '{}', 'h', '', now(), now(), 'PENDING', 'EXECUTION', 1,
    '', 1 FROM generate_series(1, %s) AS n
"""


@pytest.fixture
async def url(postgres_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A database at 0001 whose audit log counts as large."""
    monkeypatch.setattr(online, "_LARGE_BYTES", 1)
    made = postgres_database()
    engine = create_engine(made)
    await migrate.upgrade(engine, "0001_initial")
    await engine.dispose()
    async with connected(made) as connection:
        await connection.execute(FILL, 10)
    return made


@asynccontextmanager
async def engine_of(url: str, **options: Any) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url, **options) if options else create_engine(url)
    try:
        yield engine
    finally:
        await engine.dispose()


async def until(connection: asyncpg.Connection, condition: str) -> None:
    async with asyncio.timeout(30):
        while not await connection.fetchval(f"SELECT count(*) FROM pg_stat_activity WHERE {condition}"):
            await asyncio.sleep(0.01)


_POLLING = "query LIKE '%advisory_xact_lock%' AND datname = current_database() AND pid <> pg_backend_pid()"
_HOLDS_SNAPSHOT = "backend_xmin IS NOT NULL AND datname = current_database() AND pid <> pg_backend_pid()"
_BUILDING = "query LIKE 'CREATE INDEX CONCURRENTLY%' AND wait_event_type = 'Lock' AND datname = current_database()"


async def test_writers_go_on_while_an_index_is_built(url: str) -> None:
    """The build waits for an old transaction; events are stored meanwhile, and the schema is right at the end."""
    async with engine_of(url) as engine, connected(url) as old, connected(url) as writer:
        transaction = old.transaction(isolation="repeatable_read")
        await transaction.start()
        await old.execute("SELECT 1")
        # Not of the audit log, so that only the build waits for it.
        await old.fetch("SELECT count(*) FROM api_keys")
        upgrading = asyncio.create_task(migrate.upgrade(engine))
        await until(writer, _BUILDING)
        await writer.execute(FILL, 5, timeout=5)
        written = await writer.fetchval("SELECT count(*) FROM audit_events")
        await transaction.rollback()
        await upgrading
        differences = await migrate.differences(engine)

    assert (written, differences) == (15, [])


@pytest.mark.parametrize("large_bytes", [1, 2**30])
async def test_a_build_that_was_stopped_is_done_again(
    url: str, monkeypatch: pytest.MonkeyPatch, large_bytes: int
) -> None:
    """It leaves an INVALID index, which is never used; the next run drops it, though the table be small by then."""
    async with engine_of(url) as engine, connected(url) as old, connected(url) as admin:
        transaction = old.transaction(isolation="repeatable_read")
        await transaction.start()
        await old.fetch("SELECT count(*) FROM api_keys")
        upgrading = asyncio.create_task(migrate.upgrade(engine))
        await until(admin, _BUILDING)
        await admin.execute(f"SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE {_BUILDING}")
        with pytest.raises(StoreUnavailableError):
            await upgrading
        valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass($1)"
        left = await admin.fetchval(valid, INDEX)
        await transaction.rollback()
        monkeypatch.setattr(online, "_LARGE_BYTES", large_bytes)
        await migrate.upgrade(engine)
        built = await admin.fetchval(valid, INDEX)
        differences = await migrate.differences(engine)

    assert (left, built, differences) == (False, True, [])


class Stopped(Exception):
    """The migrator is killed: what it has not committed is gone."""


@pytest.mark.parametrize(("approvals", "least_up", "least_down"), [(0, 7, 1), (1, 15, 3)])
async def test_a_migration_that_was_stopped_at_any_commit_is_completed_by_the_next(
    url: str, approvals: int, least_up: int, least_down: int
) -> None:
    """Up and down, after each step that commits what came before it, which is that of a small table, too."""
    seen = set[str]()

    async def stops_of(migration: Callable[[], Awaitable[None]]) -> int:
        seen.clear()
        while True:
            try:
                await migration()
            except Stopped:
                continue
            return len(seen)

    async with engine_of(url) as engine, connected(url) as connection:

        @event.listens_for(engine.sync_engine, "after_cursor_execute")
        def stop(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            is_commit = connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"
            if is_commit and statement.startswith(("ALTER", "CREATE")) and statement not in seen:
                seen.add(statement)
                raise Stopped

        await connection.execute(FILL_OTHERS % approvals)
        up = await stops_of(lambda: migrate.upgrade(engine))
        differences = await migrate.differences(engine)
        down = await stops_of(lambda: migrate.downgrade(engine, "0001_initial"))

    assert (differences, up >= least_up, down >= least_down) == ([], True, True)


async def test_no_limit_of_time_ends_a_migration(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither ours for a command, nor the server's for a statement or a lock that the build waits for."""
    monkeypatch.setattr(database, "_COMMAND_TIMEOUT_S", 0.5)
    name = url.rpartition("/")[2]
    async with connected(url) as old:
        await old.execute(f'ALTER DATABASE "{name}" SET statement_timeout = 500')
        await old.execute(f'ALTER DATABASE "{name}" SET lock_timeout = 500')
        transaction = old.transaction(isolation="repeatable_read")
        await transaction.start()
        await old.fetch("SELECT count(*) FROM api_keys")
        async with engine_of(url) as engine, connected(url) as watcher:
            upgrading = asyncio.create_task(migrate.upgrade(engine))
            await until(watcher, f"{_BUILDING} AND clock_timestamp() - query_start > interval '1 second'")
            await transaction.rollback()
            await upgrading
            differences = await migrate.differences(engine)

    assert differences == []


async def test_a_small_table_keeps_the_one_transaction(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "_LARGE_BYTES", 2**30)
    async with engine_of(url) as engine, connected(url) as connection:
        await connection.execute("ALTER TABLE audit_events RENAME CONSTRAINT ck_audit_events_execution_status TO gone")
        await connection.execute("ALTER TABLE audit_events ADD CONSTRAINT never CHECK (latency_ms < 5) NOT VALID")
        await connection.execute("ALTER TABLE notification_deliveries RENAME TO elsewhere")
        with pytest.raises(SchemaOutOfDateError):
            await migrate.upgrade(engine)
        found = await connection.fetchval("SELECT to_regclass($1)", INDEX)
        revision = await migrate.current(engine)

    assert (found, revision) == (None, "0001_initial")


async def test_another_migrator_is_waited_for_and_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a command may take; when the time is up, one sentence says who is in the way.

    Who waits holds no snapshot meanwhile: a concurrent build of the other one would wait for it.
    """
    monkeypatch.setattr(database, "_COMMAND_TIMEOUT_S", 0.2)
    monkeypatch.setattr(migrate, "_POLL_S", 0.001)
    async with engine_of(url) as engine, connected(url) as other:
        await other.execute(f"SELECT pg_advisory_lock({migrate.LOCK_KEY})")
        waiting = asyncio.create_task(migrate.upgrade(engine))
        await until(other, _POLLING)
        await until(other, f"NOT EXISTS (SELECT FROM pg_stat_activity WHERE {_HOLDS_SNAPSHOT})")
        await asyncio.sleep(0.5)
        await other.execute(f"SELECT pg_advisory_unlock({migrate.LOCK_KEY})")
        await waiting
        await other.execute(f"SELECT pg_advisory_lock({migrate.LOCK_KEY})")
        monkeypatch.setattr(migrate, "_LOCK_TIMEOUT_S", 1.0)
        with pytest.raises(StoreUnavailableError, match="another process has been migrating it for 1 seconds"):
            await migrate.downgrade(engine, "base")


async def test_a_migration_that_is_cancelled_lets_go_of_its_lock(url: str) -> None:
    """Also in the statement that follows the lock: SQLAlchemy would only forget that connection."""
    async with engine_of(url) as engine, engine_of(url) as other:
        waiting = list[asyncio.Task[None]]()

        @event.listens_for(engine.sync_engine, "before_cursor_execute")
        def cancel(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if statement.startswith("SET LOCAL lock_timeout = 0"):
                waiting.pop().cancel()

        waiting.append(asyncio.create_task(migrate.upgrade(engine)))
        await asyncio.wait(waiting[:])
        async with asyncio.timeout(20):
            await migrate.upgrade(other)
        differences = await migrate.differences(other)

    assert (waiting, differences) == ([], [])


async def test_a_pool_of_one_connection_is_enough(url: str) -> None:
    async with engine_of(url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
        await migrate.upgrade(engine)
        differences = await migrate.differences(engine)

    assert differences == []
