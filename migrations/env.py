"""Alembic environment: runs on a connection that is handed in, or opens one by DATABASE_URL."""

from __future__ import annotations

import asyncio
from typing import Any

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import JSON, Connection, DateTime
from sqlalchemy.types import TypeDecorator

from agent_gateway_store.models.tables import metadata
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.storage.database import create_engine
from agent_gateway_store.storage.migrate import VERSION_TABLE, include_object


def render_item(kind: str, item: Any, autogen_context: AutogenContext) -> str | bool:
    """Write plain SQLAlchemy types into scripts, so that no script imports model code."""
    if kind != "type":
        return False
    plain = item.impl if isinstance(item, TypeDecorator) else item
    if isinstance(plain, JSON):
        autogen_context.imports.add("from sqlalchemy.dialects import postgresql")
        return 'sa.JSON().with_variant(postgresql.JSONB(), "postgresql")'
    if isinstance(plain, DateTime):
        return "sa.DateTime(timezone=True)"
    return f"sa.{type(plain).__name__}()" if plain is not item else False


OPTIONS: dict[str, Any] = {
    "target_metadata": metadata,
    "version_table": VERSION_TABLE,
    "compare_type": True,
    "include_object": include_object,
    "render_item": render_item,
    # SQLite takes DDL back, too: a migration that dies half-way leaves nothing behind.
    "transactional_ddl": True,
}


def run(connection: Connection) -> None:
    """Run on `connection`, which is in no transaction, so that a step can commit before it builds an index."""
    context.configure(connection=connection, **OPTIONS)
    with context.begin_transaction():
        context.run_migrations()


async def run_by_url() -> None:
    """Run on DATABASE_URL: the way of `alembic` on the command line of a checkout."""
    engine = create_engine(StoreSettings().database_url)
    async with engine.connect() as connection:
        await connection.run_sync(run)
    await engine.dispose()


if context.is_offline_mode():
    context.configure(
        dialect_name=context.config.attributes.get("dialect", "postgresql"), literal_binds=True, **OPTIONS
    )
    with context.begin_transaction():
        context.run_migrations()
elif (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    asyncio.run(run_by_url())
