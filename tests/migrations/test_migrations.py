"""The schema on both databases: up, down, equal to the models, and safe when many migrate at once."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from migration_helpers import execute
from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

import once
from agent_gateway_store.errors import SchemaOutOfDateError, StoreUnavailableError
from agent_gateway_store.models.tables import metadata
from agent_gateway_store.storage import migrate
from agent_gateway_store.storage.database import create_engine
from agent_gateway_store.storage.identity import read_identity
from forks import forks

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
OURS = {
    *("api_keys", "approval_requests", "approval_votes", "audit_checkpoints", "audit_door", "audit_events"),
    *("audit_holds", "audit_prunes"),
    *("audit_leaves", "audit_tiles", "database_identity", "notification_deliveries"),
}


async def tables(engine: AsyncEngine) -> set[str]:
    async with engine.begin() as connection:
        return set(await connection.run_sync(lambda sync: inspect(sync).get_table_names()))


def _schema(connection: Connection) -> dict[str, Any]:
    """Everything the database says about our tables, in an order of its own."""
    look = inspect(connection)
    found: dict[str, Any] = {}
    for table in sorted(OURS):
        found[table] = {
            "columns": {
                column["name"]: (repr(column["type"]), column["nullable"], column["default"])
                for column in look.get_columns(table)
            },
            "key": look.get_pk_constraint(table),
            "unique": sorted((str(one["name"]), one["column_names"]) for one in look.get_unique_constraints(table)),
            "checks": sorted((str(one["name"]), one["sqltext"]) for one in look.get_check_constraints(table)),
            "foreign": look.get_foreign_keys(table),
            "counted": "AUTOINCREMENT" in (_sql(connection, table) or ""),
            "indexes": sorted(
                (str(one["name"]), one["column_names"], one["unique"], _text(one.get("dialect_options")))
                for one in look.get_indexes(table)
            ),
        }
    return found


def _sql(connection: Connection, table: str) -> str | None:
    if connection.dialect.name != "sqlite":
        return None
    return connection.scalar(text("SELECT sql FROM sqlite_master WHERE name = :name"), {"name": table})


def _text(options: Any) -> list[str]:
    return sorted(f"{name}={value}" for name, value in (options or {}).items())


async def schema(engine: AsyncEngine) -> dict[str, Any]:
    async with engine.begin() as connection:
        return await connection.run_sync(_schema)


async def test_up_down_and_up_again(engine: AsyncEngine) -> None:
    assert await migrate.current(engine) is None
    assert await migrate.is_empty(engine)
    await migrate.upgrade(engine)
    assert await migrate.current(engine) == migrate.head()
    assert not await migrate.is_empty(engine)
    first = await schema(engine)
    await migrate.downgrade(engine, "base")
    assert await tables(engine) == {migrate.VERSION_TABLE}
    assert await migrate.current(engine) is None
    await migrate.upgrade(engine)
    await migrate.upgrade(engine)

    assert await migrate.current(engine) == migrate.head()
    assert await schema(engine) == first
    assert await migrate.differences(engine) == []


async def test_the_migrated_schema_is_that_of_the_models(make_url: Callable[[], str]) -> None:
    """Columns, types, defaults, constraints and indexes: as `create_all` makes them, CHECKs included."""
    engines = [create_engine(make_url()), create_engine(make_url())]
    await migrate.upgrade(engines[0])
    async with engines[1].begin() as connection:
        await connection.run_sync(metadata.create_all)
    migrated, created = [await schema(engine) for engine in engines]
    for engine in engines:
        await engine.dispose()

    assert migrated == created
    assert sum(len(table["checks"]) for table in migrated.values()) == 18
    assert sum(len(table["indexes"]) for table in migrated.values()) >= 14


async def test_json_is_jsonb_on_postgresql(engine: AsyncEngine) -> None:
    await migrate.upgrade(engine)
    columns = (await schema(engine))["audit_events"]["columns"]
    on_postgres = engine.dialect.name == "postgresql"

    assert columns["sanitized_args"][0].startswith("JSONB(" if on_postgres else "JSON(")
    assert columns["id"][0] == ("BIGINT()" if on_postgres else "INTEGER()")
    assert ("timezone=True" in columns["timestamp"][0]) is on_postgres


EDITS = {
    "DROP INDEX ix_audit_events_timestamp_id": "ix_audit_events_timestamp_id",
    "DROP INDEX uq_approval_requests_issued_call": "uq_approval_requests_issued_call",
    "CREATE INDEX extra ON audit_events (caller_role)": "extra",
    "DROP TABLE approval_votes": "approval_votes",
    "ALTER TABLE api_keys ADD COLUMN surplus TEXT": "surplus",
}
ON_POSTGRES = {
    "ALTER TABLE api_keys ALTER COLUMN role TYPE INTEGER USING 1": "api_keys.role",
    "ALTER TABLE api_keys ALTER COLUMN caller_id DROP NOT NULL": "api_keys.caller_id",
    "ALTER TABLE audit_events ALTER COLUMN sanitized_args TYPE JSON": "sanitized_args",
    "ALTER TABLE audit_events DROP COLUMN llm_explanation": "llm_explanation",
    "ALTER TABLE api_keys DROP CONSTRAINT uq_api_keys_key_id": "uq_api_keys_key_id",
}


async def test_edits_by_hand_are_seen(engine: AsyncEngine) -> None:
    edits = EDITS | (ON_POSTGRES if engine.dialect.name == "postgresql" else {})
    await migrate.upgrade(engine)
    await execute(engine, *edits)
    found = await migrate.differences(engine)

    assert len(found) >= len(edits)
    for expected in edits.values():
        assert any(expected in line for line in found), (expected, found)
    assert all("\n" not in line and len(line) < 200 for line in found)


async def test_the_hosts_own_tables_are_left_alone(engine: AsyncEngine) -> None:
    await execute(
        engine,
        "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT)",
        "INSERT INTO users VALUES (1, 'anna')",
        "CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)",
        "INSERT INTO alembic_version VALUES ('abc')",
    )
    await migrate.upgrade(engine)
    assert await migrate.differences(engine) == []
    assert await migrate.current(engine) == migrate.head()
    await migrate.downgrade(engine, "base")
    async with engine.begin() as connection:
        kept = (await connection.execute(text("SELECT name, version_num FROM users, alembic_version"))).one()

    assert tuple(kept) == ("anna", "abc")
    assert await tables(engine) == {"users", "alembic_version", migrate.VERSION_TABLE}


async def test_a_schema_that_is_behind_or_ahead_says_what_to_run(engine: AsyncEngine) -> None:
    """Behind: the command. Ahead: upgrade the package; and then `upgrade` changes nothing either."""
    with pytest.raises(SchemaOutOfDateError, match=r"\(none\) is behind .* run `gateway-store db upgrade`") as behind:
        await migrate.require_current(engine)
    await migrate.upgrade(engine)
    await migrate.require_current(engine)
    await execute(engine, f"UPDATE {migrate.VERSION_TABLE} SET version_num = '9999_future'")
    before = await schema(engine)
    with pytest.raises(SchemaOutOfDateError, match=r"newer than this package .* upgrade agent-gateway-store") as ahead:
        await migrate.require_current(engine)
    with pytest.raises(SchemaOutOfDateError, match="newer"):
        await migrate.upgrade(engine)

    assert (behind.value.current, behind.value.expected) == (None, migrate.head())
    assert (ahead.value.current, ahead.value.expected) == ("9999_future", migrate.head())
    assert await schema(engine) == before


FAILING = '''"""Fails half-way"""
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "0002_failing", {after!r}, None, None

def upgrade():
    op.create_table("half_way", sa.Column("id", sa.Integer, primary_key=True))
    op.add_column("api_keys", sa.Column("half_way", sa.Text))
    op.execute("INSERT INTO half_way VALUES (1)")
    raise RuntimeError("half-way")

def downgrade():
    pass
'''


@pytest.mark.parametrize("from_empty", [True, False])
async def test_a_migration_that_fails_leaves_nothing_behind(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, from_empty: bool
) -> None:
    """Neither of the step that failed nor, from an empty database, of the steps before it."""
    if not from_empty:
        await migrate.upgrade(engine)
    before = await tables(engine)
    scripts = tmp_path / "scripts"
    shutil.copytree(migrate.migrations_path(), scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "versions" / "0002_failing.py").write_text(FAILING.format(after=migrate.head()))
    with monkeypatch.context() as patched:
        patched.setattr(migrate, "migrations_path", lambda: scripts)
        with pytest.raises(RuntimeError, match="half-way"):
            await migrate.upgrade(engine)

    assert await tables(engine) == before
    await migrate.upgrade(engine)
    assert await migrate.differences(engine) == []


EIGHT = """
import asyncio, multiprocessing, os, sys
from agent_gateway_store.storage import migrate
from agent_gateway_store.storage.database import create_engine

