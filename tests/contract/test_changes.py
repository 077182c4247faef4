"""Following the log: every event once, in the order of commits, whatever stays open meanwhile."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from contract_helpers import POSTGRES
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from agent_gateway_store import AuditEvent, GatewayStore, errors
from agent_gateway_store.audit.doors import renew_identity
from agent_gateway_store.storage.pagination import decode, encode
from builders import make_event
from tampering import tamper


def opened(cursor: str) -> tuple[bytes, dict[str, Any]]:
    scope = base64.urlsafe_b64decode(cursor + "==")[1:9]
    return scope, json.loads(decode(scope, cursor))


def ids(events: list[AuditEvent]) -> list[str]:
    return [event.request_id for event in events]


async def test_what_commits_late_is_not_missed(store: GatewayStore) -> None:
    """It comes when it is committed, and those after it do not wait; one that is rolled back never comes."""
    start = (await store.audit.changes()).next_cursor or ""
    slow = AsyncSession(store.database.engine)
    is_sqlite = store.database.dialect == "sqlite"
    await store.audit.record(make_event(request_id="slow"), session=slow)
    if is_sqlite:
        await slow.commit()  # one writer at a time
    await store.audit.write(make_event(request_id="fast-1"))
    first = await store.audit.changes(start)
    await store.audit.write(make_event(request_id="fast-2"))
    second = await store.audit.changes(first.next_cursor or "")
    await slow.commit()
    await store.audit.record(make_event(request_id="undone"), session=slow)
    await slow.rollback()
    await slow.close()
    third = await store.audit.changes(second.next_cursor or "")
    fourth = await store.audit.changes(third.next_cursor or "")

    assert ids(first) + ids(second) + ids(third) == (
        ["slow", "fast-1", "fast-2"] if is_sqlite else ["fast-1", "fast-2", "slow"]
    )
    assert (list(fourth), bool(fourth.next_cursor)) == ([], True)


async def test_changes_can_be_narrowed_by_time(store: GatewayStore) -> None:
    """`since` and `until` are those of the events, from the beginning and from a cursor."""
    bounds: dict[str, Any] = {"since": datetime(2000, 1, 1, tzinfo=UTC), "until": datetime(2100, 1, 1, tzinfo=UTC)}
    later = bounds["until"]
    await store.audit.write_many([make_event(request_id="old"), make_event(request_id="old late", timestamp=later)])
    first = await store.audit.changes("beginning", **bounds)
    await store.audit.write_many([make_event(request_id="new"), make_event(request_id="new late", timestamp=later)])
    second = await store.audit.changes(first.next_cursor, **bounds)

    assert (ids(first), ids(second)) == (["old"], ["new"])


async def test_pages_of_changes_lead_on(store: GatewayStore) -> None:
    """In pages of any size, from the beginning or from now, filtered or not: each once; a cursor can be used twice."""
    await store.audit.write_many(
        make_event(request_id=f"old-{n}", decision="DENY" if n % 2 else "ALLOW") for n in range(9)
    )
    now = (await store.audit.changes(None, decision="DENY")).next_cursor
    await store.audit.write_many(
        make_event(request_id=f"new-{n}", decision="DENY" if n % 2 else "ALLOW") for n in range(9)
    )

    async def walk(cursor: str | None) -> list[str]:
        seen: list[str] = []
        for _ in range(30):
            page = await store.audit.changes(cursor, limit=2, decision="DENY")
            seen += ids(page)
            cursor = page.next_cursor
        return seen

    new = [f"new-{n}" for n in (1, 3, 5, 7)]
    assert await walk(now) == await walk(now) == new
    assert await walk("beginning") == [f"old-{n}" for n in (1, 3, 5, 7)] + new


async def test_rows_from_before_the_column_are_history(store: GatewayStore) -> None:
    """An event without a transaction id (from before migration 0002) comes from the beginning, and is never new."""
    await store.audit.write(make_event(request_id="old"))
    await tamper(store.database.engine, "UPDATE audit_events SET transaction_id = NULL")
    now = (await store.audit.changes()).next_cursor or ""
    await store.audit.write(make_event(request_id="new"))

    assert ids(await store.audit.changes(now)) == ["new"]
    assert ids(await store.audit.changes("beginning")) == ["old", "new"]


async def test_cursors_of_earlier_versions_lead_on(store: GatewayStore) -> None:
    """A cursor without the newest event passed, which earlier versions handed out: from now, and between two pages."""
    await store.audit.write_many(make_event(request_id=f"old-{n}") for n in range(3))
    cursors = []
    for page in (await store.audit.changes(), await store.audit.changes("beginning", limit=2)):
        scope, place = opened(page.next_cursor or "")
        assert place.pop("mark")[0]
        assert place.pop("database")
        cursors.append(encode(scope, json.dumps(place, separators=(",", ":")).encode()))
    await store.audit.write(make_event(request_id="new"))

    assert ids(await store.audit.changes(cursors[0])) == ["new"]
    walk = await store.audit.changes(cursors[1])
    assert ids(walk) + ids(await store.audit.changes(walk.next_cursor)) == ["old-2", "new"]
    await renew_identity(store.database.engine, by="ann", environment="test")
    for cursor in cursors:
        with pytest.raises(errors.InvalidCursorError, match="before `gateway-store db restored`"):
            await store.audit.changes(cursor)


async def test_a_log_that_lost_the_newest_event_passed_refuses_the_cursor(store: GatewayStore) -> None:
    """Deleted, or lost with a restored copy: what has its ids now may be new, so that the cursor cannot lead on."""
    empty = (await store.audit.changes()).next_cursor
    await store.audit.write_many(make_event(request_id=f"old-{n}") for n in range(3))
    kept = (await store.audit.changes()).next_cursor
    await store.audit.write(make_event(request_id="lost"))
    cursor = (await store.audit.changes(kept)).next_cursor
    await tamper(store.database.engine, "DELETE FROM audit_events WHERE request_id = 'lost'")
    with pytest.raises(errors.InvalidCursorError, match="newest event that this cursor has passed"):
        await store.audit.changes(cursor)
    await store.audit.write(make_event(request_id="new"))

    with pytest.raises(errors.InvalidCursorError, match="newest event that this cursor has passed"):
        await store.audit.changes(cursor)
    assert ids(await store.audit.changes(kept)) == ["new"]
    assert ids(await store.audit.changes(empty)) == ["old-0", "old-1", "old-2", "new"]


async def test_a_cursor_ahead_of_the_server_is_refused(store: GatewayStore) -> None:
    """A dump restored into a server that has given out fewer ids: its own would count as passed."""
    await store.audit.write(make_event())
    scope, place = opened((await store.audit.changes()).next_cursor or "")
    ahead = {"since": f"{2**40}:{2**40}:"} if store.database.dialect == "postgresql" else {"id": 2**40}

    with pytest.raises(errors.InvalidCursorError, match="newest event that this cursor has passed"):
        await store.audit.changes(encode(scope, json.dumps(place | ahead, separators=(",", ":")).encode()))


async def test_a_look_passes_by_the_rows_of_open_transactions(migrated_postgres_database: Callable[[], str]) -> None:
    """On PostgreSQL, without statistics: twenty looks together go once through the index entries of a long import."""
    url, rows, looks, seen = migrated_postgres_database(), 200, 10, []
    async with GatewayStore(url, redis_url="") as importing:
        async with GatewayStore(url, redis_url="") as store, AsyncSession(importing.database.engine) as slow:
            cursor = (await store.audit.changes()).next_cursor
            for _ in range(rows):
                await importing.audit.record(make_event(), session=slow)
            async with store.database.engine.begin() as connection:  # a later transaction ends, without an event
                await connection.execute(text("SELECT pg_current_xact_id()"))
            for number in range(-looks, looks):
                if number >= 0:
                    await store.audit.write(make_event(request_id=f"fast-{number}"))
                page = await store.audit.changes(cursor)
                seen, cursor = seen + ids(page), page.next_cursor
        # What a connection has read is counted when it is closed.
        async with importing.database.read() as connection:
            async with asyncio.timeout(30):
                while not (read := await _entries_read(connection)):
                    await asyncio.sleep(0.05)

    assert seen == [f"fast-{number}" for number in range(looks)]
    assert looks <= read < 2 * rows


async def _entries_read(connection: AsyncConnection) -> int:
    await connection.execute(text("SELECT pg_stat_clear_snapshot()"))
    index = "SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'ix_audit_events_transaction_id'"
    return int((await connection.execute(text(index))).scalar_one())


async def test_forged_places_are_refused(store: GatewayStore) -> None:
    """Whatever stands in a cursor: InvalidCursorError, no error of the database."""
    cursor = (await store.audit.changes()).next_cursor or ""
    scope_bytes, _ = opened(cursor)
    forged: list[Any] = [
        *(b"", b"{}", b"[]", b"\xff", b'{"since":"x"}', b'{"since":"1:2:x","until":null,"transaction":null,"id":0}'),
        b'{"since":"1:2:3","until":"1:2:","transaction":null,"id":-1}',
        b'{"since":"1:99999999999999999999:","until":null,"transaction":0,"id":0}',
        b'{"since":null,"until":null,"transaction":null,"id":true}',
        *(b'{"nothing":1}', b'{"since":"1:2:","mark":1}', b'{"since":"1:2:","mark":[-1,"0"]}'),
        *(b'{"id":1,"mark":["1","0"]}', b'{"id":1,"mark":[1,"0","0"]}', b'{"id":1,"database":1}'),
    ]
    for payload in forged:
        if store.database.dialect == "sqlite" and payload == b"{}":
            continue  # the place before the first event
        with pytest.raises(errors.InvalidCursorError):
            await store.audit.changes(encode(scope_bytes, payload))
    for other in ("", "Now", cursor + "A"):
        with pytest.raises(errors.InvalidCursorError):
            await anext(store.audit.follow(start=other))
        with pytest.raises(errors.InvalidCursorError):
            await store.audit.changes(other)
    with pytest.raises(errors.InvalidCursorError):
        await store.for_org("acme").audit.changes(cursor)
    with pytest.raises(ValueError, match="poll_s must be above zero"):
        await anext(store.audit.follow(poll_s=0))


async def _write_slowly(
    store: GatewayStore, seed: int, rounds: int, longest_s: float, waiting: asyncio.Semaphore
) -> list[str]:
    """Write through transactions of the caller's that stay open at random; returns what was committed."""
    rng, done = random.Random(seed), []
    for number in range(rounds):
        mine = [f"w-{seed}-{number}-{each}" for each in range(rng.randrange(1, 4))]
        async with waiting, AsyncSession(store.database.engine) as session:
            for request_id in mine:
                await store.audit.record(make_event(request_id=request_id), session=session)
                await asyncio.sleep(rng.random() * longest_s / len(mine))
            if rng.random() < 0.1:
                await session.rollback()
            else:
                await session.commit()
                done += mine
        await store.audit.write(make_event(request_id=f"w-{seed}-{number}"))
        done.append(f"w-{seed}-{number}")
    return done


