"""What each store of a process would do again, done once for all tests of a worker: the rest of the package runs."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterable
from functools import cached_property
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import alembic.command
import pytest
from sqlalchemy import Connection, inspect, text

_INSTALLED = sysconfig.get_path("purelib")
_SCHEMA: list[str] = []

migrate = alembic.command.upgrade


class _Package(metadata.PathDistribution):
    """An installed package whose metadata is read at most once."""

    entry_points = cached_property(metadata.Distribution.entry_points.fget)  # type: ignore[attr-defined,assignment]
    metadata = cached_property(metadata.Distribution.metadata.fget)  # type: ignore[attr-defined,assignment]


def packages_are_read_once(patch: pytest.MonkeyPatch) -> None:
    """Keep what the metadata of installed packages says: each store looks into all of them for plugins."""
    every = metadata.distributions
    installed = [_Package(path) for path in Path(_INSTALLED).glob("*.dist-info")]

    def distributions(**context: Any) -> Iterable[metadata.Distribution]:
        if context:
            return every(**context)
        return chain.from_iterable(
            installed if folder == _INSTALLED else every(path=[folder]) for folder in list(sys.path)
        )

    patch.setattr(metadata, "distributions", distributions)


def empty_files_are_migrated_once(patch: pytest.MonkeyPatch) -> None:
    """Give an empty SQLite database what the migrations made of the first one, with an identity of its own.

    Alembic takes a tenth of a second for it each time. `tests/migrations` proves what it does, and goes without this.
    """

    def upgrade(config: Any, revision: str, **options: Any) -> None:
        connection: Connection | None = config.attributes.get("connection")
        if connection is None or connection.dialect.name != "sqlite" or revision != "head" or options:
            return migrate(config, revision, **options)
        is_empty = not inspect(connection).get_table_names()
        connection.rollback()
        if not is_empty or not _SCHEMA:
            migrate(config, revision)
        if not is_empty:
            return None
        with connection.begin():
            if _SCHEMA:
                for statement in _SCHEMA:
                    connection.exec_driver_sql(statement)
            else:
                _SCHEMA.extend(_statements(connection))
        return None

    patch.setattr(alembic.command, "upgrade", upgrade)


def _statements(connection: Connection) -> list[str]:
    """Return what makes another empty database the same: the schema, its revision, and an identity."""
    made = connection.execute(text("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name <> 'sqlite_sequence'"))
    [revision] = connection.execute(text("SELECT version_num FROM agent_gateway_store_version")).scalars()
    return [
        *made.scalars(),
        f"INSERT INTO agent_gateway_store_version VALUES ('{revision}')",
        "INSERT INTO database_identity (id, identity) SELECT 1, lower(hex(randomblob(16)))",
    ]
