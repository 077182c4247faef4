"""SELECTs that are compiled once and run on the driver itself: their rows come as the driver gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Dialect, Executable
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.compiler import SQLCompiler

from agent_gateway_store.storage.database import Runner
from agent_gateway_store.storage.driver import DriverConnection

__all__ = ["Query", "compiled", "dialect_object", "fetch"]


@dataclass(frozen=True, slots=True)
class Query:
    """A SELECT in one dialect: its text, and how named values become its parameters."""

    text: str
    _parameters: tuple[tuple[str, Any], ...]
    _own: Mapping[str, Any]

    def arguments(self, values: Mapping[str, Any]) -> list[Any]:
        """Return the parameters in their order, spelt as the driver takes them."""
        given = {**self._own, **values}
        return [given[name] if process is None else process(given[name]) for name, process in self._parameters]


def compiled(statement: Executable, dialect: Dialect) -> Query:
    """Compile a statement whose parameters are all `bindparam("p_...")`."""
    sql: SQLCompiler = statement.compile(dialect=dialect)  # type: ignore[attr-defined]
    return Query(
        str(sql),
        tuple(
            (name, sql.binds[name].type.dialect_impl(dialect).bind_processor(dialect)) for name in sql.positiontup or ()
        ),
        # What a dialect adds by itself, such as the OFFSET 0 that SQLite's compiler writes behind each LIMIT.
        {name: value for name, value in sql.params.items() if value is not None},
    )


def dialect_object(runner: Runner) -> Dialect:
    """Return the dialect that a runner speaks."""
    return (runner.get_bind() if isinstance(runner, AsyncSession) else runner).dialect


async def fetch(runner: Runner, query: Query, values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
    """Run `query` and return its rows, no value converted."""
    arguments = query.arguments(values)
    if isinstance(runner, DriverConnection):
        return await runner.driver.fetch(query.text, *arguments)  # type: ignore[no-any-return]
    connection = await runner.connection() if isinstance(runner, AsyncSession) else runner
    return (await connection.exec_driver_sql(query.text, tuple(arguments))).all()