async def upgrade():
    engine = create_engine(os.environ["DATABASE_URL"])
    await migrate.upgrade(engine)
    await migrate.require_current(engine)
    await engine.dispose()

def work(barrier):
    barrier.wait()
    asyncio.run(upgrade())

fork = multiprocessing.get_context("fork")
barrier = fork.Barrier(8)
children = [fork.Process(target=work, args=(barrier,)) for _ in range(8)]
for child in children:
    child.start()
for child in children:
    child.join()
sys.exit(sum(child.exitcode != 0 for child in children))
"""


@pytest.mark.system
async def test_eight_processes_may_upgrade_at_once(url: str, engine: AsyncEngine) -> None:
    environment = {**os.environ, "DATABASE_URL": url}
    ended = await asyncio.to_thread(forks().run, ["-c", EIGHT], cwd=Path.cwd(), env=environment, timeout=60)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert await migrate.current(engine) == migrate.head()
    assert await migrate.differences(engine) == []


@pytest.mark.system
async def test_many_databases_may_be_migrated_in_one_process(make_url: Callable[[], str]) -> None:
    """By tasks of one loop and by threads: Alembic's module globals do not get mixed up."""
    engines = [create_engine(make_url()) for _ in range(3)]
    elsewhere = [make_url() for _ in range(2)]

    async def there(url: str) -> None:
        engine = create_engine(url)
        await migrate.upgrade(engine)
        await engine.dispose()

    tasks = [*(migrate.upgrade(engine) for engine in (*engines, engines[0]))]
    threads = [asyncio.to_thread(asyncio.run, there(url)) for url in elsewhere]
    await asyncio.gather(*tasks, *threads)
    engines += map(create_engine, elsewhere)
    for engine in engines:
        assert await migrate.differences(engine) == []
        assert await migrate.current(engine) == migrate.head()
        await engine.dispose()


