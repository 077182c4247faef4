"""Whoever owns the database changes what its names and operators mean: `verify` is not told otherwise by them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import make_url

from agent_gateway_store import GatewayStore
from agent_gateway_store.audit.doors import DOOR_FIELDS
from agent_gateway_store.models.evidence import FindingKind
from builders import make_event
from tampering import SETTINGS, run_as_owner, verified_after

# To PostgreSQL the operator that fits the types of column and parameter best, before the one of `pg_catalog`.
OTHER_EQUALS = """
CREATE FUNCTION other_equals({kind}, varchar) RETURNS bool LANGUAGE sql AS $$
    SELECT lower(btrim($1::text)) OPERATOR(pg_catalog.=) lower($2::text)
$$;
CREATE OPERATOR = (LEFTARG = {kind}, RIGHTARG = varchar, FUNCTION = other_equals);
"""
# Fields of a door in other letters: an event of a call, as anybody may write it.
IN_OTHER_LETTERS = DOOR_FIELDS | {"mcp_server": "Gateway-Store", "caller_role": "Operator", "matched_policy_rule": " "}


def with_other_equality(url: str) -> list[str]:
    """Return the statements after which texts in other letters are equal."""
    if not url.startswith("sqlite"):
        return [OTHER_EQUALS.format(kind=kind) for kind in ("text", "varchar", "name")]
    changed = "sql"
    for name, collation in (
        ("mcp_server", "NOCASE"), ("tool_name", "NOCASE"), ("caller_role", "NOCASE"), ("matched_policy_rule", "RTRIM")
    ):  # fmt: skip
        changed = f"replace({changed}, '{name} TEXT', '{name} TEXT COLLATE {collation}')"
    return [
        "PRAGMA writable_schema = ON",
        f"UPDATE sqlite_master SET sql = {changed} WHERE name = 'audit_events'",
        "PRAGMA writable_schema = RESET",
    ]


async def test_what_the_database_calls_equal_is_no_prune(own_database_url: str) -> None:
    """Only an event whose fields are those of a prune, letter by letter, says that one was pruned."""
    async with GatewayStore(own_database_url, redis_url="", settings=SETTINGS) as store:
        await store.audit.write_many([make_event(request_id=f"r-{number}") for number in range(3)])
        call = make_event(tool_name="Audit.Prune", sanitized_args={"positions": [[0, 2]]}, **IN_OTHER_LETTERS)
        await store.audit.write(call)
        kept = await store.evidence.seal()
        assert kept is not None
    deletion = "DELETE FROM audit_events WHERE request_id LIKE 'r-1'"
    await run_as_owner(own_database_url, *with_other_equality(own_database_url), deletion)

    async with GatewayStore(own_database_url, redis_url="", settings=SETTINGS) as store:
        found = await store.evidence.verify(against=[kept])
    assert [(each.kind, each.position) for each in found.findings] == [(FindingKind.MISSING, 1)]


def without_unique(url: str, table: str, *columns: str) -> list[str]:
    """Return the statements after which a table takes rows with the same values."""
    if not url.startswith("sqlite"):
        return [f"ALTER TABLE {table} DROP CONSTRAINT uq_{table}_{'_'.join(columns)}"]
    changed = f"replace(sql, 'UNIQUE ({', '.join(columns)})', 'CHECK (true)')"
    return [
        "PRAGMA writable_schema = ON",
        f"UPDATE sqlite_master SET sql = {changed} WHERE name = '{table}'",
        f"DELETE FROM sqlite_master WHERE name = 'sqlite_autoindex_{table}_1'",
        "PRAGMA writable_schema = RESET",
        # Or open connections go on by what they have read.
        "PRAGMA schema_version = 99",
    ]


@pytest.mark.parametrize(
    ("table", "columns", "among"),
    [
        ("audit_events", ("request_id", "org_id"), "request_id, org_id, (caller_id || '')"),
        ("audit_leaves", ("event_id",), "event_id) WHERE (position > 0"),
    ],
    ids=["events", "leaves"],
)
async def test_a_table_that_takes_a_row_twice_is_seen(
    own_database_url: str, table: str, columns: tuple[str, ...], among: str
) -> None:
    """Whoever has a twin of an event sealed makes something else of it. Any unique index over the columns will do."""
    found = await verified_after(own_database_url, *without_unique(own_database_url, table, *columns))
    said = f"{table} has no unique constraint on {', '.join(sorted(columns))}:"
    assert [(each.kind, said in each.text) for each in found.findings] == [(FindingKind.ALTERED, True)]

    for number, (indexed, is_ok) in enumerate({among: False, ", ".join(sorted(columns)): True}.items()):
        await run_as_owner(own_database_url, f"CREATE UNIQUE INDEX theirs_{number} ON {table} ({indexed})")
        async with GatewayStore(own_database_url, redis_url="", settings=SETTINGS) as store:
            assert (await store.evidence.verify()).ok is is_ok, indexed


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
class TestOnSqlite:
    """Where an index says something else than its table."""

    async def test_an_index_that_hides_an_event_is_seen(self, database_url: str) -> None:
        """Searches go by it, and show everything but that one."""
        async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
            await store.audit.write_many([make_event(caller_id=name) for name in ("alice", "mallory", "bob")])
            kept = await store.evidence.seal()
            assert kept is not None
        index = "ix_audit_events_caller_id_timestamp_id"
        found_sql = f"SELECT sql FROM sqlite_master WHERE name = '{index}'"
        await run_as_owner(
            database_url,
            f"CREATE TABLE kept AS {found_sql}",
            f"DROP INDEX {index}",
            f"CREATE INDEX {index} ON audit_events (caller_id, timestamp, id) WHERE caller_id <> 'mallory'",
            "PRAGMA writable_schema = ON",
            f"UPDATE sqlite_master SET sql = (SELECT sql FROM kept) WHERE name = '{index}'",
            "PRAGMA writable_schema = RESET",
            "DROP TABLE kept",
        )

        async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
            assert not list(await store.audit.search(caller_id="mallory"))
            found = await store.evidence.verify(against=[kept])
        assert [each.kind for each in found.findings] == [FindingKind.ALTERED]
        assert f"missing from index {index}" in found.findings[0].text
        assert found.checked == 3

    async def test_an_index_that_counts_a_forged_event_as_sealed_is_seen(self, database_url: str) -> None:
        """An entry of the index of leaves without a leaf: `unsealed` is not answered out of it."""
        async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
            await store.audit.write_many([make_event(request_id=f"r-{number}") for number in range(3)])
            kept = await store.evidence.seal()
            assert kept is not None
            await store.audit.write(make_event(request_id="forged"))
        unique = "replace(sql, 'UNIQUE (event_id)', 'CHECK (true)')"
        of_leaves = "name = 'sqlite_autoindex_audit_leaves_1'"
        await run_as_owner(
            database_url,
            "CREATE TABLE leaf AS SELECT * FROM audit_leaves WHERE position = 2",
            "UPDATE audit_leaves SET event_id = 4 WHERE position = 2",
            "PRAGMA writable_schema = ON",
            "CREATE TABLE kept AS SELECT * FROM sqlite_master WHERE tbl_name = 'audit_leaves' AND type <> 'trigger'",
            f"UPDATE sqlite_master SET sql = {unique} WHERE name = 'audit_leaves'",
            f"DELETE FROM sqlite_master WHERE {of_leaves}",
            "PRAGMA writable_schema = RESET",
            "UPDATE audit_leaves SET event_id = (SELECT event_id FROM leaf) WHERE position = 2",
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_master SET sql = (SELECT sql FROM kept WHERE type = 'table') WHERE name = 'audit_leaves'",
            f"INSERT INTO sqlite_master SELECT * FROM kept WHERE {of_leaves}",
            "PRAGMA writable_schema = RESET",
            "DROP TABLE kept",
            "DROP TABLE leaf",
        )

        async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
            found = await store.evidence.verify(against=[kept])
        assert [each.kind for each in found.findings] == [FindingKind.ALTERED]
        assert "missing from index sqlite_autoindex_audit_leaves_1" in found.findings[0].text
        assert found.unsealed == 1

    async def test_an_event_behind_the_leaf_of_another_is_not_sealed(self, database_url: str) -> None:
        """Its twin was sealed, and the leaf names the other one now, as text: both are unique, and an index says so."""
        as_made = "SELECT * FROM sqlite_master WHERE tbl_name = 'audit_events' AND type <> 'trigger'"
        async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
            await store.audit.write_many([make_event(request_id=f"r-{number}") for number in range(3)])
            await run_as_owner(
                database_url,
                f"CREATE TABLE kept AS {as_made}",
                *without_unique(database_url, "audit_events", "request_id", "org_id"),
                "CREATE TABLE twin AS SELECT * FROM audit_events WHERE id = 2",
                "UPDATE twin SET id = 4",
                "INSERT INTO audit_events SELECT * FROM twin",
            )
            kept = await store.evidence.seal()
            assert kept is not None
        await run_as_owner(
            database_url,
            "UPDATE audit_events SET request_id = 'forged', content_hash = NULL WHERE id = 4",
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_master SET sql = replace(sql, 'event_id BIGINT', 'event_id') WHERE name = 'audit_leaves'",
            "UPDATE sqlite_master SET sql = (SELECT sql FROM kept WHERE type = 'table') WHERE name = 'audit_events'",
            "INSERT INTO sqlite_master SELECT * FROM kept WHERE name = 'sqlite_autoindex_audit_events_1'",
            "PRAGMA writable_schema = RESET",
            "REINDEX audit_events",
            "UPDATE audit_leaves SET event_id = '2' WHERE event_id = 4",
        )

        async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
            found = await store.evidence.verify(against=[kept])
        assert [(each.kind, each.position) for each in found.findings] == [(FindingKind.ALTERED, 3)]
        assert (found.checked, found.unsealed, found.anchored) == (3, 1, 4)

    @pytest.mark.parametrize(
        "head",
        [
            "lose BEFORE INSERT",
            "lose INSERT",
            "after BEFORE INSERT",
            '"lose AFTER INSERT" BEFORE INSERT',
            "lose/* DELETE */BEFORE INSERT",
            "lose /* a */ BEFORE /* b */ INSERT",
            "lose -- DELETE\n BEFORE INSERT",
            "loseDELETE BEFORE INSERT",
            '"lose"" DELETE " BEFORE INSERT',
            # A space to Python, a letter to SQLite.
            "lose\u3000DELETE BEFORE INSERT",
        ],
    )
    async def test_a_trigger_that_can_drop_events_is_seen(self, database_url: str, head: str) -> None:
        """However it is spelled."""
        body = "BEGIN SELECT RAISE(IGNORE), '*/ DELETE ' AS text; END"
        found = await verified_after(database_url, f"CREATE TRIGGER {head} ON AUDIT_EVENTS {body}")
        assert [each.kind for each in found.findings] == [FindingKind.ALTERED]
        assert "runs before INSERT, and can drop or change new rows" in found.findings[0].text

    @pytest.mark.parametrize(
        "head",
        [
            "theirs AFTER INSERT",
            '"their own"  after  INSERT',
            "theirs BEFORE UPDATE",
            "theirs /* copy * to / the index */ AFTER INSERT",
            "theirs -- copy\n AFTER INSERT",
            "theirs AFTER/**/INSERT",
            "copy$1 AFTER INSERT",
            '"theirs"AFTER INSERT',
            '"their ""own"""AFTER INSERT',
            "theirs BEFORE/**/DELETE",
        ],
    )
    async def test_a_trigger_that_cannot_drop_events_is_no_finding(self, database_url: str, head: str) -> None:
        """Somebody else may take events to another place."""
        found = await verified_after(database_url, f"CREATE TRIGGER {head} ON audit_events BEGIN SELECT 1; END")
        assert (found.ok, ["which is not the store's" in each for each in found.remarks]) == (True, [True])

    @pytest.mark.parametrize(
        "mask",
        [
            "type = 'Trigger'",
            "type = 'trigger' || char(0) || 'x'",
            "tbl_name = upper(tbl_name) || char(0)",
            "sql = CAST(sql AS BLOB)",
            "sql = replace(sql, 'CREATE ', 'create/**/')",
        ],
    )
    async def test_a_trigger_is_seen_whatever_its_row_says(self, database_url: str, mask: str) -> None:
        """SQLite runs its text all the same."""
        found = await verified_after(
            database_url,
            "CREATE TRIGGER lose BEFORE INSERT ON audit_events BEGIN SELECT RAISE(IGNORE); END",
            "PRAGMA writable_schema = ON",
            f"UPDATE sqlite_master SET {mask} WHERE name = 'lose'",
            "PRAGMA writable_schema = RESET",
        )
        assert ["has the trigger lose that runs before INSERT" in each.text for each in found.findings] == [True]

    @pytest.mark.parametrize("name", ["audit_leaves", "ix_audit_events_caller_id_timestamp_id"])
    async def test_a_file_with_a_page_that_cannot_be_read_is_seen(self, database_url: str, name: str) -> None:
        """As after a fault of the disk; what can still be read is verified."""
        async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
            await store.audit.write(make_event())
            await store.evidence.seal()
        path = make_url(database_url).database or ""
        connection = sqlite3.connect(path)
        ((page,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,))
        ((page_bytes,),) = connection.execute("PRAGMA page_size")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        with Path(path).open("r+b") as file:
            file.seek((page - 1) * page_bytes)
            file.write(b"x" * 100)

        async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
            found = await store.evidence.verify()
        assert [each.kind for each in found.findings] == [FindingKind.ALTERED]
        assert "The database file is damaged" in found.findings[0].text


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_the_leaf_of_a_prune_may_hold_anything(database_url: str) -> None:
    """SQLite keeps a salt that is text; the prune does not count then, and `verify` ends."""
    pruned = make_event(tool_name="audit.prune", sanitized_args={}, **DOOR_FIELDS)
    found = await verified_after(database_url, "UPDATE audit_leaves SET salt = 'text'", event=pruned)
    assert [each.kind for each in found.findings] == [FindingKind.ALTERED]


READ = ["audit_events", "audit_leaves", "audit_tiles", "audit_checkpoints", "database_identity"]
VIEW = ["ALTER TABLE {0} RENAME TO real_rows", "CREATE VIEW {0} AS SELECT * FROM real_rows"]


@pytest.mark.parametrize("name", READ)
async def test_a_view_in_place_of_a_table_is_seen(own_database_url: str, name: str) -> None:
    """It may show others something else, and this one may have no end: nothing is read from it."""
    found = await verified_after(own_database_url, *(statement.format(name) for statement in VIEW))
    assert [(each.kind, each.text.partition(".")[0]) for each in found.findings] == [
        (FindingKind.ALTERED, f"{name} is not a table")
    ]
