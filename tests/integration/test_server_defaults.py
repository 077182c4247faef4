"""PostgreSQL servers whose defaults were changed by somebody else: the store does there what it does everywhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic import autogenerate
from database_helpers import set_defaults
from sqlalchemy import event, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from agent_gateway_store import GatewayStore, ToolCall, WriteOutcome
from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.storage import migrate
from agent_gateway_store.storage.append_only import where_triggers_are_off
from agent_gateway_store.storage.database import Database, create_engine, get_db
from builders import CALL, make_event, make_request
from proofs.harness import execute
from servers import PostgresServer

pytestmark = pytest.mark.system

READ_DIFFERENTLY = {
    "standard_conforming_strings": "off",
    "backslash_quote": "on",
    "escape_string_warning": "on",
    "transform_null_equals": "on",
    "array_nulls": "off",
    "quote_all_identifiers": "on",
    "xmloption": "document",
}
WRITTEN_DIFFERENTLY = {
    "TimeZone": "Asia/Kathmandu",
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "sql_standard",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "client_min_messages": "debug1",
}
RUN_DIFFERENTLY = {
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "synchronous_commit": "off",
    "jit": "on",
    "jit_above_cost": "0",
    "row_security": "off",
    "enable_indexscan": "off",
    "plan_cache_mode": "force_generic_plan",
}
LIMITED = {
    "statement_timeout": "2s",
    "lock_timeout": "1s",
    "idle_in_transaction_session_timeout": "1s",
}
ALL = {**READ_DIFFERENTLY, **WRITTEN_DIFFERENTLY, **RUN_DIFFERENTLY, **LIMITED}
START = datetime(2031, 3, 1, 23, 30, 0, 123456, tzinfo=UTC)
# The package of a distribution, which has ICU as the wheel's server has not.
WITH_ICU = max(Path("/usr/lib/postgresql").glob("1[5-9]/bin"), default=None)
NASTY = "50% of a\\b_c 'quoted' \N{GRINNING FACE}"


async def everything(store: GatewayStore, folder: Path) -> list[Any]:
    """What a store answers to one of each kind of call, without what differs from run to run."""
    events = [
        make_event(
            request_id=f"r-{number}",
            timestamp=START + timedelta(minutes=20 * number),
            tool_name=NASTY if number % 2 else "plain",
            risk_score=0.1 + number / 3,
            sanitized_args={"text": NASTY, "none": None, "number": 0.1 + 0.2},
            risk_labels=["NULL", "a,b", "null"],
        )
        for number in range(3)
    ]
    answers: list[Any] = [dict(await store.audit.write_many(events)), await store.audit.write(events[0])]
    answers += [
        [event.content_hash for event in await store.audit.search(text=part)] for part in ("A\\B_", "0%", "b?c")
    ]
    answers += [[event.request_id for event in await store.audit.search(risk_label=["NULL", "x"])]]
    answers += [list(await store.audit.stats(["tool_name"], bucket="1h", since=START))]
    for name in ("events.csv", "events.jsonl"):
        await store.audit.export(folder / name)
        answers.append((folder / name).read_text())
    found = await store.audit.get_by_request_id("r-2")
    answers += [found and (found.timestamp, found.risk_score, found.sanitized_args)]
    issued = await store.keys.issue("dev-agent", role="developer", environment="dev")
    answers += [(await store.keys.verify(issued.plaintext)).caller_id, (await store.keys.revoke("dev-agent")).is_active]
    token = await store.approvals.issue_token(make_request(risk_explanation=NASTY))
    answers += [len(await store.approvals.search(text="A\\b_C"))]
    answers += [(await store.approvals.approve(token, "anna", note=NASTY)).status]
    answers += [(await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)).status]
    answers += [len(await store.approvals.list_requests("USED")), await store.approvals.expire_stale()]
    return [*answers, await migrate.differences(store.database.engine)]


async def answers_of(url: str, way: str, folder: Path) -> list[Any]:
    folder.mkdir()
    async with AsyncExitStack() as stack:
        if way == "host's engine":
            engine = create_async_engine(url)
            stack.push_async_callback(engine.dispose)
            store = GatewayStore(engine=engine, redis_url="", auto_migrate=True)
        else:
            store = GatewayStore(
                url + ("?pgbouncer=true" if way == "pgbouncer" else ""), redis_url="", auto_migrate=True
            )
        return await everything(await stack.enter_async_context(store), folder)


@pytest.mark.parametrize("way", ["own", "pgbouncer", "host's engine"])
async def test_the_defaults_of_a_server_change_no_answer(
    postgres_database: Callable[[], str], tmp_path: Path, way: str
) -> None:
    """Migrated, written, searched, counted, exported, decided: what a server with every default answers."""
    usual, changed = postgres_database(), postgres_database()
    await set_defaults(changed, **ALL)
    expected = await answers_of(usual, "own", tmp_path / "usual")
    found = await answers_of(changed, way, tmp_path / "changed")

    assert expected[-1] == []
    assert found == expected


@pytest.mark.skipif(WITH_ICU is None, reason="needs an installed PostgreSQL 15 to 19, for its ICU")
async def test_a_turkish_database_folds_ascii_as_every_other(tmp_path: Path) -> None:
    """There I and i are two letters: what is searched, held and found has both, and the rest as the locale has it."""
    options = "TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'tr-TR' LOCALE 'C'"
    texts = (
        "delete_file",
        "DELETE_FILE",
        "Delete_File",
        "ödeme ID",
        "ÖDEME id",
        "\N{LATIN SMALL LETTER DOTLESS I}s",
        "IS",
    )
    with PostgresServer(binaries=WITH_ICU) as server:
        await execute(server.url, f"CREATE DATABASE turkish {options}")
        url = make_url(server.url).set(database="turkish").render_as_string(hide_password=False)
        async with GatewayStore(url, redis_url="", auto_migrate=True) as store:
            for number, rationale in enumerate(("Ödeme Id", "IS")):
                time = datetime(2025, 1, 1 + number, tzinfo=UTC)
                event = make_event(tool_name="DELETE_FILE", deterministic_rationale=rationale, timestamp=time)
                await store.audit.write(event)
            call = ToolCall(server="s", tool="DELETE_FILE", arguments={})
            await store.approvals.issue_token(make_request(tool_call=call, risk_explanation="Ödeme Id, IS"))
            searched = [len(await store.audit.search(text=each)) for each in texts]
            approvals = [len(await store.approvals.search(text=each)) for each in texts]
            found = [len(await store.retention.find(text=each)) for each in texts]
            await store.retention.hold("case-1", reason="r", by="b", text="delete_file")
            pruned = await store.retention.prune("2025-02-01", by="b", archive=tmp_path / "archive")
            await set_defaults(url, session_replication_role="REPLICA")
            async with store.database.read() as connection:
                off = await where_triggers_are_off(connection)

    assert (searched, approvals, found) == ([2, 2, 2, 1, 1, 1, 1], [1] * 7, [3, 3, 3, 2, 2, 2, 2])
    assert (pruned.events, off) == (0, ["ALTER DATABASE turkish RESET session_replication_role"])


async def test_a_schema_is_compared_for_longer_than_a_session_may_idle(
    migrated_postgres_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends a session that idles in a transaction; comparing takes its time between two statements."""
    url = migrated_postgres_database()
    await set_defaults(url, idle_in_transaction_session_timeout="100ms")
    compare = autogenerate.compare_metadata

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        return compare(*args)

    monkeypatch.setattr(autogenerate, "compare_metadata", slow)
    engine = create_async_engine(url)
    try:
        found = await migrate.differences(engine)
    finally:
        await engine.dispose()

    assert found == []


