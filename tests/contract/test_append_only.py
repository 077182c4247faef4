"""Rows of the audit log are only added: the database itself refuses the rest, but for a door that is open."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agent_gateway_store import GatewayStore
from agent_gateway_store.storage.append_only import (
    TABLES,
    foreign_triggers,
    is_door_open,
    open_door,
    unprotected,
    where_triggers_are_off,
)
from builders import make_event
from cases import cases

COLUMN = {"audit_events": "tool_name", "audit_leaves": "leaf_hash", "audit_checkpoints": "note"}
ON_POSTGRES = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)


@pytest.fixture
async def sealed(database_url: str) -> AsyncIterator[GatewayStore]:
    async with sealed_store(database_url) as store:
        yield store


@pytest.fixture
async def sealed_apart(own_database_url: str) -> AsyncIterator[GatewayStore]:
    async with sealed_store(own_database_url) as store:
        yield store


@asynccontextmanager
async def sealed_store(database_url: str) -> AsyncIterator[GatewayStore]:
    async with GatewayStore(database_url, redis_url="") as store:
        await store.audit.write_many([make_event(request_id="r-1"), make_event(request_id="r-2")])
        await store.evidence.seal()
        yield store


async def execute(engine: AsyncEngine, *statements: str) -> None:
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))


async def asked(engine: AsyncEngine, question: Callable[[AsyncConnection], Awaitable[Any]]) -> Any:
    async with engine.connect() as connection:
        return await question(connection)


async def delete_behind_the_door(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        async with open_door(connection):
            pass
        await connection.execute(text("DELETE FROM audit_events"))


def refused(table: str, dialect: str) -> list[str]:
    """Statements of every kind that would change or remove a row."""
    column = COLUMN[table]
    statements = [f"UPDATE {table} SET {column} = {column}", f"DELETE FROM {table}"]
    columns = {"audit_leaves": "position, event_id, leaf_hash", "audit_checkpoints": "size, root_hash, origin, note"}
    if table != "audit_events":
        key = columns[table].partition(",")[0]
        copied = columns[table] + (", created_at" if table == "audit_checkpoints" else "")
        same = f"INTO {table} ({copied}) SELECT {copied} FROM {table} WHERE true"
        statements.append(f"INSERT {same} ON CONFLICT ({key}) DO UPDATE SET {column} = excluded.{column}")
        if dialect == "sqlite":
            statements.append(f"REPLACE {same}")
    if dialect == "postgresql":
        statements += [f"TRUNCATE {table}", f"UPDATE {table} SET {column} = {column} WHERE false"]
    return statements


@cases("table", TABLES)
async def test_every_change_is_refused(sealed: GatewayStore, table: str) -> None:
    """By UPDATE, by DELETE, by TRUNCATE, and by an INSERT that replaces; the owner of the tables included."""
    engine = sealed.database.engine
    for statement in refused(table, engine.dialect.name):
        with pytest.raises(IntegrityError, match=f"{table} is append-only"):
            await execute(engine, statement)
    assert len(await sealed.audit.list_recent()) == 2
    assert (await sealed.evidence.verify()).checked == 2


async def test_a_door_is_open_for_its_own_transaction(sealed: GatewayStore) -> None:
    """It is closed behind it, and after a rollback; one that was left open closes with its transaction."""
    engine = sealed.database.engine
    async with engine.begin() as connection, open_door(connection):
        await connection.execute(text("DELETE FROM audit_events WHERE request_id = 'r-1'"))
    with pytest.raises(IntegrityError, match="append-only"):
        await delete_behind_the_door(engine)
    with pytest.raises(ZeroDivisionError):
        async with engine.begin() as connection, open_door(connection):
            raise ZeroDivisionError
    with pytest.raises(IntegrityError, match="append-only"):
        await execute(engine, "DELETE FROM audit_events")
    assert [event.request_id for event in await sealed.audit.list_recent()] == ["r-2"]


@ON_POSTGRES
async def test_an_open_door_lets_nobody_else_in(sealed: GatewayStore) -> None:
    """No transaction at the same time, none after a commit that forgot to close it, and no table of that name."""
    engine = sealed.database.engine
    async with engine.begin() as connection, open_door(connection):
        with pytest.raises(IntegrityError, match="append-only"):
            await execute(engine, "DELETE FROM audit_events")
    await execute(engine, "INSERT INTO audit_door VALUES (pg_current_xact_id()::text::bigint)")
    try:
        with pytest.raises(IntegrityError, match="append-only"):
            await execute(engine, "DELETE FROM audit_events")
    finally:
        await execute(engine, "DELETE FROM audit_door")
    with pytest.raises(IntegrityError, match="append-only"):
        await execute(
            engine,
            "CREATE TEMP TABLE audit_door (transaction_id bigint) ON COMMIT DROP",
            "INSERT INTO pg_temp.audit_door VALUES (pg_current_xact_id()::text::bigint)",
            "DELETE FROM audit_events",
        )


@ON_POSTGRES
async def test_a_role_that_writes_events_cannot_open_the_door(sealed: GatewayStore) -> None:
    """With UPDATE and DELETE granted by mistake the triggers still refuse; the door's row is not its to write."""
    engine = sealed.database.engine
    await execute(engine, "CREATE ROLE careless")
    try:
        await execute(engine, "GRANT ALL ON audit_events TO careless")
        for statement, expected in (
            ("DELETE FROM audit_events", "append-only"),
            ("INSERT INTO audit_door VALUES (pg_current_xact_id()::text::bigint)", "permission denied"),
        ):
            with pytest.raises(DBAPIError, match=expected):
                await execute(engine, "SET LOCAL ROLE careless", statement)
    finally:
        await execute(engine, "DROP OWNED BY careless")
        await execute(engine, "DROP ROLE careless")


