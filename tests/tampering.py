"""What whoever owns the database can do: change a table whose triggers refuse that."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import Table, delete, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agent_gateway_store.models.tables import metadata

OFF = "SET session_replication_role = replica"
"""In a session of a superuser of PostgreSQL no trigger runs from here on."""
LOCAL_OFF = "SET LOCAL session_replication_role = replica"
"""The same until the transaction ends: behind a pooler the session is used by others afterwards."""


@asynccontextmanager
async def triggers_off(connection: AsyncConnection) -> AsyncIterator[AsyncConnection]:
    """Change what is append-only on this connection, within its transaction."""
    if connection.dialect.name == "postgresql":
        before, after = LOCAL_OFF, "SET LOCAL session_replication_role = origin"
    else:
        before, after = "INSERT INTO audit_door VALUES (0)", "DELETE FROM audit_door"
    await connection.exec_driver_sql(before)
    yield connection
    await connection.exec_driver_sql(after)


async def tamper(engine: AsyncEngine, *statements: str, values: Iterable[dict[str, Any]] = ()) -> None:
    """Run statements in one transaction, whatever the triggers say."""
    async with engine.begin() as connection, triggers_off(connection):
        for statement, parameters in zip(statements, [*values, *[{}] * len(statements)], strict=False):
            await connection.execute(text(statement), parameters)


async def sealed_rows(engine: AsyncEngine) -> dict[Table, list[dict[str, Any]]]:
    """The rows of a sealed log, by table."""
    tables = [metadata.tables[f"audit_{name}"] for name in ("events", "leaves", "tiles", "checkpoints")]
    async with engine.connect() as connection:
        return {table: [dict(row) for row in (await connection.execute(select(table))).mappings()] for table in tables}


async def put_back(connection: AsyncConnection, rows: dict[Table, list[dict[str, Any]]]) -> None:
    """Take back whatever was changed in a sealed log."""
    for table, kept in rows.items():
        await connection.execute(delete(table))
        await connection.execute(insert(table), kept)