async def test_our_sessions_do_not_follow_them(postgres_database: Callable[[], str], monkeypatch: Any) -> None:
    url = postgres_database()
    await set_defaults(url, **ALL)
    monkeypatch.setenv("DATABASE_URL", url)
    names = ("transaction_isolation", "TimeZone", "synchronous_commit", "standard_conforming_strings")
    async for session in get_db():
        found = [await session.scalar(text(f"SHOW {name}")) for name in names]

    assert found == ["read committed", "UTC", "on", "on"]


async def test_a_level_of_durability_that_somebody_chose_is_kept(postgres_database: Callable[[], str]) -> None:
    """Only `off` acknowledges what is not on disk; the others say which standby must have it."""
    url = postgres_database()
    await set_defaults(url, synchronous_commit="remote_apply")
    engine = create_engine(url)
    async with engine.connect() as connection:
        found = await connection.scalar(text("SHOW synchronous_commit"))
    await engine.dispose()

    assert found == "remote_apply"


@pytest.mark.parametrize("way", ["host's engine", "pgbouncer"])
async def test_where_we_may_set_nothing_the_log_names_commits_that_are_not_on_disk(
    migrated_postgres_database: Callable[[], str], caplog: pytest.LogCaptureFixture, way: str
) -> None:
    """A session's setting would reach other clients of a pooler, and a host's engine is the host's."""
    url = migrated_postgres_database()
    await set_defaults(url, synchronous_commit="off")
    engine = create_async_engine(url) if way == "host's engine" else None
    with caplog.at_level(logging.WARNING, "agent_gateway_store.storage"):
        async with GatewayStore(None if engine else f"{url}?pgbouncer=true", engine=engine, redis_url=""):
            pass
    if engine:
        await engine.dispose()

    assert "run `ALTER ROLE" in caplog.text
    assert "SET synchronous_commit = on" in caplog.text


