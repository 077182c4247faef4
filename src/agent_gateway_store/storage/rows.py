"""Many rows as parameters of one statement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Subquery, bindparam, column, func, literal_column, select, type_coerce
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import TypeEngine

from agent_gateway_store.models.columns import Json


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

    def table(self, dialect: str) -> Subquery:
        """Return the FROM clause of the rows, for a dialect's name."""
        if dialect != "postgresql":
            rows = func.json_each(bindparam(f"p_{self._name}", type_=Json())).table_valued("value", name="listed")
            fields = (func.json_extract(rows.c.value, literal_column(f"'$.{name}'")) for name in self._columns)
            named = zip(fields, self._columns.items(), strict=True)
            return select(*(type_coerce(field, kind).label(name) for field, (name, kind) in named)).subquery(self._name)
        arrays = [bindparam(f"p_{self._name}_{name}", type_=ARRAY(kind)) for name, kind in self._columns.items()]
        unnested = (
            func.unnest(*arrays)
            .table_valued(*(column(name, kind) for name, kind in self._columns.items()), name="unnested")
            .render_derived()
        )
        # PostgreSQL plans for 100 rows of JSON and for 10 of an unknown array, enough to read a whole table or to
        # compile the statement (JIT, some hundred ms) for one row. Of an unknown LIMIT it takes a tenth: one row.
        return select(*unnested.c).limit(func.cardinality(arrays[0])).subquery(self._name)

    def sql(self, dialect: str) -> str:
        """Return the same as `table`, in SQL text, without a name."""
        names = self._columns
        if dialect != "postgresql":
            fields = ", ".join(f"json_extract(value, '$.{name}') AS {name}" for name in names)
            return f"(SELECT {fields} FROM json_each(:p_{self._name}))"  # noqa: S608  names of the program's own
        arrays = [f":p_{self._name}_{name}" for name in names]
        unnested = f"unnest({', '.join(arrays)}) AS unnested({', '.join(names)})"
        return f"(SELECT * FROM {unnested} LIMIT cardinality({arrays[0]}))"  # noqa: S608  likewise

    def values(self, dialect: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the parameters that hold `rows`."""
        if dialect == "postgresql":
            return {f"p_{self._name}_{name}": [row[name] for row in rows] for name in self._columns}
        return {f"p_{self._name}": [{name: _stored(row[name]) for name in self._columns} for row in rows]}


def _stored(value: Any) -> Any:
    # SQLAlchemy's Uuid stores 32 hex digits on SQLite.
    return value.hex if isinstance(value, UUID) else value