async def test_a_trigger_that_is_gone_is_named_with_what_brings_it_back(sealed: GatewayStore) -> None:
    """Missing or, on PostgreSQL, switched off; the statement that is named puts it right."""
    engine = sealed.database.engine
    on_postgres = engine.dialect.name == "postgresql"
    name = "audit_leaves_append_only" if on_postgres else "audit_leaves_no_delete"
    broken = ["DROP TRIGGER audit_leaves_append_only ON audit_leaves"] if on_postgres else [f"DROP TRIGGER {name}"]
    broken += ["ALTER TABLE audit_leaves DISABLE TRIGGER ALL"] if on_postgres else []
    for statement in broken:
        await execute(engine, statement)
        found = await asked(engine, unprotected)
        assert list(found) == [name]
        await execute(engine, found[name])
        assert await asked(engine, unprotected) == {}
        with pytest.raises(IntegrityError, match="append-only"):
            await execute(engine, "DELETE FROM audit_leaves")


def remade(name: str, rest: str) -> tuple[str, ...]:
    """Return the name of a trigger, and the statements that make another one under it."""
    where = " ON audit_events" if name.endswith("append_only") else ""
    return name, f"DROP TRIGGER {name}{where}", f"CREATE TRIGGER {name} BEFORE {rest}"


OURS = "EXECUTE FUNCTION audit_append_only()"
HARMLESS = "RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
_all = "UPDATE OR DELETE OR TRUNCATE ON audit_events"
NEUTRALISED: dict[str, dict[str, tuple[str, ...]]] = {
    "sqlite": {
        "another table": remade("audit_events_no_update", "UPDATE ON audit_tiles BEGIN SELECT 1; END"),
        "one column": remade("audit_events_no_update", "UPDATE OF id ON audit_events BEGIN SELECT 1; END"),
    },
    "postgresql": {
        "function": ("audit_append_only", f"CREATE OR REPLACE FUNCTION audit_append_only() {HARMLESS}"),
        "caller's rights": ("audit_append_only", "ALTER FUNCTION audit_append_only() SECURITY INVOKER"),
        "caller's schemas": ("audit_append_only", "ALTER FUNCTION audit_append_only() RESET search_path"),
        "TRUNCATE only": remade("audit_events_append_only", f"TRUNCATE ON audit_events {OURS}"),
        "never": remade("audit_events_append_only", f"{_all} WHEN (false) {OURS}"),
        "one column": remade("audit_events_append_only", f"{_all.replace('UPDATE', 'UPDATE OF id')} {OURS}"),
        "another function": (
            *remade("audit_events_append_only", f"{_all} EXECUTE FUNCTION harmless()")[:2],
            f"CREATE FUNCTION harmless() {HARMLESS}",
            remade("audit_events_append_only", f"{_all} EXECUTE FUNCTION harmless()")[2],
        ),
    },
}
"""By database and case: what is named, and the statements that take the protection away under its own names."""


