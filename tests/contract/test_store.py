"""`GatewayStore`: opened and closed, bound to its process and loop, telling its notifiers in the background."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from contract_helpers import BY_TOKEN, forked
from sqlalchemy import event, text

import agent_gateway_store.store as store_module
import servers
from agent_gateway_store import GatewayStore, StoreSettings, SyncGatewayStore, errors
from agent_gateway_store.keys.format import new_key
from agent_gateway_store.storage import migrate
from agent_gateway_store.storage.database import create_engine
from builders import CALL, CALLER, make_event, make_request

Use = Callable[[GatewayStore], Awaitable[Any]]
USES: list[Use] = [
    *(partial(lambda use, store: use(store, "token"), use) for use in BY_TOKEN),
    lambda store: store.audit.list_recent(),
    lambda store: store.audit.get_by_request_id("r-1"),
    lambda store: store.audit.write(make_event()),
    lambda store: store.audit.write_many([make_event()]),
    lambda store: store.audit.flush(),
    lambda store: store.audit.call(CALL, CALLER, decision="ALLOW").__aenter__(),
    lambda store: store.approvals.issue_token(make_request()),
    lambda store: store.approvals.list_requests(),
    lambda store: store.approvals.expire_stale(),
    lambda store: store.keys.issue("dev-agent", role="r"),
    lambda store: store.keys.list(),
    lambda store: store.keys.verify("malformed"),
    lambda store: store.ping(),
    lambda store: store.for_org("acme").keys.list(),
]


async def refuses_every_use(store: GatewayStore, match: str) -> None:
    for use in USES:
        with pytest.raises(errors.StoreNotOpenError, match=match):
            await use(store)


async def test_an_open_that_is_cancelled_halfway_is_closed(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, begun = GatewayStore(database_url, redis_url=""), asyncio.Event()

    async def hang(_writer: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(store_module.AuditWriter, "open", hang)
    opening = asyncio.create_task(store.open())
    await begun.wait()
    opening.cancel()
    await asyncio.wait([opening])
    monkeypatch.undo()

    await refuses_every_use(store, "not open")
    async with store:
        assert await store.audit.write(make_event()) == "STORED"


def test_constructing_connects_nothing(tmp_path: Path) -> None:
    """A store for servers that do not exist, and one for a file, open no socket, thread or file."""
    before = threading.active_count()
    for cls in (GatewayStore, SyncGatewayStore):
        cls("postgresql://user:secret@127.0.0.1:1/none", redis_url="redis://127.0.0.1:1/0")
        cls(f"sqlite:///{tmp_path}/new.db")

    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == before


async def test_default_is_a_sqlite_file_here(tmp_path: Path) -> None:
    """Without any setting the store is `gateway.db` in the current folder, set up on open, and still there after."""
    for expected in (0, 1):
        async with GatewayStore() as store:
            assert len(await store.keys.list()) == expected
            if not expected:
                await store.keys.issue("dev-agent", role="r")

    assert (tmp_path / "gateway.db").is_file()


async def test_sqlite_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/host.db"
    engine = create_engine(url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE theirs (id INTEGER)"))
    await engine.dispose()

    with pytest.raises(errors.SchemaOutOfDateError, match="run `gateway-store db upgrade`"):
        await GatewayStore(url).open()
    async with GatewayStore(url, auto_migrate=True) as store:
        assert await store.keys.list() == []
    with pytest.raises(errors.SchemaOutOfDateError):
        await GatewayStore(f"sqlite:///{tmp_path}/new.db", auto_migrate=False).open()


async def test_schema_that_is_behind_names_the_command(postgres_database: Callable[[], str]) -> None:
    """An empty PostgreSQL database is refused with the step to take; `auto_migrate=True` or `migrate` takes it."""
    url, other = postgres_database(), postgres_database()

    with pytest.raises(
        errors.SchemaOutOfDateError, match=r"\(none\) is behind .*: run `gateway-store db upgrade`"
    ) as caught:
        await GatewayStore(url).open()
    assert (caught.value.current, caught.value.expected) == (None, migrate.head())
    async with GatewayStore(url, auto_migrate=True) as store:
        assert await store.keys.list() == []
    store = GatewayStore(other)
    await store.migrate()
    async with store:
        assert await store.keys.list() == []


async def test_unreachable_database_is_one_sentence(tmp_path: Path) -> None:
    for url in ("postgresql://user:s3cret-pass@127.0.0.1:1/none", f"sqlite:///{tmp_path}/no/such/folder/gateway.db"):
        store = GatewayStore(url)
        with pytest.raises(errors.StoreUnavailableError, match="check that") as caught:
            await store.open()
        assert "s3cret-pass" not in str(caught.value)
        await store.close()


async def test_what_was_given_stays_open(database_url: str, fresh_redis_url: str) -> None:
    engine = create_engine(database_url)
    async with redis.asyncio.from_url(fresh_redis_url) as client:
        pool = engine.pool
        async with GatewayStore(engine=engine, redis=client) as store:
            token = await store.approvals.issue_token(make_request())
        assert await client.exists(f"approval:{token}")
        async with engine.connect() as connection:
            assert (await connection.execute(text("SELECT count(*) FROM approval_requests"))).scalar() == 1
        assert engine.pool is pool
    await engine.dispose()


async def test_store_that_is_not_open_says_so(database_url: str, fresh_redis_url: str) -> None:
    """Before `open` and after `close` every use raises, also what Redis could answer; opened again it works."""
    store = GatewayStore(database_url, redis_url=fresh_redis_url)
    await refuses_every_use(store, "is not open")
    async with store:
        token = await store.approvals.issue_token(make_request())
    await refuses_every_use(store, "is not open")
    with pytest.raises(errors.StoreNotOpenError):
        await store.approvals.check_token(token)

    for _ in range(2):
        async with store as opened:
            assert opened is store
            assert (await store.approvals.check_token(token)).status == "PENDING"
            assert await store.audit.write(make_event()) == "STORED"


async def test_opening_and_closing_twice_changes_nothing(database_url: str) -> None:
    """The second `open` and the second `close` do nothing; several tasks may open at once."""
    store = GatewayStore(database_url)
    await asyncio.gather(*(store.open() for _ in range(3)))
    await store.open()
    assert await store.keys.list() == []
    await store.close()
    await store.close()


async def test_closing_amid_work_leaves_nothing_open(database_url: str) -> None:
    """A transaction under way when the store closes is waited for, and its connection closed, too."""
    store = GatewayStore(database_url)
    opened, closed = list[object](), list[object]()
    event.listen(store.database.engine.sync_engine, "connect", lambda connection, _: opened.append(connection))
    event.listen(store.database.engine.sync_engine, "close", lambda connection, _: closed.append(connection))
    await store.open()
    async with store.database.write() as connection:
        closing = asyncio.create_task(store.close())
        while store.database.is_owner:
            await asyncio.sleep(0.001)
        await connection.execute(text("DELETE FROM api_keys"))
        assert not closing.done()
    await closing

    assert opened == closed != []


async def test_view_shares_the_store(store: GatewayStore) -> None:
    view = store.for_org("acme")
    await view.close()
    with pytest.raises(errors.StoreNotOpenError):
        await store.keys.list()
    async with view:
        assert await store.keys.list() == []
    await store.open()


async def test_another_loop_is_refused(store: GatewayStore) -> None:
    """From another event loop nothing can be used, opened or closed; at home it works on."""

    async def elsewhere() -> None:
        await refuses_every_use(store, "another event loop")
        for act in (store.open, store.close, store.migrate):
            with pytest.raises(errors.StoreNotOpenError, match="another event loop"):
                await act()

    await asyncio.to_thread(servers.run, elsewhere())

    assert await store.keys.list() == []
    assert await store.audit.write(make_event()) == "STORED"


async def test_a_store_is_not_pickled(store: GatewayStore) -> None:
    """As for a pool of processes, also the blocking one, one of an organisation, and one that was never opened."""
    for each in (
        store,
        store.for_org("acme"),
        SyncGatewayStore("sqlite://"),
        SyncGatewayStore("sqlite://").for_org("a"),
    ):
        with pytest.raises(TypeError, match="make one in each process"):
            pickle.dumps(each)


async def test_forked_process_is_refused(store: GatewayStore) -> None:
    """In a forked child the parent's store refuses everything, and the parent's connections live on."""

    async def in_child() -> None:
        await refuses_every_use(store, "another process")
        for act in (store.open, store.close):
            with pytest.raises(errors.StoreNotOpenError, match="another process"):
                await act()

    # It has started threads, which the child does not have.
    await store.keys.issue("parent", role="r")
    child = forked(lambda: asyncio.run(in_child()))
    await asyncio.to_thread(child.join, 30)

    assert child.exitcode == 0
    assert len(await store.keys.list()) == 1
    assert await store.audit.write(make_event()) == "STORED"


async def test_opening_waits_for_no_writer(database_url: str) -> None:
    """A process that starts while another one writes only looks at the schema, and needs no write lock for that."""
    async with GatewayStore(database_url) as store, store.database.write() as connection:
        await connection.execute(text("DELETE FROM api_keys"))
        async with asyncio.timeout(5):
            async with GatewayStore(database_url) as second:
                await second.ping()


LOST_USES: list[Use] = [
    *(partial(lambda use, store: use(store, "t" * 43), use) for use in BY_TOKEN),
    lambda store: store.approvals.issue_token(make_request()),
    lambda store: store.approvals.list_requests(),
    lambda store: store.keys.verify(new_key("0123456789AB")),
]
LOST = {
    "tables": [
        ("approval_requests RENAME TO lost_requests", "lost_requests RENAME TO approval_requests"),
        ("api_keys RENAME TO lost_keys", "lost_keys RENAME TO api_keys"),
    ],
    "columns": [
        ("approval_requests RENAME outcome TO lost", "approval_requests RENAME lost TO outcome"),
        ("api_keys RENAME role TO lost", "api_keys RENAME lost TO role"),
    ],
}


@pytest.mark.parametrize("wanted", [True, False])
async def test_the_collector_passes_by_what_is_there_after_opening_if_that_is_wanted(
    database_url: str, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    calls: list[str] = []
    store = GatewayStore(database_url, redis_url="", settings=StoreSettings(freeze_after_open=wanted))
    for name in ("collect", "freeze"):
        monkeypatch.setattr(store_module.gc, name, partial(calls.append, name))
    async with store:
        await store.open()
        assert calls == ["collect", "freeze"] * wanted
        await store.close()
        await store.open()

    assert calls == ["collect", "freeze"] * 2 * wanted


@pytest.fixture(params=LOST)
async def broken(request: pytest.FixtureRequest, store: GatewayStore) -> AsyncIterator[GatewayStore]:
    """A store whose tables, or a column of each, go by another name for the time of the test."""

    async def alter(*changes: str) -> None:
        async with store.database.write() as connection:
            for change in changes:
                await connection.execute(text(f"ALTER TABLE {change}"))

    away, back = zip(*LOST[request.param], strict=True)
    await alter(*away)
    yield store
    await alter(*back)


async def test_every_use_asks_for_a_migration(broken: GatewayStore) -> None:
    for use in LOST_USES:
        with pytest.raises(errors.SchemaOutOfDateError, match="gateway-store db upgrade"):
            await use(broken)
