"""Audit events by `store.audit`, and by a session of the gateway's: what is written is found again, in order."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
from contract_helpers import POSTGRES
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from agent_gateway_store import (
    AuditEvent,
    AuditLogger,
    AuditQuery,
    GatewayStore,
    RedactionFlag,
    errors,
)
from agent_gateway_store.storage.database import create_engine
from builders import make_event, rehash
from cases import cases

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


async def test_event_reads_back_as_it_was_written(store: GatewayStore) -> None:
    """Every field is kept; the object handed in is neither changed nor attached to a session."""
    event = make_event(
        request_id="r-1",
        org_id="acme",
        trace_id="t-1",
        session_id="s-1",
        parent_request_id="r-0",
        timestamp=datetime(2026, 1, 2, 13, 30, 0, 123456, tzinfo=timezone(timedelta(hours=1))),
        key_id="k-1",
        sanitized_args={"path": "/tmp", "n": [1, 2.5, None, {"deep": True}], "ü": "ß"},
        risk_labels=["pii", "write"],
        risk_score=0.123456789012345,
        policy_version="v1",
        decision="SANITIZE_AND_ALLOW",
        approver_id="approver-1",
        execution_status="TOOL_ERROR",
        latency_ms=2**40,
        output_hash="0" * 64,
        output_decision="REDACT",
        output_policy_rationale="why",
        redaction_flags=[RedactionFlag(field="sanitized_args.path", reason="SECRET", original_hash="1" * 64)],
        llm_explanation="text",
        approval_id=UUID(int=7),
        extra={"span": "s-1", "tokens": {"in": 12, "ü": [None]}},
    )
    before = event.model_copy(deep=True)

    assert await store.audit.write(event) == "STORED"
    found = await store.audit.get_by_request_id("r-1")
    assert found is not None
    assert found.model_dump(exclude={"id", "content_hash"}) == event.model_dump(exclude={"id", "content_hash"})
    assert found.id is not None
    assert found.content_hash == rehash(found)
    assert type(found.approval_id) is UUID
    assert found.timestamp == datetime(2026, 1, 2, 12, 30, 0, 123456, tzinfo=UTC)
    assert (event, event.id, event.content_hash) == (before, None, None)


async def test_hostile_event_is_stored_and_flagged(store: GatewayStore) -> None:
    """What no database holds does not keep an event out: it is replaced visibly and noted."""
    deep: dict[str, object] = {}
    for _ in range(300):
        deep = {"d": deep}
    event = make_event(
        request_id="r\0\ud800",
        sanitized_args={"nul\0": "\udfff", "nan": float("nan"), "big": 10**400, "deep": deep},
        risk_score=float("inf"),
        latency_ms=10**30,
        timestamp=datetime.max,
        risk_labels=["\0"],
        tool_name="x" * 100_000,
    )

    assert await store.audit.write(event) == "STORED"
    assert await store.audit.write(event) == "DUPLICATE"
    found = await store.audit.get_by_request_id("r\0\ud800")
    assert found is not None
    assert {"request_id", "tool_name", "risk_score", "latency_ms"} <= {flag.field for flag in found.redaction_flags}
    assert {flag.reason for flag in found.redaction_flags} == {"UNSTORABLE"}
    assert found.sanitized_args["big"].startswith("$")


async def test_listings_are_newest_first(store: GatewayStore) -> None:
    """By timestamp, and where that is equal by the order of writing, newest first."""
    for number, minutes in enumerate((5, 0, 9, 5, 5)):
        event = make_event(request_id=f"r-{number}", timestamp=NOON + timedelta(minutes=minutes))
        await store.audit.write(event)

    expected = ["r-2", "r-4", "r-3", "r-0", "r-1"]
    assert [event.request_id for event in await store.audit.list_recent()] == expected
    assert [event.request_id for event in await store.audit.list_by_caller("dev-agent")] == expected
    assert [event.request_id for event in await store.audit.list_by_decision("ALLOW")] == expected
    assert [event.request_id for event in await store.audit.list_recent(limit=2)] == expected[:2]
    pages = [await store.audit.list_by_caller("dev-agent", limit=2, offset=offset) for offset in (0, 2, 4, 6)]
    assert [[event.request_id for event in page] for page in pages] == [expected[:2], expected[2:4], expected[4:], []]


async def test_listings_filter(store: GatewayStore) -> None:
    """By caller and by decision; a page is a list that renders."""
    await store.audit.write(make_event(request_id="r-1", caller_id="a", decision="DENY"))
    await store.audit.write(make_event(request_id="r-2", caller_id="b"))

    (found,) = page = await store.audit.list_by_caller("a")
    assert (found.request_id, ">r-1</td>" in page._repr_html_()) == ("r-1", True)
    assert await store.audit.list_by_decision("DENY") == page
    assert (await store.audit.list_by_caller("nobody"), await store.audit.get_by_request_id("nothing")) == ([], None)
    assert await store.audit.get(found.id or 0) == found
    assert [await store.audit.get(absent) for absent in (10**6, 0, -1, 2**80)] == [None] * 4


@POSTGRES
@cases(
    ("name", "arguments", "says"),
    [
        ("list_recent", {"limit": -1}, "zero or more"),
        ("list_by_caller", {"caller_id": "a", "limit": -1}, "zero or more"),
        ("list_by_caller", {"caller_id": "a", "offset": -1}, "zero or more"),
        ("list_by_decision", {"decision": "MAYBE"}, "MAYBE"),
    ],
)
async def test_wrong_arguments_are_refused(store: GatewayStore, name: str, arguments: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        await getattr(store.audit, name)(**arguments)


@POSTGRES
async def test_what_is_no_event_is_a_type_error(store: GatewayStore) -> None:
    """A dict, an event where many are expected (Pydantic yields its fields), one that was built without validation."""
    audit: Any = store.audit
    for given, says in (
        (make_event().model_dump(), "not dict"),
        (None, "not NoneType"),
        (AuditEvent.model_construct(request_id="r"), "not AuditEvent without 'caller_id'"),
    ):
        with pytest.raises(TypeError, match=f"The event must be a whole AuditEvent, {says}"):
            await audit.write(given)
    with pytest.raises(TypeError, match="not tuple"):
        await audit.write_many(make_event())

    assert await store.audit.list_recent() == []


async def test_record_raises_what_went_wrong(store: GatewayStore) -> None:
    """Unlike `write`, `record` raises: the caller's transaction must not be committed without its event."""
    engine = store.database.engine
    async with AsyncSession(engine) as session:
        connection = await session.connection()
        await connection.exec_driver_sql("ALTER TABLE audit_events RENAME TO hidden_events")
        with pytest.raises(errors.SchemaOutOfDateError, match="db upgrade"):
            await store.audit.record(make_event(), session=session)
        await session.rollback()

    assert await store.audit.write(make_event()) == "STORED"


