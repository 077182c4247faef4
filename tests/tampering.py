"""What whoever owns the database can do: change a table whose triggers refuse that."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy import Table, delete, insert, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings
from agent_gateway_store.models.evidence import Verification
from agent_gateway_store.models.tables import metadata
from builders import make_event

SETTINGS = StoreSettings(audit_seal_seconds=0)
"""Nothing is sealed but by the test."""

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


async def run_as_owner(url: str, *statements: str) -> None:
    """Run statements as whoever owns the database, whatever triggers say."""
    address = make_url(url)
    if address.get_backend_name() == "sqlite":
        connection = sqlite3.connect(address.database or "", isolation_level=None)
        for statement in ("INSERT INTO audit_door VALUES (0)", *statements, "DELETE FROM audit_door"):
            connection.execute(statement)
        connection.close()
        return
    server = await asyncpg.connect(address.set(drivername="postgresql").render_as_string(hide_password=False))
    for statement in (OFF, *statements):
        await server.execute(statement)
    await server.close()


async def verified_after(url: str, *statements: str, event: AuditEvent | None = None) -> Verification:
    """Seal an event, run the statements, and verify."""
    async with GatewayStore(url, redis_url="", settings=SETTINGS) as store:
        await store.audit.write(event or make_event())
        await store.evidence.seal()
        await run_as_owner(url, *statements)
        return await store.evidence.verify()
