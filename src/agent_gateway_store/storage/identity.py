"""What names a database, however its URL is spelt: read from its one row of `database_identity`."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from agent_gateway_store.errors import SchemaOutOfDateError
from agent_gateway_store.models.evidence import identity_table
from agent_gateway_store.storage.database import AnyConnection, reader_of
from agent_gateway_store.storage.errors import translate_errors
from agent_gateway_store.storage.statements import Statement

IDENTITY = select(identity_table.c.identity)
_RESTORED = Statement(IDENTITY.where(identity_table.c.history_id.is_not(None)))


async def read_identity(engine: AsyncEngine, *, reads: bool = False) -> str:
    """Return the identity of the database that answers.

    Args:
        engine: Of this database.
        reads: It is that of DATABASE_READ_URL.

    Raises:
        SchemaOutOfDateError: See `known`; or the table is missing.
        StoreUnavailableError: The database does not answer.
    """
    with translate_errors("read its identity at DATABASE_READ_URL" if reads else "read its identity"):
        async with reader_of(engine).connect() as connection:
            return known((await connection.execute(IDENTITY)).scalar())


async def is_standby(engine: AsyncEngine) -> bool:
    """Return True if PostgreSQL answers from a standby."""
    if engine.dialect.name != "postgresql":
        return False
    with translate_errors("be read"):
        async with reader_of(engine).connect() as connection:
            return bool((await connection.exec_driver_sql("SELECT pg_is_in_recovery()")).scalar())


def known(identity: str | None) -> str:
    """Return `identity`.

    Raises:
        SchemaOutOfDateError: It is None: somebody has deleted the row.
    """
    if identity is None:
        raise SchemaOutOfDateError(
            "The database has lost its identity: run `gateway-store db restored --by NAME`, which gives it a new one."
        )
    return identity


async def restored_identity(connection: AnyConnection) -> str | None:
    """Return the identity that `db restored` gave; None: it never ran. Cursors of listings are bound to it."""
    rows = await _RESTORED.tuples(connection, {})
    return rows[0][0] if rows else None