@pytest.mark.parametrize("way", ["own", "pgbouncer", "host's engine"])
async def test_writers_of_the_same_events_do_not_conflict(
    migrated_postgres_database: Callable[[], str], way: str
) -> None:
    """Eight stores on a server of that isolation, each with the same events: stored once, none in the spool."""
    url = migrated_postgres_database()
    await set_defaults(url, default_transaction_isolation="serializable")
    engine = create_async_engine(url) if way == "host's engine" else None
    address = url + ("?pgbouncer=true" if way == "pgbouncer" else "")
    events = [make_event() for _ in range(40)]
    async with AsyncExitStack() as stack:
        stores = [
            await stack.enter_async_context(GatewayStore(None if engine else address, engine=engine, redis_url=""))
            for _ in range(8)
        ]
        outcomes = await asyncio.gather(*(store.audit.write(event) for event in events for store in stores))
        token = await stores[0].approvals.issue_token(make_request(required_approvals=8))
        votes = await asyncio.gather(
            *(store.approvals.approve(token, f"approver-{number}") for number, store in enumerate(stores))
        )
        uses = await asyncio.gather(
            *(store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL) for store in stores),
            return_exceptions=True,
        )
        stored = await stores[0].audit.stats()
    if engine:
        await engine.dispose()

    assert {outcome: outcomes.count(outcome) for outcome in WriteOutcome} == {
        WriteOutcome.STORED: 40,
        WriteOutcome.DUPLICATE: 280,
        WriteOutcome.SPOOLED: 0,
        WriteOutcome.LOST: 0,
    }
    assert stored[0]["calls"] == 40
    assert [vote.status for vote in votes].count("APPROVED") == 1
    assert [type(use).__name__ for use in uses].count("ApprovalAlreadyUsedError") == 7


async def test_what_is_set_on_our_connections_is_set_nowhere_else(postgres_database: Callable[[], str]) -> None:
    """Through a pooler (`pgbouncer=true`) no SET is sent, as its next client would get that setting."""
    url = postgres_database()
    await set_defaults(url, TimeZone="Asia/Kathmandu", default_transaction_isolation="serializable")
    engine = create_engine(f"{url}?pgbouncer=true")
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        found = [await driver.fetchval(f"SHOW {name}") for name in ("TimeZone", "default_transaction_isolation")]
    await engine.dispose()

    assert found == ["Asia/Kathmandu", "serializable"]


