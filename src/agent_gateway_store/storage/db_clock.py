"""The database's clock as SQL, by which deadlines are set and judged."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Float, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import expression

from agent_gateway_store import clock
from agent_gateway_store.models.columns import UtcDateTime

CLOCK_OFFSET = "p_clock_offset"
"""Name of the parameter that holds the offset of `clock`, in seconds, in every statement that reads the time."""

_CLOCKS = {
    # now() would be the start of the transaction, which may lie before a deadline that has passed since.
    "postgresql": "(clock_timestamp() + make_interval(secs => {seconds}))",
    # SQLAlchemy reads six digits of a second's fraction; SQLite's clock gives three.
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f000', 'now', printf('%+.3f seconds', {seconds}))",
}


def clock_sql(dialect: str, *, plus: str | None = None) -> str:
    """Return what `db_now` means in SQL text, with the SQL of the seconds to add."""
    return _CLOCKS[dialect].format(seconds=f":{CLOCK_OFFSET}" if plus is None else f":{CLOCK_OFFSET} + {plus}")


class _DbNow(expression.FunctionElement[datetime]):
    type = UtcDateTime()
    inherit_cache = True
    name = "db_now"


@compiles(_DbNow, "postgresql")
@compiles(_DbNow, "sqlite")
def _now(element: _DbNow, compiler: Any, **kw: Any) -> str:
    return _CLOCKS[compiler.dialect.name].format(seconds=compiler.process(element.clauses, **kw))


def db_now(*, plus: timedelta | None = None) -> ColumnElement[datetime]:
    """Return the database's clock in SQL, moved by `plus` and by the offset of `clock` when the statement runs."""
    # A callable, not a value: SQLAlchemy caches the statement, and the offset of the first call with it.
    seconds: ColumnElement[float] = bindparam(
        CLOCK_OFFSET, callable_=lambda: clock.offset().total_seconds(), type_=Float(53)
    )
    if plus is None:
        return _DbNow(seconds)
    return _DbNow(seconds + bindparam(None, plus.total_seconds(), type_=Float(53)))