async def test_each_database_has_an_identity_of_its_own(make_url: Callable[[], str]) -> None:
    """Made by the database that is migrated, so that one script gives each another; the row stays the only one."""
    found = []
    for number in range(4):
        engine = create_engine(make_url())
        if number < 2:
            await migrate.upgrade(engine)
        else:
            await _run_script(engine, migrate.sql(f"{engine.dialect.name}:///name"))
        await migrate.require_current(engine)
        found.append(await read_identity(engine))
        with pytest.raises(IntegrityError):
            await execute(engine, "INSERT INTO database_identity (id, identity) VALUES (2, 'x')")
        await migrate.upgrade(engine)
        assert await read_identity(engine) == found[-1]
        await engine.dispose()

    assert len({*found}) == 4
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in found)


async def _run_script(engine: AsyncEngine, script: str) -> None:
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await (driver.executescript if engine.dialect.name == "sqlite" else driver.execute)(script)


async def test_sql_for_postgresql_gives_the_same_schema(postgres_database: Callable[[], str]) -> None:
    """`sql()` connects to nothing; what it prints, run by hand, is a database at `head`."""
    script = migrate.sql("postgresql://nobody:secret@127.0.0.1:1/nothing")
    url = postgres_database()
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    await connection.execute(script)
    await connection.close()
    engine = create_engine(url)

    assert "JSONB" in script
    assert script.count("CREATE TABLE") == 15
    assert "secret" not in script
    await migrate.require_current(engine)
    assert await migrate.differences(engine) == []
    await engine.dispose()


async def test_sql_for_sqlite_gives_the_same_schema(tmp_path: Path) -> None:
    """The file that the URL names is not even made."""
    script = migrate.sql(f"sqlite:///{tmp_path}/never.db")
    with closing(sqlite3.connect(tmp_path / "test.db")) as connection:
        connection.executescript(script)
    engine = create_engine(f"sqlite:///{tmp_path}/test.db")

    assert "JSONB" not in script
    assert not (tmp_path / "never.db").exists()
    await migrate.require_current(engine)
    assert await migrate.differences(engine) == []
    await engine.dispose()


async def test_a_folder_that_is_missing_is_one_sentence(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/none/test.db")
    for step in (migrate.upgrade, migrate.current, migrate.differences):
        with pytest.raises(StoreUnavailableError, match="folder exists"):
            await step(engine)
    await engine.dispose()


@pytest.mark.system
def test_contributors_can_run_alembic(postgres_database: Callable[[], str]) -> None:
    """`alembic upgrade head` and `alembic check` in a checkout, on DATABASE_URL, find no difference."""
    environment = {**os.environ, "DATABASE_URL": postgres_database()}
    for arguments in (["upgrade", "head"], ["check"], ["current"]):
        ended = forks().run(["-m", "alembic", *arguments], cwd=ROOT, env=environment, timeout=60)
        assert ended.returncode == 0, ended.stderr

    assert f"{migrate.head()} (head)" in ended.stdout


async def test_the_shortcut_of_the_other_tests_gives_the_same_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty SQLite database gets what the migrations make of one, and an identity that no other has."""
    made = [create_engine(f"sqlite:///{tmp_path}/{number}.db") for number in range(3)]
    await migrate.upgrade(made[0])
    once.empty_files_are_migrated_once(monkeypatch)
    for engine in made[1:]:
        await migrate.upgrade(engine)
    found = [await schema(engine) for engine in made]
    identities = {await read_identity(engine) for engine in made}
    revisions = {await migrate.current(engine) for engine in made}
    for engine in made:
        await engine.dispose()

    assert found[0] == found[1] == found[2]
    assert revisions == {migrate.head()}
    assert len(identities) == 3