async def test_no_statement_stays_prepared_for_the_next_client(
    migrated_postgres_database: Callable[[], str],
) -> None:
    """Through a pooler neither a list nor a stream leaves one in a connection to the server."""
    url = migrated_postgres_database()
    await execute(url, "CREATE TABLE held (statement TEXT)")
    async with GatewayStore(f"{url}?pgbouncer=true", redis_url="") as store:

        @event.listens_for(store.database.engine.sync_engine, "checkin")
        def note(connection: Any, _record: Any) -> None:
            # Without arguments, since asyncpg lets go of old ones before it prepares the next.
            look = "INSERT INTO held SELECT statement FROM pg_prepared_statements UNION ALL SELECT 'looked'"
            connection.run_async(lambda driver: driver.execute(look))

        await store.audit.write(make_event())
        await store.keys.list()
        assert len([each async for each in store.audit.stream()]) == 1
        async with store.database.read() as connection:
            held = (await connection.execute(text("SELECT statement FROM held"))).scalars().all()

    assert len(held) >= 2
    assert set(held) == {"looked"}


async def test_a_long_export_outlives_the_servers_limits(
    migrated_postgres_database: Callable[[], str], tmp_path: Path
) -> None:
    """statement_timeout and idle_in_transaction_session_timeout are for short transactions: a slow reader goes on."""
    url = migrated_postgres_database()
    async with GatewayStore(url, redis_url="") as store:
        await store.audit.write_many(make_event() for _ in range(1_500))
        # A view in the way of the table, so that each row takes a millisecond.
        async with store.database.write() as connection:
            await connection.execute(text("ALTER TABLE audit_events RENAME TO stored_events"))
            await connection.execute(
                text("CREATE VIEW audit_events AS SELECT e.* FROM stored_events AS e, pg_sleep(0.001) WHERE e.id > 0")
            )
    await set_defaults(url, statement_timeout="100ms", idle_in_transaction_session_timeout="100ms")
    async with GatewayStore(url, redis_url="") as store:
        read = 0
        async for _ in store.audit.stream():
            read += 1
            if read == 1_000:
                await asyncio.sleep(0.3)
        exported = await store.audit.export(tmp_path / "events.csv")
        counted = await store.audit.stats()
        async with store.database.read() as connection:
            limited = await connection.scalar(text("SHOW statement_timeout"))

    assert (read, exported.rows, counted[0]["calls"], limited) == (1_500, 1_500, 1_500, "100ms")


@pytest.mark.parametrize(
    ("setting", "limit", "statement", "sentence"),
    [
        ("statement_timeout", "50ms", "SELECT pg_sleep(5)", "statement_timeout ended it"),
        ("lock_timeout", "50ms", "SELECT pg_advisory_xact_lock(7)", "lock for too long: end it, or raise lock_timeout"),
        ("temp_file_limit", "64kB", "SELECT x FROM generate_series(1, 300000) x ORDER BY -x", "raise temp_file_limit"),
    ],
)
async def test_a_limit_of_the_server_is_named(
    postgres_database: Callable[[], str], setting: str, limit: str, statement: str, sentence: str
) -> None:
    url = postgres_database()
    holder = await asyncpg.connect(url.replace("+asyncpg", ""))
    await holder.execute("SELECT pg_advisory_lock(7)")
    await set_defaults(url, **{setting: limit})
    async with AsyncExitStack() as stack:
        stack.push_async_callback(holder.close)
        engine = create_engine(url)
        stack.push_async_callback(engine.dispose)
        database = Database(engine, owned=False)
        database.bind_to_loop()
        with pytest.raises(StoreUnavailableError, match=sentence):
            async with database.write() as connection:
                await connection.execute(text(statement))