async def test_a_trigger_that_is_not_as_it_was_made_is_named(sealed_apart: GatewayStore) -> None:
    engine = sealed_apart.database.engine
    for case, (name, *statements) in NEUTRALISED[engine.dialect.name].items():
        await execute(engine, *statements)
        found = await asked(engine, unprotected)
        assert list(found) == [name], case
        drop, rest = found[name].split("; ", 1) if found[name].startswith("DROP") else ("SELECT 1", found[name])
        await execute(engine, drop, rest)
        assert await asked(engine, unprotected) == {}
        with pytest.raises(IntegrityError, match="append-only"):
            await execute(engine, "UPDATE audit_events SET caller_id = 'x'")


async def test_an_open_door_and_the_triggers_of_others_are_found(sealed_apart: GatewayStore) -> None:
    engine = sealed_apart.database.engine
    on_postgres = engine.dialect.name == "postgresql"
    before = await asked(engine, is_door_open), await asked(engine, foreign_triggers)
    if on_postgres:
        theirs = [
            "CREATE FUNCTION theirs() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
            "CREATE TRIGGER theirs BEFORE INSERT ON audit_events FOR EACH ROW EXECUTE FUNCTION theirs()",
            "CREATE RULE their_rule AS ON INSERT TO audit_leaves WHERE false DO INSTEAD NOTHING",
        ]
    else:
        theirs = [
            "CREATE TRIGGER theirs BEFORE INSERT ON audit_events BEGIN SELECT 1; END",
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_master SET type = 'Trigger', tbl_name = upper(tbl_name) WHERE name = 'theirs'",
            "PRAGMA writable_schema = RESET",
        ]
    await execute(engine, "INSERT INTO audit_door VALUES (0)", *theirs)
    after = await asked(engine, is_door_open), await asked(engine, foreign_triggers)

    assert before == (False, [])
    assert after == (True, ["their_rule", "theirs"] if on_postgres else ["theirs"])


@ON_POSTGRES
async def test_sessions_that_fire_no_trigger_are_found(sealed: GatewayStore) -> None:
    engine = sealed.database.engine
    async with engine.connect() as connection:
        database = (await connection.execute(text("SELECT current_database()"))).scalar()
    await execute(engine, "CREATE ROLE replicating")
    try:
        # Not the role in every database: other tests share the server.
        for whom in (f"DATABASE {database}", f"ROLE replicating IN DATABASE {database}"):
            await execute(engine, f"ALTER {whom} SET session_replication_role = 'Replica'")
            found = await asked(engine, where_triggers_are_off)
            assert found == [f"ALTER {whom} RESET session_replication_role"]
            await execute(engine, *found)
            assert await asked(engine, where_triggers_are_off) == []
    finally:
        await execute(engine, "DROP ROLE replicating")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_no_id_is_given_twice(sealed: GatewayStore) -> None:
    """SQLite would give the id of a deleted newest row again, and a leaf would name another event."""
    engine = sealed.database.engine
    (newest, *_) = await sealed.audit.list_recent()
    async with engine.begin() as connection, open_door(connection):
        await connection.execute(text("DELETE FROM audit_events"))
    await sealed.audit.write(make_event())
    (after,) = await sealed.audit.list_recent()
    assert newest.id is not None
    assert after.id == newest.id + 1
