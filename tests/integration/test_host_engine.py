"""An engine or a session that the host hands in: it is respected in every statement, or refused in one sentence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import database_helpers
import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from agent_gateway_store import (
    ApprovalManager,
    ApprovalRequest,
    AuditEvent,
    AuditLogger,
    AuditQuery,
    GatewayStore,
    errors,
)
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.urls import parse_database_url
from builders import CALL, make_event, make_request

url = database_helpers.url


class OtherDriver(PGDialect_asyncpg):
    """A driver that the store does not know, as psycopg is."""

    driver = "other"
    supports_statement_cache = True


registry.register("postgresql.other", __name__, "OtherDriver")

POSTGRES, SQLITE = "postgresql+asyncpg://user@127.0.0.1:1/db", "sqlite+aiosqlite:///host.db"


@pytest.mark.parametrize(
    ("url", "given", "options", "sentence"),
    [
        ("sqlite+aiosqlite://", {}, {}, r"StaticPool.*give the URL sqlite://"),
        ("postgresql+other://user@127.0.0.1:1/db", {}, {}, r"driver other .*postgresql\+asyncpg://"),
        (POSTGRES, {"isolation_level": "SERIALIZABLE"}, {}, r'level SERIALIZABLE .*isolation_level="READ COMMITTED"'),
        (POSTGRES, {}, {"isolation_level": "REPEATABLE_READ"}, r"level REPEATABLE READ .*READ COMMITTED"),
        (POSTGRES, {}, {"schema_translate_map": {None: "tenant"}}, r"schema_translate_map .*search_path"),
        (POSTGRES, {"execution_options": {"schema_translate_map": {None: "tenant"}}}, {}, r"search_path"),
        (POSTGRES, {}, {"stream_results": True}, r"stream_results .*leave it out"),
        (SQLITE, {}, {"yield_per": 10}, r"yield_per .*leave it out"),
        (POSTGRES, {}, {"postgresql_readonly": True}, r"postgresql_readonly .*leave it out"),
        (SQLITE, {}, {"tenant": "of a listener of the host's"}, r"tenant .*leave it out"),
        (POSTGRES, {"isolation_level": "AUTOCOMMIT"}, {}, r"level AUTOCOMMIT .*isolation_level="),
        (SQLITE, {"execution_options": {"isolation_level": "AUTOCOMMIT"}}, {}, r"level AUTOCOMMIT .*isolation_level="),
    ],
)
def test_an_engine_whose_ways_do_not_reach_every_statement_is_refused(
    url: str, given: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    """Events of one tenant would land in the schema of another; the error is one sentence that says what to give."""
    engine = create_async_engine(url, **given).execution_options(**options)
    for use in (lambda: GatewayStore(engine=engine), lambda: Database(engine, owned=False)):
        with pytest.raises(ValueError, match=sentence) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_an_engine_that_is_not_async_is_refused() -> None:
    with pytest.raises(TypeError, match=r"AsyncEngine.*not Engine"):
        GatewayStore(engine=create_engine("sqlite://"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"logging_token": "store"}, {"isolation_level": "READ COMMITTED"}, {"schema_translate_map": None}]
)
def test_options_that_change_no_statement_are_taken(options: dict[str, Any]) -> None:
    """So is an engine with the isolation level that the store works at, which may be derived from any other."""
    engine = create_async_engine(POSTGRES, isolation_level="SERIALIZABLE") if "isolation_level" in options else None
    GatewayStore(engine=(engine or create_async_engine(POSTGRES)).execution_options(**options))


@pytest.mark.parametrize(
    ("limits", "most"), [({"pool_size": 2, "max_overflow": 1}, 3), ({"pool_size": 1, "max_overflow": 0}, 1)]
)
async def test_the_size_of_its_pool_limits_the_drivers_connections_too(
    postgres_database: Callable[[], str], limits: dict[str, Any], most: int
) -> None:
    engine = create_async_engine(postgres_database(), **limits)
    database = Database(engine, owned=False)
    database.bind_to_loop()
    in_use: set[object] = set()
    seen: list[int] = []

    async def use() -> None:
        async with database.connection("read") as runner:
            in_use.add(runner)
            seen.append(len(in_use))
            await runner.driver.fetch("SELECT pg_sleep(0.02)")  # type: ignore[union-attr]
            in_use.remove(runner)

    await asyncio.gather(*(use() for _ in range(12)))
    await database.close()
    await engine.dispose()

    assert max(seen) == most


async def use_every_service(store: GatewayStore, request_id: str) -> None:
    """Write, search, stream, follow and export events; ask, decide, use and list; issue, verify and revoke."""
    await store.audit.write_many([make_event(request_id=f"{request_id}-{number}") for number in range(3)])
    beginning = await store.audit.changes("beginning")
    assert await store.audit.write(make_event(request_id=request_id)) == "STORED"
    assert [found.request_id for found in await store.audit.changes(beginning.next_cursor)] == [request_id]
    assert len(await store.audit.search()) == 4
    assert len([found async for found in store.audit.stream()]) == 4
    assert (await store.audit.export(f"{request_id}.parquet")).rows == 4
    assert (await store.audit.stats())[0]["calls"] == 4
    async with store.database.sessions() as session:
        await store.audit.record(make_event(request_id="taken-back"), session=session)
        await session.rollback()
    assert await store.audit.get_by_request_id("taken-back") is None
    token = await store.approvals.issue_token(make_request(request_id=request_id))
    await store.approvals.approve(token, "approver-1")
    await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    assert len(await store.approvals.search()) == 1
    issued = await store.keys.issue("dev-agent", role="agent", trust_level=1)
    assert (await store.keys.verify(issued.plaintext)).caller_id == "dev-agent"
    await store.keys.revoke("dev-agent")


@pytest.mark.parametrize(
    "options", [{"poolclass": NullPool}, {"pool_size": 1, "max_overflow": 1, "pool_reset_on_return": None}]
)
async def test_every_service_works_on_the_engine_of_a_host(url: str, options: dict[str, Any]) -> None:
    engine = create_async_engine(parse_database_url(url)[0], **options)
    async with GatewayStore(engine=engine, auto_migrate=True) as store:
        await use_every_service(store, "r-1")
    await engine.dispose()


async def test_a_search_path_is_the_schema_of_every_statement(postgres_database: Callable[[], str]) -> None:
    """Two stores over two schemas of one database do not see each other's rows, and nothing lands in `public`."""
    url = postgres_database().replace("postgresql://", "postgresql+asyncpg://")
    admin = create_async_engine(url)
    engines = [
        create_async_engine(url, connect_args={"server_settings": {"search_path": name}}) for name in ("one", "two")
    ]
    async with admin.begin() as connection:
        for name in ("one", "two"):
            await connection.execute(text(f"CREATE SCHEMA {name}"))
    for number, engine in enumerate(engines):
        async with GatewayStore(engine=engine, auto_migrate=True) as store:
            await use_every_service(store, f"r-{number}")
    async with admin.connect() as connection:
        public = (await connection.execute(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"))).all()
    for engine in (admin, *engines):
        await engine.dispose()

    assert public == []


@pytest.fixture
async def store(url: str) -> AsyncIterator[GatewayStore]:
    async with GatewayStore(url, auto_migrate=True) as opened:
        yield opened


@pytest.mark.parametrize("where", ["engine", "derived engine", "connection", "driver"])
async def test_a_record_that_could_not_be_rolled_back_is_refused(store: GatewayStore, where: str) -> None:
    """In AUTOCOMMIT it would outlive the rollback of the caller's work; nothing is stored."""
    url = store.database.engine.url
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT" if where == "engine" else None)
    if where == "derived engine":
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    if where == "driver":
        event.listen(engine.sync_engine, "connect", _commit_each_statement)
    async with AsyncSession(engine) as session:
        if where == "connection":
            await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        with pytest.raises(ValueError, match="AUTOCOMMIT commits each statement by itself"):
            await store.audit.record(make_event(), session=session)
        with pytest.raises(ValueError, match="AUTOCOMMIT"):
            await ApprovalManager(session).issue_token(make_request())
        await session.rollback()
        # Neither reads nor single events need a rollback.
        assert await AuditLogger(session).write(make_event(request_id="logged")) == "STORED"
        assert [found.request_id for found in await AuditQuery(session).list_recent()] == ["logged"]
    await engine.dispose()

    assert [found.request_id for found in await store.audit.search()] == ["logged"]
    assert await store.approvals.search() == []


def _commit_each_statement(connection: Any, _record: Any) -> None:
    if hasattr(connection, "autocommit"):
        connection.autocommit = True
    else:
        connection.isolation_level = None


def _engine_of(url: str, **options: Any) -> AsyncEngine:
    return create_async_engine(url).execution_options(**options)


@pytest.mark.parametrize(
    ("session", "error", "sentence"),
    [
        (lambda: Session(create_engine("sqlite://")), TypeError, "AsyncSession of SQLAlchemy, not Session"),
        (lambda: create_async_engine(SQLITE).connect(), TypeError, "not AsyncConnection"),
        (lambda: None, TypeError, "not NoneType"),
        (AsyncSession, ValueError, "no engine for"),
        (
            lambda: AsyncSession(create_async_engine("postgresql+other://user@127.0.0.1:1/db")),
            ValueError,
            "driver other",
        ),
        (lambda: AsyncSession(_engine_of(POSTGRES, schema_translate_map={None: "t"})), ValueError, "search_path"),
        (lambda: AsyncSession(_engine_of(SQLITE, stream_results=True)), ValueError, "stream_results"),
    ],
)
async def test_a_session_that_the_store_cannot_work_in_is_refused(
    session: Callable[[], Any], error: type[Exception], sentence: str
) -> None:
    store = GatewayStore(SQLITE)
    for use in (AuditLogger, AuditQuery, ApprovalManager):
        with pytest.raises(error, match=sentence):
            use(session())
    with pytest.raises(error, match=sentence):
        await store.audit.record(make_event(), session=session())


async def test_options_of_a_sessions_transaction_are_respected_or_refused(store: GatewayStore) -> None:
    """They are known only once it has begun; the isolation level of the caller's transaction is the caller's."""
    async with store.database.sessions() as session:
        await session.connection(execution_options={"schema_translate_map": {None: "tenant"}})
        with pytest.raises(ValueError, match="search_path"):
            await store.audit.record(make_event(), session=session)
        with pytest.raises(ValueError, match="search_path"):
            await AuditQuery(session).list_recent()
        await session.rollback()
        await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        assert await store.audit.record(make_event(), session=session) == "STORED"
        await session.commit()


async def test_a_session_of_two_engines_uses_the_one_of_our_tables(store: GatewayStore) -> None:
    own = create_async_engine("sqlite+aiosqlite:///own.db")
    ours = {AuditEvent: store.database.engine, ApprovalRequest: store.database.engine}
    async with AsyncSession(own, binds=ours) as session:
        assert await AuditLogger(session).write(make_event(request_id="logged")) == "STORED"
        assert await store.audit.record(make_event(request_id="recorded"), session=session) == "STORED"
        await session.commit()
        manager = ApprovalManager(session)
        token = await manager.issue_token(make_request())
        assert (await manager.approve(token, "approver-1")).status == "APPROVED"
        assert len(await manager.search()) == len(await manager.list_requests()) == 1
        assert (await AuditQuery(session).stats())[0]["calls"] == 2
    await own.dispose()


async def test_a_session_in_the_transaction_of_a_test_is_left_to_it(store: GatewayStore) -> None:
    """The recipe of SQLAlchemy for tests: commits are savepoints, and everything is rolled back in the end."""
    async with store.database.engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            assert await AuditLogger(session).write(make_event()) == "STORED"
            await ApprovalManager(session).issue_token(make_request())
        await outer.rollback()

    assert await store.audit.search() == []


USES: dict[str, Callable[[GatewayStore, AsyncSession], Awaitable[Any]]] = {
    "query": lambda _store, session: AuditQuery(session).list_recent(),
    "record": lambda store, session: store.audit.record(make_event(), session=session),
    "approvals": lambda _store, session: ApprovalManager(session).issue_token(make_request()),
    "the host's own": lambda _store, session: session.execute(text("SELECT 1")),
}


@pytest.mark.parametrize("use", USES)
async def test_a_session_that_several_tasks_use_is_named(store: GatewayStore, use: str) -> None:
    """It is neither an outage nor a fault of the server; one task at least gets through."""
    async with store.database.sessions() as session:
        ended = await asyncio.gather(
            *(AuditQuery(session).list_recent() for _ in range(3)),
            *(USES[use](store, session) for _ in range(3)),
            return_exceptions=True,
        )
    failed = [each for each in ended if isinstance(each, errors.GatewayStoreError)]

    assert {type(each) for each in failed} == {errors.SessionInUseError}
    assert "give each task a session of its own" in str(failed[0])
    assert len(failed) < len(ended)
