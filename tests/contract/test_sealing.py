"""The sealer among writers, other sealers and crashes: dense positions, one log, and nobody who waits for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from contract_helpers import require_one_log, run_script, selected, store_sealed_by_hand
from erasure_helpers import OLD
from plan_helpers import copies
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.archive import Archive
from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.evidence import sealer
from agent_gateway_store.models.evidence import Checkpoint, Finding, FindingKind
from builders import make_event
from servers import connected
from tampering import tamper

store = store_sealed_by_hand

ON_POSTGRES = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)


def settings(seal_s: float = 0) -> StoreSettings:
    return StoreSettings(audit_seal_seconds=seal_s)


@pytest.mark.system
async def test_a_sealer_killed_at_any_statement_leaves_one_log(store: GatewayStore, database_url: str) -> None:
    """kill -9 before each of its statements in turn; each process finds what the one before left."""
    kills = await asyncio.to_thread(run_script, "sealing_process.py", database_url, "kills")
    assert kills >= 8
    await store.evidence.seal()
    assert await require_one_log(store) == 300 * (kills + 1)


@pytest.mark.system
async def test_eight_sealers_at_once_leave_one_log(store: GatewayStore, database_url: str) -> None:
    """In as many processes, beside writers whose transactions stay open and are taken back."""
    await asyncio.to_thread(run_script, "sealing_process.py", database_url, "crowd")
    await store.evidence.seal()
    assert await require_one_log(store) > 0


async def test_an_event_without_a_hash_keeps_nobody_waiting(store: GatewayStore, tmp_path: Path) -> None:
    """Somebody wrote it past the store: it is sealed with the others, found, and told from one that was changed."""
    await store.audit.write_many([make_event(request_id=f"r-{n}", timestamp=OLD) for n in range(4)])
    await tamper(
        store.database.engine,
        "UPDATE audit_events SET content_hash = NULL WHERE request_id = 'r-0'",
        "UPDATE audit_events SET content_hash = 'none' WHERE request_id = 'r-1'",
    )
    last = await store.evidence.seal()
    assert last is not None
    assert last.size == 4
    await tamper(store.database.engine, "UPDATE audit_events SET content_hash = NULL WHERE request_id = 'r-2'")
    in_table = await store.evidence.verify()
    await store.retention.prune("190d", by="x", archive=tmp_path / "archive")
    for found in (in_table, Archive(tmp_path / "archive").verify()):
        assert [(each.kind, each.request_id) for each in found.findings] == [
            (FindingKind.ALTERED, f"r-{n}") for n in range(3)]  # fmt: skip
        is_unhashed = ["had no valid content_hash when it was sealed" in each.text for each in found.findings]
        assert is_unhashed == [True, True, False]


@ON_POSTGRES
async def test_an_id_of_a_transaction_that_was_given_twice_is_found_by_verify(database_url: str) -> None:
    """A crash gives ids out again, below those that a sealer has passed: it misses such an event, `verify` does not."""
    async with GatewayStore(database_url, redis_url="", settings=settings(3_600)) as store:
        await store.audit.write(make_event())
        await store.evidence.seal()
        await store.audit.write(make_event(request_id="late"))
        await tamper(store.database.engine, "UPDATE audit_events SET transaction_id = 4 WHERE request_id = 'late'")
        last = await store.evidence.seal()
        assert last is not None
        assert last.size == 1
        found = await store.evidence.verify()
        assert (found.ok, found.unsealed) == (True, 1)
        assert await require_one_log(store) == 2


@ON_POSTGRES
async def test_ids_of_another_server_do_not_hide_events(store: GatewayStore) -> None:
    """After a dump was restored: ids that this server has not given out yet are sealed, and what comes later is."""
    await store.audit.write_many([make_event(request_id=f"old-{n}") for n in range(3)])
    await tamper(store.database.engine, "UPDATE audit_events SET transaction_id = transaction_id + 1000000")
    await store.evidence.seal()
    await store.audit.write_many([make_event() for _ in range(3)])
    await store.evidence.seal()
    assert await require_one_log(store) == 6


async def test_an_event_in_the_callers_transaction_starts_the_sealer(database_url: str) -> None:
    async with GatewayStore(database_url, redis_url="", settings=settings(0.02)) as store:
        async with store.database.sessions() as session, session.begin():
            await store.audit.record(make_event(), session=session)

        async def is_sealed() -> bool:
            return await store.evidence.checkpoint() is not None

        async with asyncio.timeout(10):
            while not await is_sealed():
                await asyncio.sleep(0.01)


@ON_POSTGRES
async def test_sealing_waits_for_another_sealer_and_the_background_does_not(
    store: GatewayStore, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An open store tries again later, quietly, and closes at once."""
    async with store.database.engine.begin() as connection:
        await connection.execute(text(f"SELECT pg_advisory_xact_lock({sealer.LOCK_KEY})"))
        async with GatewayStore(database_url, redis_url="", settings=settings(0.01)) as other:
            await other.audit.write(make_event())
            waiting = asyncio.create_task(store.evidence.seal())
            await asyncio.sleep(0.2)
            assert not waiting.done()
            started = time.monotonic()
        assert time.monotonic() - started < 1
    checkpoint = await waiting
    assert checkpoint is not None
    assert checkpoint.size == 1
    assert caplog.records == []


