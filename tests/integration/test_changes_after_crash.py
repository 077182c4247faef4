"""Followers miss nothing where PostgreSQL gives transaction ids out again: after `kill -9`, on a promoted standby."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession

import servers
from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings, errors
from builders import make_event
from proofs.harness import execute, migrated
from servers import PostgresServer

pytestmark = pytest.mark.system

BURNED = 40
"""More transactions than any test writes after a crash."""

FORGETFUL = {"bgwriter_lru_maxpages": 0, "checkpoint_timeout": "1h", "autovacuum": "off"}
"""With these settings and the WAL writer stopped, only a commit that wrote something reaches the disk."""


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(durable=True, settings=FORGETFUL) as started:
        yield started


@pytest.fixture
def url(server: PostgresServer) -> Iterator[str]:
    """The URL of a migrated database on it; the server runs again afterwards."""
    name = f"crash_{uuid4().hex}"
    servers.run(execute(server.url, f"CREATE DATABASE {name} TEMPLATE template0"))
    yield migrated(make_url(server.url).set(database=name).render_as_string(hide_password=False))
    if not servers.alive(server.pid):
        server.start()


def opened(url: str) -> GatewayStore:
    return GatewayStore(url, redis_url="", settings=StoreSettings(notification_worker=False))


def on(server: PostgresServer, url: str) -> str:
    return make_url(url).set(port=server.port).render_as_string(hide_password=False)


def ids(events: list[AuditEvent]) -> list[str]:
    return [event.request_id for event in events]


async def ask(url: str, statement: str) -> Any:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def next_transaction(url: str) -> int:
    return int(await ask(url, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"))


async def burn(store: GatewayStore, url: str) -> None:
    """Take transaction ids of which nothing reaches the disk: of events rolled back, and of nothing at all."""
    os.kill(await ask(url, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'"), signal.SIGSTOP)
    async with AsyncSession(store.database.engine) as session:
        await store.audit.record(make_event(), session=session)
        await session.rollback()
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        for number in range(BURNED):
            end = "COMMIT" if number % 2 else "ROLLBACK"
            await connection.execute(f"BEGIN; SELECT pg_current_xact_id(); {end}")
    finally:
        await connection.close()


async def crash(server: PostgresServer, url: str) -> None:
    """Kill the server and start it again; it has then forgotten the ids that were burned."""
    given_out = await next_transaction(url)
    server.kill()
    server.start()
    assert await next_transaction(url) <= given_out - BURNED


async def write(store: GatewayStore, name: str, count: int) -> list[str]:
    """Write events one after the other, each in a transaction of its own, and return their request ids."""
    names = [f"{name}-{number}" for number in range(count)]
    for request_id in names:
        assert await store.audit.write(make_event(request_id=request_id)) == "STORED"
    return names


async def has(url: str, request_id: str) -> None:
    async with asyncio.timeout(30):
        while not await ask(url, f"SELECT EXISTS (SELECT FROM audit_events WHERE request_id = '{request_id}')"):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("rounds", [2, pytest.param(25, marks=pytest.mark.slow)])
async def test_what_is_written_after_a_crash_is_new(server: PostgresServer, url: str, rounds: int) -> None:
    """A cursor kept over `kill -9`, of an empty log or not, with ids given out again: each event once, in order."""
    seen, written, cursor = [], [], "now"
    for number in range(rounds):
        async with opened(url) as store:
            written += await write(store, f"before-{number}", min(number, 1))
            await burn(store, url)
            page = await store.audit.changes(cursor)
            seen, cursor = seen + ids(page), page.next_cursor or ""
        await crash(server, url)
        async with opened(url) as store:
            written += await write(store, f"after-{number}", 6)
            page = await store.audit.changes(cursor, limit=4)
            rest = await store.audit.changes(page.next_cursor)
            seen, cursor = seen + ids(page) + ids(rest), rest.next_cursor or ""

    async with opened(url) as store:
        assert ids(await store.audit.changes(cursor)) == []
    # The first cursor is of round 0, which wrote nothing before it.
    assert seen == written


async def test_a_follower_that_runs_through_crashes_misses_nothing(
    server: PostgresServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    looked, may_look = asyncio.Event(), asyncio.Event()

    async def read(store: GatewayStore) -> None:
        async for event in store.audit.follow(start="beginning", poll_s=0.02):
            seen.append(event.request_id)
            if event.request_id == "end-0":
                return

    async with opened(url) as following, opened(url) as store:
        written = await write(store, "first", 1)
        connection = following.database.connection

        @asynccontextmanager
        async def noted(purpose: Any) -> AsyncIterator[Any]:
            await may_look.wait()
            async with connection(purpose) as runner:
                yield runner
            looked.set()

        monkeypatch.setattr(following.database, "connection", noted)
        reader = asyncio.create_task(read(following))
        for number in range(2):
            await burn(store, url)
            may_look.set()
            for _ in range(2):  # the second look begins after the ids were taken
                looked.clear()
                await asyncio.wait_for(looked.wait(), 30)
            may_look.clear()
            await crash(server, url)
            async with opened(url) as fresh:
                written += await write(fresh, f"after-{number}", 6)
        may_look.set()
        async with opened(url) as fresh:
            written += await write(fresh, "end", 1)
        await asyncio.wait_for(reader, 60)

    assert seen == written


async def test_what_a_promoted_standby_writes_is_new(server: PostgresServer, url: str) -> None:
    """A standby that has every event, but not the ids taken since, is promoted: its events come, each once."""
    with PostgresServer(durable=True, settings=FORGETFUL, standby_of=server) as standby:
        async with opened(url) as store:
            start = (await store.audit.changes()).next_cursor
            before = await write(store, "before", 2)
            await burn(store, url)
            page = await store.audit.changes(start)
        await has(on(standby, url), before[-1])
        given_out = await next_transaction(url)
        server.kill()
        assert await ask(on(standby, url), "SELECT pg_promote()")
        assert await next_transaction(on(standby, url)) <= given_out - BURNED
        async with opened(on(standby, url)) as store:
            after = await write(store, "after", 6)
            rest = await store.audit.changes(page.next_cursor)

    assert (ids(page), ids(rest)) == (before, after)


async def test_a_promoted_standby_that_lacks_events_refuses_the_cursor(server: PostgresServer, url: str) -> None:
    """What the cursor has passed was lost, so that its ids stand for other events: an error, not a silent gap."""
    with PostgresServer(durable=True, settings=FORGETFUL, standby_of=server) as standby:
        async with opened(url) as store:
            kept = await write(store, "kept", 1)
            known = (await store.audit.changes()).next_cursor
            await has(on(standby, url), kept[-1])
            for statement in ("ALTER SYSTEM SET primary_conninfo = ''", "SELECT pg_reload_conf()"):
                await execute(standby.url, statement)
            async with asyncio.timeout(30):
                while await ask(standby.url, "SELECT count(*) FROM pg_stat_wal_receiver"):
                    await asyncio.sleep(0.02)
            await write(store, "lost", 8)
            ahead = (await store.audit.changes()).next_cursor
        server.kill()
        async with opened(on(standby, url)) as store:
            assert ids(await store.audit.changes(ahead)) == [], "a standby may be behind, and is waited for"
        assert await ask(on(standby, url), "SELECT pg_promote()")
        async with opened(on(standby, url)) as store:
            with pytest.raises(errors.InvalidCursorError, match="promoted standby that lacks it"):
                await store.audit.changes(ahead)
            after = await write(store, "after", 12)
            with pytest.raises(errors.InvalidCursorError, match="promoted standby that lacks it"):
                await anext(store.audit.follow(start=ahead))

            assert ids(await store.audit.changes(known)) == after
            assert ids(await store.audit.changes("beginning")) == kept + after


async def test_a_follower_on_a_standby_misses_nothing(server: PostgresServer, url: str) -> None:
    """What a transaction has open on the primary while the standby is read comes when it is committed; a cursor of
    the primary leads on there, and none twice."""
    with PostgresServer(durable=True, settings=FORGETFUL, standby_of=server) as standby:
        async with opened(url) as store, opened(on(standby, url)) as copy:
            await write(store, "before", 1)
            await has(on(standby, url), "before-0")
            start = (await copy.audit.changes()).next_cursor
            async with AsyncSession(store.database.engine) as slow:
                await store.audit.record(make_event(request_id="slow"), session=slow)
                await write(store, "fast", 2)
                from_primary = await store.audit.changes(start)
                await has(on(standby, url), "fast-1")
                first = await copy.audit.changes(start)
                led_on = await copy.audit.changes(from_primary.next_cursor)
                await slow.commit()
            await write(store, "last", 1)
            await has(on(standby, url), "last-0")
            second = await copy.audit.changes(first.next_cursor)
            led_on_again = await copy.audit.changes(led_on.next_cursor)

    assert sorted(ids(first) + ids(second)) == ["fast-0", "fast-1", "last-0", "slow"]
    assert (ids(from_primary), ids(led_on), ids(led_on_again)) == (["fast-0", "fast-1"], [], ["slow", "last-0"])