async def count(engine: AsyncEngine) -> int:
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
    await logger.write(make_event(request_id="r-0", org_id="acme"))
    pages = [
        [await query.get_by_request_id("r-1")],
        await query.list_recent(limit=2),
        await query.list_by_caller("dev-agent", limit=5, offset=2),
        await query.list_by_decision("DENY"),
        await AuditQuery(session, org_id="acme").list_recent(),
    ]
    await session.close()

    expected = [["r-1"], ["r-0", "r-2"], ["r-1", "r-0"], ["r-1"], ["r-0"]]
    assert [[event and event.request_id for event in page] for page in pages] == expected


@POSTGRES
async def test_lost_event_is_logged_whole(
    session: AsyncSession, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """What the database refuses is LOST without an error, is logged at CRITICAL, and the session works on."""
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE audit_events RENAME TO hidden_events"))
    assert await AuditLogger(session).write(make_event(request_id="lost-one")) == "LOST"
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE hidden_events RENAME TO audit_events"))

    (record,) = [record for record in caplog.records if record.name == "agent_gateway_store.audit.lost"]
    assert record.levelno == logging.CRITICAL
    assert '"request_id": "lost-one"' in record.getMessage()
    assert await AuditLogger(session).write(make_event()) == "STORED"


@pytest.mark.parametrize("fault", ["failed transaction", "closed connection"])
async def test_a_broken_session_loses_no_later_event(session: AsyncSession, engine: AsyncEngine, fault: str) -> None:
    """It loses at most the write that meets the fault, raises nothing, and is mended, or finds another connection."""
    if fault == "failed transaction":
        with pytest.raises(Exception, match="no_such_table"):
            await session.execute(text("SELECT * FROM no_such_table"))
    else:
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        await driver.close()
    outcomes = [str(await AuditLogger(session).write(make_event())) for _ in range(3)]

    assert outcomes[0] in ("STORED", "LOST")
    assert outcomes[-1] == "STORED"
    assert await count(engine) == outcomes.count("STORED")


async def test_database_that_is_gone_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    engine = create_engine("postgresql://nobody:s3cret-pass@127.0.0.1:1/none")
    async with AsyncSession(engine) as session:
        assert await AuditLogger(session).write(make_event()) == "LOST"
    await engine.dispose()

    assert "LOST audit event" in caplog.text
    assert "s3cret-pass" not in caplog.text
