"""Tables to which rows are only added: triggers refuse the rest, to everybody, but for a transaction that opens a door.

They stop accidents. The owner of the tables can switch them off; what was done then is for `verify` to find.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import UniqueConstraint, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_gateway_store.models.evidence import door_table
from agent_gateway_store.models.tables import metadata

TABLES = ("audit_events", "audit_leaves", "audit_checkpoints")
LOG_TABLES = (*TABLES, "audit_tiles", "database_identity")
"""All tables of the sealed log; rows of the last two are replaced as it grows."""

_DOOR = door_table.name
_CURRENT = "pg_current_xact_id()::text::bigint"
# With the rights of the owner, since nobody else need see the door; by its schema's name, so that no temporary table of
# the same name is taken for it. Without a percent sign, which a printed script would hold twice.
_FUNCTION = f"""
CREATE OR REPLACE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    is_open boolean;
BEGIN
    EXECUTE 'SELECT EXISTS (SELECT FROM ' || quote_ident(TG_TABLE_SCHEMA)
        || '.{_DOOR} WHERE transaction_id = {_CURRENT})' INTO is_open;
    IF NOT is_open THEN
        RAISE EXCEPTION USING ERRCODE = 'restrict_violation',
            MESSAGE = TG_TABLE_NAME || ' is append-only: ' || TG_OP || ' is refused';
    END IF;
    RETURN NULL;
END $$
"""  # noqa: S608  names of our own


def triggers(dialect: str, table: str) -> dict[str, str]:
    """Return the statements that create the triggers of a table, by the names of these."""
    if dialect == "postgresql":
        # Once for each statement: an UPDATE that would find no row is refused as well.
        refused = f"BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} FOR EACH STATEMENT"
        name = f"{table}_append_only"
        return {name: f"CREATE TRIGGER {name} {refused} EXECUTE FUNCTION audit_append_only()"}
    return {
        f"{table}_no_{what.lower()}": (
            f"CREATE TRIGGER {table}_no_{what.lower()} BEFORE {what} ON {table} "  # noqa: S608  names of our own
            f"WHEN NOT EXISTS (SELECT 1 FROM {_DOOR}) "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only: {what} is refused'); END"
        )
        for what in ("UPDATE", "DELETE")
    }


def protection(dialect: str, *tables: str) -> list[str]:
    """Return the statements that make tables append-only; a migration that builds one anew runs them afterwards."""
    function = [_FUNCTION] if dialect == "postgresql" else []
    return function + [statement for table in tables for statement in triggers(dialect, table).values()]


@asynccontextmanager
async def open_door(connection: AsyncConnection) -> AsyncIterator[None]:
    """Let the transaction of `connection` change and delete rows in the body; needs the right to write the door's row.

    On PostgreSQL no other transaction may; SQLite has one writer at a time. A rollback takes the row back.
    """
    own = _CURRENT if connection.dialect.name == "postgresql" else "0"
    await connection.execute(text(f"INSERT INTO {_DOOR} VALUES ({own})"))  # noqa: S608  names of our own
    yield
    await connection.execute(text(f"DELETE FROM {_DOOR} WHERE transaction_id = {own}"))  # noqa: S608  likewise


async def unprotected(connection: AsyncConnection) -> dict[str, str]:
    """Return the triggers that are not as they were made, or not on, each with the statement that puts it right.

    On PostgreSQL their function may be among them.
    """
    if connection.dialect.name == "postgresql":
        return await _unprotected_postgres(connection)
    found = {row.name: row for row in await connection.execute(text(SQLITE_TRIGGERS))}
    return {
        name: f"DROP TRIGGER {name}; {statement}" if name in found else statement
        for table in TABLES
        for name, statement in triggers("sqlite", table).items()
        if name not in found or (found[name].tbl_name, found[name].sql) != (table, statement)
    }


async def _unprotected_postgres(connection: AsyncConnection) -> dict[str, str]:
    found = {row.tgname: row for row in await connection.execute(text(_POSTGRES_FOUND))}
    wrong = {}
    # White space is not compared: a statement that was pasted into one line does the same.
    body = " ".join(_FUNCTION.split("$$")[1].split())
    if any(row.is_ours and (" ".join(row.prosrc.split()) != body or not row.is_safe) for row in found.values()):
        wrong["audit_append_only"] = " ".join(_FUNCTION.split())
    for table in TABLES:
        for name, statement in triggers("postgresql", table).items():
            row = found.get(name)
            if row is None:
                wrong[name] = statement
            elif not row.is_ours or row.tgtype != _REFUSED or row.is_narrowed:
                wrong[name] = f"DROP TRIGGER {name} ON {table}; {statement}"
            elif not row.is_on:
                wrong[name] = f"ALTER TABLE {table} ENABLE TRIGGER {name}"
    return wrong


async def foreign_triggers(connection: AsyncConnection) -> list[str]:
    """Return the names of triggers, and on PostgreSQL of rules, on these tables that are not ours."""
    dialect = connection.dialect.name
    if dialect == "postgresql":
        return sorted({row.rule for row in await connection.execute(text(POSTGRES_OTHERS)) if row.fault != "off"})
    ours = {name for table in TABLES for name in triggers(dialect, table)}
    found = await connection.execute(text(SQLITE_TRIGGERS))
    return sorted({str(row.name) for row in found if row.tbl_name in LOG_TABLES} - ours)


async def is_door_open(connection: AsyncConnection) -> bool:
    """True if a transaction that was committed has left the door open; False where this role may not see that."""
    if connection.dialect.name == "postgresql":
        may_read = text(f"SELECT has_table_privilege('{_DOOR}', 'SELECT')")
        if not (await connection.execute(may_read)).scalar():
            return False
    return bool((await connection.execute(text(f"SELECT EXISTS (SELECT 1 FROM {_DOOR})"))).scalar())  # noqa: S608  likewise


async def where_triggers_are_off(connection: AsyncConnection) -> list[str]:
    """Return for whom PostgreSQL does not fire triggers, as a replica; each with the statement that mends it."""
    if connection.dialect.name != "postgresql":
        return []
    return list((await connection.execute(text(_REPLICATING))).scalars())


# What pg_trigger.tgtype holds of BEFORE (2) DELETE (8) OR UPDATE (16) OR TRUNCATE (32) FOR EACH STATEMENT (0).
_REFUSED = 2 + 8 + 16 + 32
_OUR_TABLES = "(ARRAY[to_regclass('audit_events'), to_regclass('audit_leaves'), to_regclass('audit_checkpoints')])"
# tgenabled O: on, but for a session that replicates; A: always.
_POSTGRES_FOUND = f"""
SELECT tgname, tgtype, tgenabled IN ('O', 'A') AS is_on, proname = 'audit_append_only' AS is_ours, prosrc,
    tgqual IS NOT NULL OR tgattr::text <> '' AS is_narrowed,
    prosecdef AND coalesce(proconfig = ARRAY['search_path=pg_catalog, pg_temp'], false) AS is_safe
FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
WHERE tgrelid = ANY {_OUR_TABLES}
"""  # noqa: S608  names of our own
# The value of a setting stands there as it was typed.
_REPLICATING = """
WITH settings AS (
    SELECT concat_ws(' ', 'ALTER', 'ROLE ' || CASE setrole WHEN 0 THEN NULL ELSE setrole::regrole::text END,
        CASE WHEN setrole <> 0 AND setdatabase <> 0 THEN 'IN' END, 'DATABASE ' || quote_ident(datname),
        'RESET session_replication_role') AS statement
    FROM pg_catalog.pg_db_role_setting LEFT JOIN pg_catalog.pg_database ON pg_database.oid = setdatabase
    WHERE 'session_replication_role=replica' = ANY (lower(setconfig::text COLLATE "C")::text[])
        AND (setdatabase = 0 OR datname = current_database())
)
SELECT statement FROM settings UNION ALL SELECT 'ALTER SYSTEM RESET session_replication_role'
WHERE current_setting('session_replication_role') = 'replica' AND NOT EXISTS (SELECT FROM settings)
"""
# What pg_trigger.tgtype holds of FOR EACH ROW (1) BEFORE (2) INSERT (4).
_BEFORE_ROW_INSERT = 1 + 2 + 4
# Triggers of PostgreSQL's own run functions with an id below 16384. tgenabled R: in sessions that replicate alone.
POSTGRES_OTHERS = f"""
SELECT CASE WHEN tgtype & {_BEFORE_ROW_INSERT} = {_BEFORE_ROW_INSERT} AND tgenabled <> 'D'
    AND (tgenabled <> 'R' OR EXISTS (SELECT FROM ({_REPLICATING}) AS sessions)) THEN 'trigger' ELSE 'other' END
    AS fault, name, tgname::text AS rule
FROM unnest(ARRAY{[*LOG_TABLES]}) AS name JOIN pg_catalog.pg_trigger ON tgrelid = to_regclass(name)
WHERE (NOT tgisinternal OR tgfoid >= 16384) AND NOT (tgname = name || '_append_only' AND tgtype = {_REFUSED})
UNION ALL
SELECT 'other', name, rulename::text
FROM unnest(ARRAY{[*LOG_TABLES]}) AS name JOIN pg_catalog.pg_rewrite ON ev_class = to_regclass(name)
UNION ALL
SELECT 'off', '', statement FROM ({_REPLICATING}) AS sessions
"""  # noqa: S608  likewise
"""What others have put on the tables of the log: fault, table and name."""
# SQLite runs what the text says, though other columns of its row were altered in case, into bytes, or behind a NUL.
SQLITE_TRIGGERS = """
SELECT lower(printf('%s', tbl_name)) AS tbl_name, name, sql FROM sqlite_master WHERE NOT coalesce(
    sql LIKE 'CREATE TABLE %' OR sql LIKE 'CREATE VIRTUAL TABLE %' OR sql LIKE 'CREATE VIEW %'
        OR sql LIKE 'CREATE INDEX %' OR sql LIKE 'CREATE UNIQUE INDEX %', true)
