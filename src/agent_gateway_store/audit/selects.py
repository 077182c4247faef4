"""The SELECTs of the audit log. Each is compiled once for a dialect and a set of filters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    ColumnElement,
    Dialect,
    Integer,
    Select,
    Text,
    any_,
    bindparam,
    cast,
    exists,
    func,
    literal_column,
    or_,
    select,
    tuple_,
    type_coerce,
)
from sqlalchemy.dialects import postgresql

from agent_gateway_store.audit.filters import Criteria
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.models.columns import UTC_MAX, UTC_MIN, JsonOf, UtcDateTime
from agent_gateway_store.storage.statements import CompiledStatement, compiled

__all__ = [
    "FIELDS",
    "JSON_FIELDS",
    "SameDialect",
    "conditions",
    "finite",
    "newest",
    "oldest",
    "parameters",
    "selected",
    "table",
]

table = AuditEvent.__table__  # type: ignore[attr-defined]

FIELDS = tuple(AuditEvent.model_fields)
"""The columns of a row that becomes an event, in order."""

JSON_FIELDS = tuple(name for name in FIELDS if isinstance(table.c[name].type, JSON | JsonOf))

_Shape = tuple[tuple[str, bool], ...]
_ENUMS = ("decision", "execution_status", "output_decision")


def selected(dialect: str) -> Select[Any]:
    """Select every column of an event, JSON as text."""
    if dialect != "postgresql":
        return select(*(table.c[name] for name in FIELDS))
    spelt = {name: cast(table.c[name], Text()) for name in JSON_FIELDS} | {"timestamp": finite()}
    return select(*(spelt[name].label(name) if name in spelt else table.c[name] for name in FIELDS))


def finite() -> ColumnElement[datetime]:
    """The timestamp on PostgreSQL; its driver stores the first and the last instant of UTC as infinities."""
    edges: list[Any] = [literal_column(f"TIMESTAMPTZ '{edge.isoformat()}'") for edge in (UTC_MIN, UTC_MAX)]
    return func.least(func.greatest(table.c.timestamp, edges[0]), edges[1])


def newest(
    dialect: Dialect, found: Criteria, *, limit: int | None, offset: int = 0, is_after: bool = False
) -> CompiledStatement:
    """Return the SELECT of a page: newest first, ties broken by id; its parameters are those of `parameters`.

    Args:
        dialect: Of the database.
        found: The filters.
        limit: Most rows; None: all.
        offset: Rows to pass by.
        is_after: Whether the page begins behind `p_at` and `p_id`.
    """
    return _newest(dialect.name, found.shape, limit, offset, is_after, SameDialect(dialect))


def parameters(dialect: Dialect, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of filters as the parameters of their SELECT."""
    if dialect.name == "postgresql":
        return dict(values)
    return {name: json.dumps(value) if isinstance(value, list) else value for name, value in values.items()}


def conditions(dialect: str, shape: _Shape) -> list[ColumnElement[bool]]:
    """Return what must hold of a row, with a parameter `p_<filter>` for each filter."""
    return [_condition(dialect, name, several) for name, several in shape]


class SameDialect:
    """A dialect that rides along in a cached call without being part of its key: its name is."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameDialect)

    def __hash__(self) -> int:
        return 0


def oldest(dialect: Dialect, found: Criteria) -> CompiledStatement:
    """Return the SELECT of everything that matches, oldest first."""
    statement = selected(dialect.name).where(*conditions(dialect.name, found.shape))
    return compiled(statement.order_by(table.c.timestamp, table.c.id), dialect)


@lru_cache(maxsize=512)
def _newest(
    dialect: str, shape: _Shape, limit: int | None, offset: int, is_after: bool, same: SameDialect
) -> CompiledStatement:
    statement = selected(dialect).where(*conditions(dialect, shape))
    statement = statement.order_by(table.c.timestamp.desc(), table.c.id.desc())
    if is_after:
        place = bindparam("p_at", type_=UtcDateTime()), bindparam("p_id", type_=BigInteger())
        statement = statement.where(tuple_(table.c.timestamp, table.c.id) < tuple_(*place))
    # Numbers in the text: PostgreSQL plans a LIMIT that it does not know as if a tenth of the table were wanted.
    if limit is not None:
        statement = statement.limit(literal_column(str(int(limit)), Integer()))
    if offset:
        statement = statement.offset(literal_column(str(int(offset)), Integer()))
    return compiled(statement, same.dialect)


def _condition(dialect: str, name: str, several: bool) -> ColumnElement[bool]:
    match name:
        case "bound":
            return table.c.org_id == bindparam("p_bound", type_=Text())  # type: ignore[no-any-return]
        case "since":
            return table.c.timestamp >= bindparam("p_since", type_=UtcDateTime())  # type: ignore[no-any-return]
        case "until":
            return table.c.timestamp < bindparam("p_until", type_=UtcDateTime())  # type: ignore[no-any-return]
        case "min_risk_score":
            return table.c.risk_score >= bindparam("p_min_risk_score", type_=table.c.risk_score.type)  # type: ignore[no-any-return]
        case "text":
            pattern = bindparam("p_text", type_=Text())
            places = (table.c.tool_name, table.c.deterministic_rationale, table.c.llm_explanation)
            like = "ilike" if dialect == "postgresql" else "like"
            return or_(*(getattr(place, like)(pattern, escape="\\") for place in places))
        case "risk_label":
            return _labelled(dialect, several)
    column = type_coerce(table.c[name], Text()) if name in _ENUMS else table.c[name]
    if not several:
        return column == bindparam(f"p_{name}", type_=Text())
    return column == _any(dialect, name) if dialect == "postgresql" else column.in_(_each(name))


def _labelled(dialect: str, several: bool) -> ColumnElement[bool]:
    if dialect == "postgresql":
        labels = type_coerce(table.c.risk_labels, postgresql.JSONB())
        if several:
            return labels.has_any(bindparam("p_risk_label", type_=ARRAY(Text())))  # type: ignore[no-any-return]
        return labels.has_key(bindparam("p_risk_label", type_=Text()))  # type: ignore[no-any-return]
    label = func.json_each(table.c.risk_labels).table_valued("value", name="label").c.value
    wanted = bindparam("p_risk_label", type_=Text())
    return exists(select(literal_column("1")).where(label.in_(_each("risk_label")) if several else label == wanted))


def _any(dialect: str, name: str) -> Any:
    return any_(bindparam(f"p_{name}", type_=ARRAY(Text())))


def _each(name: str) -> Any:
    return select(func.json_each(bindparam(f"p_{name}", type_=Text())).table_valued("value").c.value)
