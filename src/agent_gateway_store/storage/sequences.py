"""The sequences of PostgreSQL that number rows: a copy without them begins again at 1, below the rows that it has.

Logical replication does not copy them, nor does a dump of the rows alone. New rows then meet old ones, and an event
that takes the id of one that was pruned is taken for it.
"""

from __future__ import annotations

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.models.tables import metadata

# Ids that were given and are not in the table itself any more.
_ALSO_GIVEN = {"audit_events": "(SELECT max(event_id) FROM audit_leaves)"}


def _numbered() -> list[str]:
    return [each.name for each in metadata.sorted_tables if each.autoincrement_column is not None]


def _given(table: str) -> str:
    ids = [f"(SELECT max(id) FROM {table})"]  # noqa: S608  names of our own
    return f"greatest({', '.join([*ids, *filter(None, [_ALSO_GIVEN.get(table)])])}, 0)"


def _is_behind(table: str) -> str:
    # No row where the table has no sequence, or this role may not read it.
    return f"""
        SELECT '{table}' FROM pg_get_serial_sequence('{table}', 'id') AS sequence
        WHERE has_sequence_privilege(sequence, 'USAGE, SELECT')
            AND coalesce(pg_sequence_last_value(sequence::regclass), 0) < {_given(table)}
        """  # noqa: S608  names of our own


async def tables_behind(connection: AsyncConnection) -> list[str]:
    """Return the tables whose next id lies at or below one that was given; none on SQLite."""
    if connection.dialect.name != "postgresql":
        return []
    found = await connection.execute(text(" UNION ALL ".join(map(_is_behind, _numbered()))))
    return sorted(found.scalars())


async def advance(connection: AsyncConnection) -> None:
    """Let every sequence of PostgreSQL go on after the highest id that was given; does not commit."""
    for table in await tables_behind(connection):
        await connection.execute(text(f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), {_given(table)})"))


async def require_events_ahead(driver: asyncpg.Connection) -> None:
    """Raise StoreUnavailableError if the next event would get a used id; a role that cannot see that passes."""
    try:
        found = await driver.fetchval(_is_behind("audit_events"))
    except asyncpg.InsufficientPrivilegeError:
        return
    if found is not None:
        raise StoreUnavailableError(
            "The database could not number events: it gives ids that are in use, as in a copy without its sequences: "
            "run `gateway-store db restored --by NAME`."
        )
