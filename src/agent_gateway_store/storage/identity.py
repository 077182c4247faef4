"""What names a database, however its URL is spelt: read from its one row of `database_identity`."""

from __future__ import annotations

import logging

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from agent_gateway_store.errors import InvalidUrlError, SchemaOutOfDateError, StoreUnavailableError
from agent_gateway_store.models.evidence import identity_table
from agent_gateway_store.storage.database import AnyConnection, Database, reader_of
from agent_gateway_store.storage.errors import translate_errors
from agent_gateway_store.storage.statements import Statement

_logger = logging.getLogger("agent_gateway_store.storage")

IS_APART = (
    "DATABASE_READ_URL leads to a server of its own, as after a promotion, and to no standby of the one in "
    "DATABASE_URL: what is read there grows old. Point both URLs at one primary and its standbys."
)
"""What to say of a server that is not a replica any more."""
IDENTITY = select(identity_table.c.identity)
_RESTORED = Statement(IDENTITY.where(identity_table.c.history_id.is_not(None)))


async def read_identity(engine: AsyncEngine, *, reads: bool = False) -> str:
    """Return the identity of the database that answers; `reads`: it is that of DATABASE_READ_URL.

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


async def check_replica(database: Database, identity: str) -> None:
    """Log it if the server of DATABASE_READ_URL is away or no replica; raise InvalidUrlError if it is another's."""
    if (replica := database.replica) is database:
        return
    try:
        if await read_identity(replica.engine, reads=True) != identity:
            raise InvalidUrlError("DATABASE_READ_URL leads to another database, not to a replica of this one.")
        if await database.is_replica_apart():
            _logger.error(IS_APART)
    except StoreUnavailableError as exc:
        _logger.warning("The replica of DATABASE_READ_URL is away, and what reads there will fail: %s", exc)


def known(identity: str | None) -> str:
    """Return `identity`; raise SchemaOutOfDateError if it is None, because somebody has deleted the row."""
    if identity is None:
        raise SchemaOutOfDateError(
            "The database has lost its identity: run `gateway-store db restored --by NAME`, which gives it a new one."
        )
    return identity


async def restored_identity(connection: AnyConnection) -> str | None:
    """Return the identity that `db restored` gave; None: it never ran. Cursors of listings are bound to it."""
    rows = await _RESTORED.tuples(connection, {})
    return rows[0][0] if rows else None
