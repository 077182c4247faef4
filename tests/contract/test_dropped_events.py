"""A trigger of the table's owner that drops events without an error: none of them is said to be stored."""

from __future__ import annotations

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store import GatewayStore, StoreSettings, WriteOutcome
from agent_gateway_store.audit.record import encode_event, to_values
from agent_gateway_store.audit.spool import Spool
from agent_gateway_store.errors import AuditUnavailableError, StoreUnavailableError
from builders import make_event
from proofs.harness import identity_of, spooled_ids, stored_ids

STORED, DUPLICATE, SPOOLED = WriteOutcome.STORED, WriteOutcome.DUPLICATE, WriteOutcome.SPOOLED
DROPPING = {
    "sqlite": ["CREATE TRIGGER lose BEFORE INSERT ON audit_events WHEN {} BEGIN SELECT RAISE(IGNORE); END"],
    "postgresql": [
        "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
        "CREATE TRIGGER lose BEFORE INSERT ON audit_events FOR EACH ROW WHEN ({}) EXECUTE FUNCTION lose()",
    ],
}


@pytest.fixture
async def dropping_url(own_database_url: str) -> str:
    """The URL of a database of this test's own that drops every event of `mallory`."""
    async with GatewayStore(own_database_url, redis_url="") as store, store.database.write() as connection:
        for statement in DROPPING[store.database.dialect]:
            await connection.execute(text(statement.format("NEW.caller_id = 'mallory'")))
    return own_database_url


async def test_a_dropped_event_is_set_aside(dropping_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Alone and in a batch, whose others are stored, or known; `write` does not raise, so the log says what to do."""
    settings, known = StoreSettings(), make_event(request_id="known", caller_id="bob")
    async with GatewayStore(dropping_url, redis_url="", settings=settings) as store:
        assert await store.audit.write(make_event(request_id="alone", caller_id="mallory")) is SPOOLED
        assert "find the trigger on audit_events" in caplog.text
        assert "it is quarantined" in caplog.text
        events = [make_event(request_id=f"r-{number}", caller_id=("bob", "mallory")[number % 2]) for number in range(6)]
        assert await store.audit.write_many(events) == {STORED: 3, SPOOLED: 3}
        await store.audit.write(known)
        events = [make_event(request_id=f"r-{number}", caller_id=("bob", "mallory")[number % 2]) for number in (6, 7)]
        assert await store.audit.write_many([known, *events]) == {DUPLICATE: 1, STORED: 1, SPOOLED: 1}

        caplog.clear()
        spool = Spool(settings.audit_spool_path, make_url(dropping_url), await identity_of(dropping_url))
        await spool.add([to_values(encode_event(make_event(request_id="late", caller_id="mallory")))])
        await spool.close()
        assert await store.audit.flush() == 0
        assert "find the trigger on audit_events" in caplog.text

        assert sorted(await stored_ids(store)) == ["known", "r-0", "r-2", "r-4", "r-6"]
    assert spooled_ids(settings.audit_spool_path, poisoned=True) == ["alone", "r-1", "r-3", "r-5", "r-7", "late"]


async def test_a_dropped_event_stops_the_call_in_the_strict_mode(
    dropping_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    dropped = make_event(caller_id="mallory")
    async with GatewayStore(dropping_url, redis_url="", settings=StoreSettings(audit_mode="strict")) as store:
        with pytest.raises(AuditUnavailableError):
            await store.audit.write(dropped)
        with pytest.raises(AuditUnavailableError):
            await store.audit.write_many([dropped, make_event(caller_id="bob")])
        async with AsyncSession(store.database.engine) as session:
            with pytest.raises(StoreUnavailableError, match="find the trigger on audit_events"):
                await store.audit.record(dropped, session=session)

    assert "find the trigger on audit_events" in caplog.text
    assert "quarantine" not in caplog.text
