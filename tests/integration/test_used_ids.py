"""A copy without its sequences gives ids that are in use: an outage, said in one sentence, until that is mended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from database_helpers import translated

import servers
from agent_gateway_store import GatewayStore, StoreSettings, WriteOutcome
from agent_gateway_store.errors import StoreUnavailableError
from builders import make_event, make_request
from commands import gateway_store
from proofs.harness import execute

pytestmark = pytest.mark.system

SEQUENCES = "SELECT sequencename FROM pg_sequences WHERE schemaname = 'public'"
OLD = datetime(2025, 3, 1, 12, tzinfo=UTC)


async def restart_sequences(url: str) -> None:
    """Let every sequence begin again, as in a subscriber of logical replication that is promoted."""
    async with servers.connected(url) as driver:
        for (name,) in await driver.fetch(SEQUENCES):
            await driver.execute(f"ALTER SEQUENCE {name} RESTART")


async def fill(url: str) -> None:
    """Write a row or more to each table."""
    async with GatewayStore(url, redis_url="") as store:
        await store.audit.write_many(make_event() for _ in range(3))
        await store.keys.issue("earlier", role="r")
        await store.approvals.approve(await store.approvals.issue_token(make_request()), "alice")
        # More than are tried when others seem to be in the way.
        await asyncio.gather(*(store.approvals.issue_token(make_request(caller_id=f"c{n}")) for n in range(20)))
    await restart_sequences(url)


@pytest.fixture
def url(migrated_postgres_database: Callable[[], str]) -> Iterator[str]:
    """A database with rows in its tables, whose sequences begin again, and whose errors are in another language."""
    made = migrated_postgres_database()
    servers.run(fill(made))
    with translated(made) as there:
        yield there


async def begin_at(url: str, number: int, *tables: str) -> None:
    """Let the ids of these tables go on from a number."""
    await execute(url, *(f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), {number})" for table in tables))


async def test_what_would_get_a_used_id_is_refused_as_in_an_outage(url: str) -> None:
    """It is not taken for a key, a vote, or an event that is there already; events wait in the spool."""
    async with GatewayStore(url, redis_url="") as store:
        events = [make_event() for _ in range(3)]

        async def refused(work: Awaitable[Any]) -> None:
            with pytest.raises(StoreUnavailableError, match=r"ids that are in use.*db restored"):
                await work

        await begin_at(url, 1000, "audit_events")
        assert await store.audit.write(make_event()) is WriteOutcome.STORED
        await restart_sequences(url)
        assert await store.audit.write(events[0]) is WriteOutcome.SPOOLED
        assert await store.audit.write_many(events[1:]) == {WriteOutcome.SPOOLED: 2}
        await restart_sequences(url)
        await refused(store.retention.hold("case", reason="r", by="counsel"))
        await refused(store.keys.issue("new", role="r"))
        await begin_at(url, 1000, "notification_deliveries")
        for ask in (store.approvals.issue_token, store.approvals.acquire):
            await begin_at(url, 1, "approval_requests")
            await refused(ask(make_request(request_id="new", caller_id="new")))
        await begin_at(url, 1000, "approval_requests", "notification_deliveries")
        request = make_request(request_id="waits")
        token = await store.approvals.issue_token(request)
        await restart_sequences(url)
        await refused(store.approvals.approve(token, "alice"))
        await refused(store.approvals.deny(token, "alice"))
        assert await store.audit.search(request_id=[each.request_id for each in events]) == []
        assert (await store.approvals.get(approval_id=request.approval_id)).status == "PENDING"


async def test_an_event_is_never_given_the_id_of_one_that_was_pruned(url: str) -> None:
    """Its leaf is still there, so the new event would never be sealed, and look altered."""
    async with GatewayStore(url, redis_url="", settings=StoreSettings(audit_seal_seconds=0)) as store:
        await begin_at(url, 1000, "audit_events")
        await store.audit.write_many(make_event(timestamp=OLD) for _ in range(5))
        await store.audit.write(make_event())
        await store.evidence.seal()
        assert (await store.retention.prune("400d", by="ops", discard=True)).events == 5
    await begin_at(url, 1000, "audit_events")
    async with GatewayStore(url, redis_url="") as store:
        assert await store.audit.write(make_event()) is WriteOutcome.SPOOLED
        assert (await store.evidence.verify()).ok


def test_doctor_names_the_tables_and_db_restored_mends_them(url: str) -> None:
    """Afterwards new rows are taken."""
    ill = gateway_store("--database-url", url, "doctor", "--json")

    assert ill.code == 1
    assert ill.json["database"]["ids_in_use"] == [
        "api_keys",
        "approval_requests",
        "approval_votes",
        "audit_events",
        "notification_deliveries",
    ]
    (problem,) = ill.json["problems"]
    assert "approval_votes, audit_events" in problem

    assert gateway_store("--database-url", url, "db", "restored", "--by", "ops").code == 0

    assert gateway_store("--database-url", url, "doctor", "--json").json["database"]["ids_in_use"] == []
    written = gateway_store("--database-url", url, "keys", "issue", "new", "--role", "r")
    assert written.code == 0, written.err


DOCS = Path(__file__).parents[2] / "docs"


async def test_the_largest_of_all_ids_is_told_and_mended_as_the_page_says(url: str) -> None:
    """Whoever may choose an id can take the last one; nothing that was written meanwhile is lost."""
    await begin_at(url, 1000, "audit_events")
    async with GatewayStore(url, redis_url="", settings=StoreSettings(audit_seal_seconds=0)) as store:
        columns = "jsonb_populate_record(event, jsonb_build_object('id', 9223372036854775807, 'request_id', 'bait'))"
        await execute(url, f"INSERT INTO audit_events SELECT ({columns}).* FROM audit_events AS event LIMIT 1")
        await store.evidence.seal()
    async with GatewayStore(url, redis_url="", settings=StoreSettings(audit_seal_seconds=0)) as store:
        assert await store.audit.write(make_event(request_id="waits")) is WriteOutcome.SPOOLED
        restored = await asyncio.to_thread(gateway_store, "--database-url", url, "db", "restored", "--by", "ops")
        assert restored.code == 5
        assert "Give that row the next id of the sequence" in restored.err
        found = (await store.evidence.verify()).findings
        assert [each.request_id for each in found if "no store gives one so high" in each.text] == ["bait"]

        page = (DOCS / "how-to" / "postgresql-and-redis.md").read_text()
        async with servers.connected(url) as driver:
            await driver.execute(page.partition("### Where no id is left")[2].split("```")[1].removeprefix("sql"))
        assert await store.audit.flush() == 0
        assert await store.audit.write(make_event()) is WriteOutcome.STORED
        await store.evidence.seal()
        assert (await store.audit.get_by_request_id("waits")) is not None
        found = (await store.evidence.verify()).findings
        assert not [each for each in found if "no store gives" in each.text]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT setval('audit_events_id_seq', max(id) + 1, false) FROM audit_events",
        "ALTER SEQUENCE audit_events_id_seq RESTART WITH 1000000",
        "ALTER SEQUENCE audit_events_id_seq INCREMENT BY 2 RESTART WITH 10",
        "ALTER SEQUENCE audit_events_id_seq CACHE 50 RESTART WITH 2000",
    ],
)
async def test_a_sequence_that_an_operator_has_moved_is_well(url: str, statement: str) -> None:
    """Events are taken, and `db restored` sets nothing back. In steps of 2, a peer has the ids between."""
    await begin_at(url, 999, "audit_events")
    async with GatewayStore(url, redis_url="") as store:
        await store.audit.write(make_event())
    await execute(url, statement)
    async with GatewayStore(url, redis_url="") as store:
        assert await store.audit.write(make_event()) is WriteOutcome.STORED
    async with servers.connected(url) as driver:
        reached = await driver.fetchval("SELECT last_value FROM audit_events_id_seq")
        restored = await asyncio.to_thread(gateway_store, "--database-url", url, "db", "restored", "--by", "ops")
        assert restored.code == 0
        assert await driver.fetchval("SELECT last_value FROM audit_events_id_seq") >= reached