"""
"""The triggers, and what SQLite may run as one, with their tables."""
_LOG = [metadata.tables[name] for name in LOG_TABLES]
# By the names of `pg_catalog`: others can be taken.
_CATALOG_TYPES = {
    "BIGINT": "int8", "BYTEA": "bytea", "FLOAT(53)": "float8", "INTEGER": "int4", "JSONB": "jsonb", "TEXT": "text",
    "TIMESTAMP WITH TIME ZONE": "timestamptz", "UUID": "uuid",
}  # fmt: skip
_POSTGRES = postgresql.dialect()  # type: ignore[no-untyped-call]
_COLUMNS = [
    f"('{each.name}', '{column.name}', '{_CATALOG_TYPES[column.type.compile(_POSTGRES)]}')"
    for each in _LOG
    for column in each.columns
]
# By their columns, for an index may have any name. Two rows with one primary key are seen where they are read.
_UNIQUE = ", ".join(
    f"('{each.name}', '{', '.join(sorted(constraint.columns.keys()))}')"
    for each in _LOG
    for constraint in each.constraints
    if isinstance(constraint, UniqueConstraint)
)
STRANGE_ON_POSTGRES = f"""
SELECT fault, name, NULL FROM unnest(ARRAY{[*LOG_TABLES]}) AS name
LEFT JOIN pg_catalog.pg_class AS found ON found.oid = to_regclass(name)
CROSS JOIN LATERAL (VALUES
    ('table', found.relkind IS DISTINCT FROM 'r'),
    ('children', found.relkind = 'r' AND EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE inhparent = found.oid)),
    ('unlogged', found.relkind = 'r' AND found.relpersistence <> 'p'),
    ('rule', found.relkind = 'r' AND EXISTS (
        SELECT FROM pg_catalog.pg_rewrite WHERE ev_class = found.oid AND ev_type = '3' AND is_instead
    ))
) AS faults (fault, is_so) WHERE is_so
UNION ALL
SELECT 'column', name, concat(column_name, ' ', type)
FROM (VALUES {", ".join(_COLUMNS)}) AS columns (name, column_name, type)
WHERE NOT EXISTS (
    SELECT FROM pg_catalog.pg_attribute
    WHERE attrelid = to_regclass(name) AND attname = column_name AND attgenerated = ''
        AND atttypid = to_regtype('pg_catalog.' || type)
)
UNION ALL
SELECT 'twice', name, columns FROM (VALUES {_UNIQUE}) AS keys (name, columns)
JOIN pg_catalog.pg_class AS found ON found.oid = to_regclass(name) AND relkind = 'r'
WHERE NOT EXISTS (
    SELECT FROM pg_catalog.pg_index
    WHERE indrelid = found.oid AND indisunique AND indisvalid AND indpred IS NULL AND indexprs IS NULL AND columns = (
        SELECT string_agg(attname::text, ', ' ORDER BY attname) FROM pg_catalog.pg_attribute
        WHERE attrelid = found.oid AND attnum = ANY ((indkey::int2[])[0 : indnkeyatts - 1])
    )
)
UNION ALL {POSTGRES_OTHERS}
"""  # noqa: S608  names of our own
"""What shows each reader what it likes, or lets a row be there twice, and what others put there: as `POSTGRES_OTHERS`.

A view, a table of another server, a table whose rows come from others, too, a column that is computed or keeps JSON as
somebody spelled it.
"""
STRANGE_ON_SQLITE = f"""
SELECT 'table', value, NULL, NULL FROM json_each('{json.dumps(LOG_TABLES)}')
WHERE NOT EXISTS (SELECT 1 FROM sqlite_master WHERE name = value AND type = 'table' AND rootpage > 0)
    OR EXISTS (SELECT 1 FROM sqlite_temp_master WHERE name = value)
UNION ALL
SELECT 'twice', column1, column2, NULL FROM (VALUES {_UNIQUE})
JOIN sqlite_master AS found ON found.name = column1 AND type = 'table'
WHERE NOT EXISTS (
    SELECT 1 FROM pragma_index_list(column1) AS key
    WHERE "unique" AND NOT partial AND column2 = (
        SELECT group_concat(part, ', ') FROM (
            SELECT coalesce(name, '') AS part FROM pragma_index_info(key.name) ORDER BY name
        )
    )
)
UNION ALL
SELECT 'trigger', tbl_name, name, printf('%s', sql) FROM ({SQLITE_TRIGGERS})
"""  # noqa: S608  likewise
"""The same of SQLite, with all triggers."""