async def follow_writers(
    store: GatewayStore, *, writers: int, rounds: int, longest_s: float
) -> tuple[list[str], list[str]]:
    """Let writers with open transactions race a follower; returns what was committed and what was seen."""
    seen: list[str] = []
    began = asyncio.Event()

    async def read() -> None:
        cursor = (await store.audit.changes()).next_cursor or ""
        began.set()
        async for event in store.audit.follow(start=cursor, poll_s=0.01):
            seen.append(event.request_id)
            if event.request_id == "end":
                return

    reader = asyncio.create_task(read())
    await began.wait()
    # SQLite has one writer; the pool of PostgreSQL holds twenty connections.
    at_once = asyncio.Semaphore(1 if store.database.dialect == "sqlite" else 16)
    tasks = [_write_slowly(store, seed, rounds, longest_s, at_once) for seed in range(writers)]
    committed = [each for done in await asyncio.gather(*tasks) for each in done]
    await store.audit.write(make_event(request_id="end"))
    await asyncio.wait_for(reader, 60)
    return committed, seen[:-1]


@pytest.mark.system
async def test_a_follower_misses_nothing_and_sees_nothing_twice(store: GatewayStore) -> None:
    """Writers whose transactions stay open at random, some rolled back, beside group commits: each event once."""
    sizes = {"writers": 12, "rounds": 8, "longest_s": 0.002}
    if store.database.dialect == "postgresql":
        sizes = {"writers": 24, "rounds": 10, "longest_s": 0.05}
    committed, seen = await follow_writers(store, **sizes)  # type: ignore[arg-type]

    assert len(committed) == len(set(committed)) > 100
    assert len(seen) == len(set(seen)), "twice"
    assert set(seen) == set(committed)
    own = [each for each in seen if each.count("-") == 2]
    for seed in range(sizes["writers"]):  # type: ignore[arg-type]
        mine = [int(each.split("-")[2]) for each in own if each.startswith(f"w-{seed}-")]
        assert mine == sorted(mine), "what one writer wrote one after the other came in another order"


