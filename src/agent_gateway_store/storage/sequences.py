"""The sequences of PostgreSQL that number rows: a copy without them begins again at 1, below the rows that it has.

Logical replication does not copy them, nor does a dump of the rows alone. New rows then meet old ones, and an event
that takes the id of one that was pruned is taken for it.
"""

from __future__ import annotations

import asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.models.tables import metadata
from agent_gateway_store.storage.asyncpg_pool import RawConnection
from agent_gateway_store.storage.database import AnyConnection
from agent_gateway_store.storage.errors import IDS_IN_USE

HIGHEST_ID = 2**62
"""Chosen: half of what a column holds. No store gives an id above it."""

# NULL for a role that may not look.
_SEQUENCE = """
SELECT sequence FROM pg_get_serial_sequence($1, 'id') AS sequence
WHERE has_sequence_privilege(sequence, 'SELECT') AND has_table_privilege($1, 'SELECT')
    AND has_table_privilege('audit_leaves', 'SELECT')
"""


def _given(table: str) -> str:
    """Return the SQL of the highest id that was given, which may be that of an event that was pruned."""
    pruned = ", (SELECT max(event_id) FROM audit_leaves)" if table == "audit_events" else ""
    return f"greatest((SELECT max(id) FROM {table}){pruned}, 0)"  # noqa: S608  names of our own


async def _sequence_behind(driver: asyncpg.Connection, table: str) -> str | None:
    sequence: str | None = await driver.fetchval(_SEQUENCE, table)
    if sequence is None:
        return None
    # With steps of 2 or more, ids are shared with another server, whose own may be higher.
    is_behind = await driver.fetchval(
        f"SELECT last_value + is_called::int <= {_given(table)} AND seqincrement = 1 "  # noqa: S608  likewise
        f"FROM {sequence}, pg_sequence WHERE seqrelid = '{sequence}'::regclass"
    )
    return sequence if is_behind else None


async def require_next_id(driver: asyncpg.Connection, table: str = "audit_events") -> None:
    """Raise StoreUnavailableError if the next row of a table would get an id that was given, as far as we may look."""
    if await _sequence_behind(driver, table) is not None:
        raise StoreUnavailableError(f"The database could not number rows of {table}: {IDS_IN_USE}.")


async def require_next_id_on(connection: AnyConnection, table: str) -> None:
    """Check as `require_next_id` does, on a connection of either kind. SQLite always goes on after the highest id."""
    if connection.dialect.driver == "asyncpg":
        await require_next_id(await _driver_of(connection), table)


async def tables_behind(connection: AsyncConnection) -> list[str]:
    """Return the tables whose next id was given before; none on SQLite."""
    if connection.dialect.name != "postgresql":
        return []
    driver = await _driver_of(connection)
    return [table for table in _numbered() if await _sequence_behind(driver, table) is not None]


async def advance(connection: AsyncConnection) -> None:
    """Let every sequence of PostgreSQL that is behind go on after the highest id that was given; does not commit."""
    driver = await _driver_of(connection)
    for table in _numbered():
        if (sequence := await _sequence_behind(driver, table)) is not None:
            # Before a sequence is set, which no rollback takes back.
            if (given := await driver.fetchval(f"SELECT {_given(table)}")) > HIGHEST_ID:
                raise StoreUnavailableError(
                    f"The database could not number rows of {table}: somebody has given one the id {given}, and hardly "
                    "any is left behind it. Give that row the next id of the sequence, as the owner: the how-to on "
                    "PostgreSQL says how."
                )
            await driver.execute(f"SELECT setval('{sequence}', {given})")


def _numbered() -> list[str]:
    return sorted(each.name for each in metadata.sorted_tables if each.autoincrement_column is not None)


async def _driver_of(connection: AnyConnection) -> asyncpg.Connection:
    if isinstance(connection, RawConnection):
        return connection.driver
    return (await connection.get_raw_connection()).driver_connection