@ON_POSTGRES
async def test_closing_waits_a_second_at_most_for_a_seal(store: GatewayStore, database_url: str) -> None:
    """What is not sealed then is sealed by the next one."""
    async with store.database.engine.begin() as connection:
        await connection.execute(text("LOCK TABLE audit_leaves IN EXCLUSIVE MODE"))
        other = await GatewayStore(database_url, redis_url="", settings=settings(0.01)).open()
        await other.audit.write(make_event())
        waiting = (
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'audit_leaves'::regclass "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        async with asyncio.timeout(10):
            while (await connection.execute(text(waiting))).scalar() == 0:
                await asyncio.sleep(0.01)
        started = time.monotonic()
        await other.close()
        assert time.monotonic() - started < 2.5
    await store.evidence.seal()
    assert await require_one_log(store) == 1


@ON_POSTGRES
async def test_who_may_not_write_seals_nothing_and_hears_nothing(
    store: GatewayStore, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A role without the grants writes events, and leaves it to others to seal them; it verifies as it is."""
    caplog.set_level(logging.INFO, "agent_gateway_store")
    engine = store.database.engine
    async with engine.begin() as connection:
        for statement in PLAIN_ROLE:
            await connection.execute(text(statement))
    try:
        async with reader(database_url, {"role": "plain"}, 0.01) as other:
            assert await other.audit.write(make_event()) == "STORED"
            await asyncio.sleep(0.1)
            assert (await other.evidence.verify()).unsealed == 1
    finally:
        async with engine.begin() as connection:
            await connection.execute(text("DROP OWNED BY plain"))
            await connection.execute(text("DROP ROLE plain"))
    assert [record for record in caplog.records if record.name.endswith((".evidence", ".checkpoints"))] == []
    assert await selected(store, "SELECT * FROM audit_leaves") == []


@ON_POSTGRES
async def test_a_server_that_only_reads_verifies(store: GatewayStore, database_url: str) -> None:
    """As a standby does: what is not sealed is said, and nothing is written."""
    await store.audit.write(make_event())
    async with reader(database_url, {"default_transaction_read_only": "on"}, 0.01) as other:
        found = await other.evidence.verify()
        assert (found.ok, found.unsealed) == (True, 1)
        with pytest.raises(StoreUnavailableError):
            await other.evidence.seal()


PLAIN_ROLE = (
    "CREATE ROLE plain",
    "GRANT INSERT, SELECT ON ALL TABLES IN SCHEMA public TO plain",
    "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO plain",
    "REVOKE INSERT ON audit_leaves FROM plain",
)


@asynccontextmanager
async def reader(url: str, options: dict[str, str], seal_s: float) -> AsyncIterator[GatewayStore]:
    """A store on an engine whose connections have these options of the server."""
    engine = create_async_engine(
        make_url(url).set(drivername="postgresql+asyncpg"), connect_args={"server_settings": options}
    )
    try:
        async with GatewayStore(engine=engine, redis_url="", settings=settings(seal_s)) as opened:
            yield opened
    finally:
        await engine.dispose()


@pytest.mark.system
async def test_verifying_among_sealers_gives_no_false_alarm(store: GatewayStore, database_url: str) -> None:
    """It sees one moment of the log, whatever is sealed meanwhile."""
    kept: list[Checkpoint] = []
    async with GatewayStore(database_url, redis_url="", settings=settings()) as other:
        done = False

        async def go_on() -> None:
            while not done:
                await other.audit.write_many([make_event() for _ in range(300)])
                kept.extend(filter(None, [await other.evidence.seal()]))

        writing = asyncio.create_task(go_on())
        findings: list[Finding] = []
        for _ in range(15):
            found = await store.evidence.verify(against=kept[-3:])
            findings += found.findings
        done = True
        await writing
    assert findings == []


@pytest.mark.parametrize("has_statistics", [False, True])
async def test_the_sealer_reads_by_indexes(
    migrated_postgres_database: Callable[[], str], has_statistics: bool, no_plugins: None
) -> None:
    """With and without statistics: nothing that grows with the log is read whole."""
    # A database of its own, which neither an earlier test nor the server itself has analysed.
    url = migrated_postgres_database()
    async with GatewayStore(url, redis_url="", settings=settings(0)) as store:
        for table in ("audit_events", "audit_leaves"):
            async with store.database.write() as connection:
                await connection.exec_driver_sql(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
        # A small log that was never analysed is read whole, as the planner takes an index to cost more.
        await store.audit.write(make_event())
        async with connected(url) as connection:
            count = 8_000 if has_statistics else 32_000
            await connection.execute(copies("audit_events", count, request_id="'event-' || n"))
        await store.evidence.seal()
        values = dict.fromkeys(("p_since", "p_transaction"), 10**9) | {"p_end": 2 * 10**9}
        (values["p_after"],) = (await selected(store, "SELECT min(id) + 4000 FROM audit_events"))[0]
        values |= {"p_until": values["p_after"] + 1_000, "p_span": 1_000, "p_limit": 500}
        async with store.database.engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            if has_statistics:
                await driver.execute("ANALYZE audit_events; ANALYZE audit_leaves")
            for statement in (sealer.SPAN_END, sealer.COMPARE, sealer.RECENT, sealer.SNAPSHOT):
                compiled = statement.compiled(store.database.engine.dialect)
                plan = await driver.fetch(f"EXPLAIN {compiled.text}", *compiled.arguments(values))
                text_of_plan = "\n".join(line for (line,) in plan)
                assert "Seq Scan on audit_" not in text_of_plan, text_of_plan
