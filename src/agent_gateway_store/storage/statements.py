"""Statements that are written once and run on either kind of connection: SQLAlchemy's, or the PostgreSQL driver's own.

Building, caching and executing a Core statement costs several times what the server needs for it. A statement of this
module is compiled once for each dialect; on the driver it is one call with its parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
from sqlalchemy import (
    JSON,
    BindParameter,
    ColumnElement,
    Dialect,
    Executable,
    Float,
    Integer,
    Text,
    and_,
    any_,
    bindparam,
    collate,
    column,
    func,
    literal_column,
    or_,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.selectable import TextualSelect
from sqlalchemy.types import TypeEngine

from agent_gateway_store import clock
from agent_gateway_store.errors import UnreadableRowError
from agent_gateway_store.models.base import UnreadableRow
from agent_gateway_store.models.columns import INVALID, UTC_MIN, EnumText, Json, JsonOf, UtcDateTime
from agent_gateway_store.models.values import ToolCall
from agent_gateway_store.storage.asyncpg_pool import RawConnection
from agent_gateway_store.storage.database import AnyConnection
from agent_gateway_store.storage.db_clock import CLOCK_OFFSET
from agent_gateway_store.storage.errors import RESTORE, is_bad_text

_Processor: TypeAlias = Callable[[Any], Any] | None
_PARAMETER = re.compile(r":(p_\w+)")
_STAND_INS: dict[type, Any] = {str: INVALID, int: 0, bool: False, UUID: UUID(int=0), dict: {}}


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

        A row that was altered so that it cannot be read is an `UnreadableRow`, and hides no other.
        """
        return next(iter(await self.rows(connection, values)), None)

    async def one(self, connection: AnyConnection, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the first row of a statement that always gives one."""
        return (await self.rows(connection, values))[0]

    async def rows(self, connection: AnyConnection, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Run the statement, and return every row."""
        rows = await self._run(connection, values, _text_or_bytes)
        return list(map(self.compiled(connection.dialect).read, rows))

    async def tuples(self, connection: AnyConnection, values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """Run and return every row as the driver gives it, without converting values; bytes of no text are escaped."""
        return await self._run(connection, values, lambda stored: stored.decode(errors="backslashreplace"))

    async def _run(
        self, connection: AnyConnection, values: Mapping[str, Any], decode: Callable[[bytes], Any]
    ) -> Sequence[Sequence[Any]]:
        compiled = self.compiled(connection.dialect)
        if isinstance(connection, RawConnection):
            return await compiled.run(connection.driver, values)
        arguments = tuple(compiled.arguments(values))
        if connection.dialect.name != "sqlite" or compiled.text.lstrip().startswith("SELECT"):
            try:
                return (await connection.exec_driver_sql(compiled.text, arguments)).all()
            except OperationalError as exc:
                if not is_bad_text(exc):
                    raise
        # What writes cannot be run again, so its first run decodes like this, with a call for each text.
        driver: Any = (await connection.get_raw_connection()).driver_connection
        driver.text_factory = decode
        try:
            return (await connection.exec_driver_sql(compiled.text, arguments)).all()
        finally:
            # One that was cancelled is closed.
            with suppress(ValueError):
                driver.text_factory = str


class CompiledStatement:
    """A statement in one dialect, with its SQL, and what turns values into parameters and a row into values."""

    def __init__(self, statement: Executable, dialect: Dialect) -> None:
        self.statement = statement
        written = {"render_postcompile": True}
        sql: SQLCompiler = statement.compile(dialect=dialect, compile_kwargs=written)  # type: ignore[attr-defined]
        self.text = str(sql)
        # Parameters that the dialect adds, such as the OFFSET 0 that SQLite's compiler writes after each LIMIT.
        self._own = {name: value for name, value in sql.params.items() if value is not None}
        self._parameters: list[tuple[str, _Processor]] = [
            (name, _bind(sql, name).type.dialect_impl(dialect).bind_processor(dialect))
            for name in sql.positiontup or ()
        ]
        self._dialect = dialect

    @cached_property
    def _fields(self) -> list[tuple[str, _Processor]]:
        return [(column.name, _processor(column.type, self._dialect)) for column in self._columns]

    @property
    def table(self) -> str:
        """The name of the table that its rows are of."""
        tables = (f"{each.table}" for each in self._columns if getattr(each, "table", None) is not None)
        return next(tables, "the database")

    @property
    def _columns(self) -> Iterable[ColumnElement[Any]]:
        return getattr(self.statement, "exported_columns", ())

    def arguments(self, values: Mapping[str, Any]) -> list[Any]:
        """Return the parameters in their order, encoded as the driver takes them."""
        given = {**self._own, CLOCK_OFFSET: clock.offset().total_seconds(), **values}
        return [given[name] if process is None else process(given[name]) for name, process in self._parameters]

    async def run(self, driver: asyncpg.Connection, values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """Run on the driver and return its rows."""
        try:
            return await driver.fetch(self.text, *self.arguments(values))  # type: ignore[no-any-return]
        except asyncpg.IntegrityConstraintViolationError as exc:
            # As SQLAlchemy raises it, so that callers need to know one error only.
            raise IntegrityError(None, None, exc) from exc

    def read(self, row: Sequence[Any]) -> dict[str, Any]:
        """Return a row of the driver by column name."""
        try:
            return {
                name: value if process is None else process(value)
                for (name, process), value in zip(self._fields, row, strict=True)
            }
        except Exception:
            # Every error means the same, also one of the recursion in deep JSON.
            return self._unreadable(row)

    def _unreadable(self, row: Sequence[Any]) -> UnreadableRow:
        found, wrong, place = {}, [], "A row"
        for each, (name, process), value in zip(self._columns, self._fields, row, strict=True):
            try:
                found[name] = value if process is None else process(value)
            except Exception:
                found[name] = _stand_in(each)
                wrong.append(name)
            if getattr(each, "primary_key", False):
                place = f"Row {found[name]}"
        error = f"{place} of {self.table} holds what no store writes ({', '.join(wrong)}): {RESTORE}."
        return UnreadableRow(UnreadableRowError(error), found)


def _bind(sql: SQLCompiler, name: str) -> BindParameter[Any]:
    # Each value of an IN is a parameter of its own, with a number behind the name of the one that was written.
    return sql.binds[name if name in sql.binds else name.rpartition("_")[0]]


def _processor(kind: TypeEngine[Any], dialect: Dialect) -> _Processor:
    if isinstance(kind, Text | Integer | Float):
        # SQLite's columns keep anything.
        return partial(_exactly, kind.python_type) if dialect.name == "sqlite" else None
    return kind.dialect_impl(dialect).result_processor(dialect, None)


def _text_or_bytes(stored: bytes) -> str | bytes:
    try:
        return stored.decode()
    except UnicodeDecodeError:
        # As a BLOB, which no column takes for text.
        return stored


def _exactly(kind: type, value: Any) -> Any:
    if value is not None and not isinstance(value, kind):
        raise TypeError("a value of another kind")
    return value


def _stand_in(column: ColumnElement[Any]) -> Any:
    kind = column.type
    # A label has none.
    if getattr(getattr(column, "element", column), "nullable", True):
        return None
    if isinstance(kind, UtcDateTime):
        return UTC_MIN
    if isinstance(kind, EnumText):
        # The first level is the lowest; the last status is one of what is over.
        return list(kind.enum)[0 if issubclass(kind.enum, int) else -1]
    if isinstance(kind, JsonOf) and kind.type_ is ToolCall:
        return ToolCall(server=INVALID, tool=INVALID)
    return _STAND_INS.get(kind.python_type)


def typed_text(
    sql: str, types: Mapping[str, TypeEngine[Any]], columns: Iterable[ColumnElement[Any]] = ()
) -> TextualSelect:
    """Return SQL text as a Core statement, with the types of its parameters `:p_...` and the columns of its rows."""
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


_LOCALE_HIDES_ASCII = "lower('I') <> 'i'"
"""On PostgreSQL, true in a database whose locale is Turkish, where I and i are two letters; known to the planner."""


def contains(dialect: str, columns: Sequence[ColumnElement[Any]], pattern: ColumnElement[str]) -> ColumnElement[bool]:
    """Return the condition that a column is like a pattern: ASCII in either case, the rest as the locale folds it."""
    if dialect == "sqlite":
        return or_(*(column.like(pattern, escape="\\") for column in columns))

    def fold(text: ColumnElement[Any]) -> ColumnElement[str]:
        return collate(func.lower(collate(text, "C")), "default")

    # The backslash escapes by itself; in a literal it would depend on standard_conforming_strings.
    folded = or_(*(fold(column).ilike(fold(pattern)) for column in columns))
    return or_(*(column.ilike(pattern) for column in columns), and_(literal_column(_LOCALE_HIDES_ASCII), folded))


class RowsParameter:
    """A table in a statement whose rows are parameters: an array for each column, on SQLite one JSON text.

    The parameters begin with `p_` and its name; `columns` gives the type of each.
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
