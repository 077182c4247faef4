"""Tables to which rows are only added: triggers refuse the rest, to everybody, but for a transaction that opens a door.

They stop accidents. Whoever owns the tables can switch them off; what was done then is for `verify` to find.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_gateway_store.models.evidence import door_table

TABLES = ("audit_events", "audit_leaves", "audit_checkpoints")

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
    """Return the triggers that are missing or switched off, each with the statement that puts it back."""
    dialect = connection.dialect.name
    rows = await connection.execute(text(_POSTGRES_FOUND if dialect == "postgresql" else _SQLITE_FOUND))
    found = {name: bool(is_on) for name, is_on in rows}
    return {
        name: f"ALTER TABLE {table} ENABLE TRIGGER {name}" if name in found else statement
        for table in TABLES
        for name, statement in triggers(dialect, table).items()
        if not found.get(name)
    }


# O: on, but for a session that replicates; A: always.
_POSTGRES_FOUND = """
SELECT tgname, tgenabled IN ('O', 'A') FROM pg_trigger
WHERE tgrelid = ANY (ARRAY[to_regclass('audit_events'), to_regclass('audit_leaves'), to_regclass('audit_checkpoints')])
"""
_SQLITE_FOUND = "SELECT name, 1 FROM sqlite_master WHERE type = 'trigger'"
