"""`AuditLogger(session)` and `AuditQuery(session)`: for a gateway that owns its session."""

from __future__ import annotations

import logging

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from agent_gateway_store import AuditLogger, AuditQuery
from agent_gateway_store.storage.database import create_engine
from builders import make_event


async def count(engine: AsyncEngine) -> int:
    """Return how many events another connection sees."""
    async with engine.connect() as connection:
        return int((await connection.execute(text("SELECT count(*) FROM audit_events"))).scalar_one())


async def test_write_commits(session: AsyncSession, engine: AsyncEngine) -> None:
    """After `write` another connection sees the event; a second time it is a duplicate."""
    event = make_event()

    assert await AuditLogger(session).write(event) == "STORED"
    assert not session.in_transaction()
    assert await count(engine) == 1
    assert await AuditLogger(session).write(event) == "DUPLICATE"
    assert event.id is None
    assert event not in session


async def test_query_finds_what_was_written(session: AsyncSession) -> None:
    """The four methods give detached events, newest first, readable after the session is closed."""
    logger, query = AuditLogger(session), AuditQuery(session)
    for number in range(3):
        await logger.write(make_event(request_id=f"r-{number}", decision=["ALLOW", "DENY"][number % 2]))
    found = await query.get_by_request_id("r-1")
    pages = [
        await query.list_recent(limit=2),
        await query.list_by_caller("dev-agent", limit=5, offset=1),
        await query.list_by_decision("DENY"),
    ]
    await session.close()

    assert found is not None
    assert found.request_id == "r-1"
    assert [[event.request_id for event in page] for page in pages] == [["r-2", "r-1"], ["r-1", "r-0"], ["r-1"]]


async def test_query_of_one_organisation(session: AsyncSession) -> None:
    """`org_id` limits what a query sees."""
    for org_id in ("acme", "globex"):
        await AuditLogger(session).write(make_event(request_id="r-1", org_id=org_id))

    assert [event.org_id for event in await AuditQuery(session, org_id="acme").list_recent()] == ["acme"]
    assert len(await AuditQuery(session).list_recent()) == 2


async def test_query_leaves_the_transaction_alone(session: AsyncSession) -> None:
    """Reading neither commits nor rolls back what the caller has under way."""
    await session.execute(text("DELETE FROM audit_events"))
    await AuditQuery(session).list_recent()

    assert session.in_transaction()


async def test_lost_event_is_logged_whole(
    session: AsyncSession, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """What the database refuses is LOST without an error, is logged at CRITICAL, and the session works on."""
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE audit_events RENAME TO hidden_events"))
    try:
        assert await AuditLogger(session).write(make_event(request_id="lost-one")) == "LOST"
    finally:
        async with engine.begin() as connection:
            await connection.execute(text("ALTER TABLE hidden_events RENAME TO audit_events"))

    (record,) = [record for record in caplog.records if record.name == "agent_gateway_store.audit.lost"]
    assert record.levelno == logging.CRITICAL
    assert '"request_id": "lost-one"' in record.getMessage()
    assert await AuditLogger(session).write(make_event()) == "STORED"


async def test_broken_session_does_not_lose_the_next_event(session: AsyncSession, engine: AsyncEngine) -> None:
    """A session whose transaction has failed loses at most the write that meets it, raises nothing, and is mended."""
    with pytest.raises(Exception, match="no_such_table"):
        await session.execute(text("SELECT * FROM no_such_table"))
    outcomes = [str(await AuditLogger(session).write(make_event())) for _ in range(2)]

    assert outcomes[0] in ("STORED", "LOST")
    assert outcomes[1] == "STORED"
    assert await count(engine) == outcomes.count("STORED")


async def test_database_that_is_gone_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A server that does not answer costs the pipeline no error."""
    engine = create_engine("postgresql://nobody:s3cret-pass@127.0.0.1:1/none")
    async with AsyncSession(engine) as session:
        assert await AuditLogger(session).write(make_event()) == "LOST"
    await engine.dispose()

    assert "LOST audit event" in caplog.text
    assert "s3cret-pass" not in caplog.text


async def test_closed_connection_raises_nothing(session: AsyncSession, engine: AsyncEngine) -> None:
    """A connection that died under the session costs one event at most; the session finds another one."""
    connection = await session.connection()
    driver = (await connection.get_raw_connection()).driver_connection
    assert driver is not None
    await driver.close()

    outcomes = [str(await AuditLogger(session).write(make_event())) for _ in range(3)]

    assert set(outcomes) <= {"STORED", "LOST"}
    assert outcomes[-1] == "STORED"
    assert await count(engine) == outcomes.count("STORED")


async def test_hostile_event_is_stored(session: AsyncSession) -> None:
    """NUL, lone surrogates and NaN keep no event out here either."""
    event = make_event(request_id="\0\ud800", sanitized_args={"a\0": float("nan")}, risk_score=float("nan"))

    assert await AuditLogger(session).write(event) == "STORED"
    assert await AuditQuery(session).get_by_request_id("\0\ud800") is not None
