"""How-to: the Alembic environment of a host application that shares the database."""

import asyncio

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData

# --8<-- [start:env]
from agent_gateway_store.models.tables import metadata as store_metadata
from agent_gateway_store.storage.migrate import VERSION_TABLE

STORE_TABLES = {*store_metadata.tables, VERSION_TABLE}


def include_object(item: object, name: str | None, kind: str, reflected: bool, compare_to: object) -> bool:
    """Leave the tables of agent-gateway-store out of this application's migrations."""
    return not (kind == "table" and reflected and name in STORE_TABLES)


# In env.py: context.configure(..., include_object=include_object)
# --8<-- [end:env]

from agent_gateway_store import GatewayStore


def differences(connection: Connection, **options: object) -> list[object]:
    return compare_metadata(MigrationContext.configure(connection, opts=options), MetaData())


async def main() -> None:
    async with GatewayStore() as store, store.database.engine.connect() as connection:
        assert await connection.run_sync(lambda sync: differences(sync)), "without it Alembic would drop our tables"
        assert not await connection.run_sync(lambda sync: differences(sync, include_object=include_object))


asyncio.run(main())