@pytest.mark.slow
async def test_a_hundred_thousand_events_with_slow_transactions(request: pytest.FixtureRequest) -> None:
    """50 writers with transactions open for up to half a second, 100,000 events: none missed, none doubled."""
    url = request.getfixturevalue("contract_postgres")
    async with GatewayStore(url, redis_url="") as store:
        committed, seen = await follow_writers(store, writers=50, rounds=780, longest_s=0.5)

    assert len(committed) >= 100_000
    assert len(seen) == len(set(seen))
    assert set(seen) == set(committed)


@POSTGRES
async def test_a_follower_outlives_an_outage(
    store: GatewayStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It waits for a database that is away, or half restored, says once each that it waits and goes on, and does."""
    connection = store.database.connection
    failing = 0

    def faulty(purpose: Any) -> Any:
        nonlocal failing
        if purpose == "read" and failing:
            failing -= 1
            if failing:
                raise errors.StoreUnavailableError("The database could not be read.")
            raise errors.SchemaOutOfDateError("A table is missing.")
        return connection(purpose)

    monkeypatch.setattr(store.database, "connection", faulty)
    events = store.audit.follow(start="beginning", poll_s=0.01)
    await store.audit.write(make_event(request_id="r-1"))
    assert (await anext(events)).request_id == "r-1"
    failing = 2
    await store.audit.write(make_event(request_id="r-2"))
    assert (await anext(events)).request_id == "r-2"
    await events.aclose()  # type: ignore[attr-defined]

    assert failing == 0
    assert [caplog.text.count(words) for words in ("waits for the database", "log goes on")] == [1, 1]

    events, failing = store.audit.follow(start="beginning", patience_s=0), 1
    with pytest.raises(errors.SchemaOutOfDateError):
        await anext(events)
