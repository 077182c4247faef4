"""Statements that are written once and run either way: through SQLAlchemy, or on the PostgreSQL driver itself.

Building, caching and executing a Core statement costs several times what the server needs for it. A prepared statement
is compiled once per dialect; on the driver it is one call with its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import asyncpg
from sqlalchemy import ColumnElement, Dialect
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.compiler import SQLCompiler

from agent_gateway_store import clock
from agent_gateway_store.storage.database import Runner
from agent_gateway_store.storage.db_clock import CLOCK_OFFSET
from agent_gateway_store.storage.driver import DriverConnection

__all__ = ["Prepared"]

_Processor: TypeAlias = Callable[[Any], Any] | None


class Prepared:
    """One statement with named parameters.

    Args:
        build: Makes the Core statement for a dialect's name, `sqlite` or `postgresql`. Its parameters are all
            `bindparam("p_...")`: a name of a column would be taken for a value to set.
        columns: What it returns, in order.
    """

    def __init__(self, build: Callable[[str], Any], columns: Sequence[ColumnElement[Any]]) -> None:
        self._build = build
        self._columns = columns
        self._compiled: dict[str, _Compiled] = {}

    async def first(self, runner: Runner, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """Run with those of `values` that it names, and return the first row by column name, or None.

        Raises:
            sqlalchemy.exc.IntegrityError: A constraint refuses the row.
        """
        return next(iter(await self.rows(runner, values)), None)

    async def rows(self, runner: Runner, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Do as `first`, and return every row."""
        dialect = (runner.get_bind() if isinstance(runner, AsyncSession) else runner).dialect
        compiled = self._compiled.get(dialect.name)
        if compiled is None:
            compiled = _Compiled(self._build(dialect.name), self._columns, dialect)
            self._compiled[dialect.name] = compiled
        given = {CLOCK_OFFSET: clock.offset().total_seconds(), **values}
        if isinstance(runner, DriverConnection):
            return await compiled.run(runner.driver, given)
        named = {name: given[name] for name in compiled.names}
        return [dict(row) for row in (await runner.execute(compiled.statement, named)).mappings()]


class _Compiled:
    """A statement in one dialect, with what turns values into parameters and a row into values."""

    def __init__(self, statement: Any, columns: Sequence[ColumnElement[Any]], dialect: Dialect) -> None:
        self.statement = statement
        sql: SQLCompiler = statement.compile(dialect=dialect)
        self.names = frozenset(sql.params)
        self._text = str(sql)
        self._parameters: list[tuple[str, _Processor]] = [
            (name, sql.binds[name].type.dialect_impl(dialect).bind_processor(dialect)) for name in sql.positiontup or ()
        ]
        self._fields: list[tuple[str, _Processor]] = [
            (column.name, column.type.dialect_impl(dialect).result_processor(dialect, None)) for column in columns
        ]

    async def run(self, driver: asyncpg.Connection, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        parameters = [values[name] if process is None else process(values[name]) for name, process in self._parameters]
        try:
            rows = await driver.fetch(self._text, *parameters)
        except asyncpg.IntegrityConstraintViolationError as exc:
            raise IntegrityError(None, None, exc) from exc
        return [
            {
                name: value if process is None else process(value)
                for (name, process), value in zip(self._fields, row.values(), strict=True)
            }
            for row in rows
        ]
