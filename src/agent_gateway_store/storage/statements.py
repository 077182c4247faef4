"""Statements that are written once and run on either kind of connection: SQLAlchemy's, or the PostgreSQL driver's own.

Building, caching and executing a Core statement costs several times what the server needs for it. A statement of this
module is compiled once for each dialect; on the driver it is one call with its parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
from sqlalchemy import (
    JSON,
    ColumnElement,
    Dialect,
    Executable,
    Float,
    Integer,
    any_,
    bindparam,
    column,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.selectable import TextualSelect
from sqlalchemy.types import TypeEngine

from agent_gateway_store import clock
from agent_gateway_store.models.columns import Json
from agent_gateway_store.storage.asyncpg_pool import RawConnection
from agent_gateway_store.storage.database import AnyConnection
from agent_gateway_store.storage.db_clock import CLOCK_OFFSET

_Processor: TypeAlias = Callable[[Any], Any] | None
_PARAMETER = re.compile(r":(p_\w+)")


class Statement:
    """One statement with named parameters, compiled at its first use on a dialect.

    Args:
        source: The Core statement, or what builds it for a dialect's name, `sqlite` or `postgresql`. Its parameters are
            all `bindparam("p_...")`: SQLAlchemy takes the name of a column for a value to set.
    """

    def __init__(self, source: Executable | Callable[[str], Executable]) -> None:
        self._source = source
        self._compiled: dict[str, CompiledStatement] = {}

    def compiled(self, dialect: Dialect) -> CompiledStatement:
        """Return the statement in the SQL of `dialect`."""
        found = self._compiled.get(dialect.name)
        if found is None:
            source = self._source(dialect.name) if callable(self._source) else self._source
            found = self._compiled[dialect.name] = CompiledStatement(source, dialect)
        return found

    async def first(self, connection: AnyConnection, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """Run with those of `values` that it names, and return the first row by column name, or None.

        Raises:
            sqlalchemy.exc.IntegrityError: A constraint refuses the row.
        """
        return next(iter(await self.rows(connection, values)), None)

    async def one(self, connection: AnyConnection, values: Mapping[str, Any]) -> dict[str, Any]:
        """Do as `first`, for a statement that always gives a row."""
        return (await self.rows(connection, values))[0]

    async def rows(self, connection: AnyConnection, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Do as `first`, and return every row."""
        compiled = self.compiled(connection.dialect)
        if isinstance(connection, RawConnection):
            return await compiled.run(connection.driver, values)
        result = await connection.execute(compiled.statement, compiled.named(values))
        return [dict(row) for row in result.mappings()]

    async def tuples(self, connection: AnyConnection, values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """Run and return every row as the driver gives it, without converting values."""
        compiled = self.compiled(connection.dialect)
        arguments = compiled.arguments(values)
        if isinstance(connection, RawConnection):
            return await connection.driver.fetch(compiled.text, *arguments)  # type: ignore[no-any-return]
        return (await connection.exec_driver_sql(compiled.text, tuple(arguments))).all()


class CompiledStatement:
    """A statement in one dialect, with what turns values into parameters and a row into values.

    Attributes:
        statement: The Core statement.
        text: Its SQL.
    """

    def __init__(self, statement: Executable, dialect: Dialect) -> None:
        self.statement = statement
        sql: SQLCompiler = statement.compile(dialect=dialect)  # type: ignore[attr-defined]
        self.text = str(sql)
        self._names = frozenset(sql.params)
        # Parameters that the dialect adds, such as the OFFSET 0 that SQLite's compiler writes after each LIMIT.
        self._own = {name: value for name, value in sql.params.items() if value is not None}
        self._parameters: list[tuple[str, _Processor]] = [
            (name, sql.binds[name].type.dialect_impl(dialect).bind_processor(dialect)) for name in sql.positiontup or ()
        ]
        self._dialect = dialect

    @cached_property
    def _fields(self) -> list[tuple[str, _Processor]]:
        columns = getattr(self.statement, "exported_columns", ())
        return [
            (column.name, column.type.dialect_impl(self._dialect).result_processor(self._dialect, None))
            for column in columns
        ]

    def named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of `values` that the statement names, the clock's offset among them."""
        given = self._given(values)
        return {name: given[name] for name in self._names}

    def arguments(self, values: Mapping[str, Any]) -> list[Any]:
        """Return the parameters in their order, encoded as the driver takes them."""
        given = self._given(values)
        return [given[name] if process is None else process(given[name]) for name, process in self._parameters]

    def _given(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._own, CLOCK_OFFSET: clock.offset().total_seconds(), **values}

    async def run(self, driver: asyncpg.Connection, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Run on the driver and return the rows by column name."""
        try:
            rows = await driver.fetch(self.text, *self.arguments(values))
        except asyncpg.IntegrityConstraintViolationError as exc:
            # As SQLAlchemy raises it, so that callers need to know one error only.
            raise IntegrityError(None, None, exc) from exc
        return [
            {
                name: value if process is None else process(value)
                for (name, process), value in zip(self._fields, row.values(), strict=True)
            }
            for row in rows
        ]


def typed_text(
    sql: str, types: Mapping[str, TypeEngine[Any]], columns: Iterable[ColumnElement[Any]] = ()
) -> TextualSelect:
    """Return SQL text as a Core statement.

    Args:
        sql: Its parameters are written `:p_...`.
        types: The type of each parameter; the clock's offset has its own.
        columns: What its rows hold, in this order.
    """
    known = {CLOCK_OFFSET: Float(53), **types}
    parameters = (bindparam(name, type_=known[name]) for name in set(_PARAMETER.findall(sql)))
    return text(sql).bindparams(*parameters).columns(*columns)


def text_statement(sql: str, types: Mapping[str, TypeEngine[Any]], **columns: TypeEngine[Any]) -> Statement:
    """Return the statement of SQL text, of which every dialect takes the same; `columns` are those of its rows."""
    return Statement(typed_text(sql, types, tuple(column(name, kind) for name, kind in columns.items())))


def literal_number(value: int) -> ColumnElement[int]:
    """Return a number that stands in the text of a statement.

    For a LIMIT in a parameter PostgreSQL plans as if a tenth of the rows were wanted.
    """
    return literal_column(str(int(value)), Integer())


def is_one_of(dialect: str, column: ColumnElement[Any], name: str, kind: TypeEngine[Any]) -> ColumnElement[bool]:
    """Return the condition that a column has one of the values that the parameter `name` holds."""
    if dialect == "postgresql":
        return any_(bindparam(name, type_=ARRAY(kind))) == column
    # SQLite has no arrays: the values are one JSON text.
    return column.in_(select(func.json_each(bindparam(name, type_=JSON())).table_valued("value").c.value))


class RowsParameter:
    """A table inside a statement whose rows come as parameters: one array for each column on PostgreSQL, one JSON
    text on SQLite.

    Args:
        name: Of the table in the statement; the parameters begin with `p_` and this name.
        columns: The type of each column, by name.
    """

    def __init__(self, name: str, columns: Mapping[str, TypeEngine[Any]]) -> None:
        self._name = name
        self._columns = dict(columns)

    @property
    def types(self) -> dict[str, TypeEngine[Any]]:
        """The types of its parameters, in whatever dialect."""
        arrays = {f"p_{self._name}_{name}": ARRAY(kind) for name, kind in self._columns.items()}
        return {**arrays, f"p_{self._name}": Json()}

    def sql(self, dialect: str) -> str:
        """Return the rows as the SQL text of a subquery, without a name, for a dialect's name."""
        names = self._columns
        if dialect != "postgresql":
            fields = ", ".join(f"json_extract(value, '$.{name}') AS {name}" for name in names)
            return f"(SELECT {fields} FROM json_each(:p_{self._name}))"  # noqa: S608  names of the program's own
        arrays = [f":p_{self._name}_{name}" for name in names]
        unnested = f"unnest({', '.join(arrays)}) AS unnested({', '.join(names)})"
        # PostgreSQL plans for 10 rows of an unknown array, enough to read a whole table or to compile the statement
        # (JIT, some hundred ms) for one row. Of an unknown LIMIT it takes a tenth: one row.
        return f"(SELECT * FROM {unnested} LIMIT cardinality({arrays[0]}))"  # noqa: S608  likewise

    def values(self, dialect: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the parameters that hold `rows`."""
        if dialect == "postgresql":
            return {f"p_{self._name}_{name}": [row[name] for row in rows] for name in self._columns}
        return {f"p_{self._name}": [{name: _stored(row[name]) for name in self._columns} for row in rows]}


def _stored(value: Any) -> Any:
    # SQLAlchemy's Uuid stores 32 hex digits on SQLite.
    return value.hex if isinstance(value, UUID) else value
