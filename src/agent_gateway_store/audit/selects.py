"""The SELECTs of the audit log, one statement for each set of filters, for events and for their counts in groups."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    ColumnElement,
    Select,
    Text,
    Uuid,
    any_,
    bindparam,
    cast,
    exists,
    func,
    literal_column,
    select,
    true,
    tuple_,
    type_coerce,
)
from sqlalchemy.dialects import postgresql

from agent_gateway_store.audit.document import scan_json
from agent_gateway_store.audit.record import INVALID, WITHHELD
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus, OutputDecision, RedactionFlag
from agent_gateway_store.models.columns import UTC_MAX, UTC_MIN, JsonOf, UtcDateTime
from agent_gateway_store.storage.errors import readable_rows
from agent_gateway_store.storage.filters import Shape
from agent_gateway_store.storage.grouping import TIMES, Metrics, Offsets, aggregate
from agent_gateway_store.storage.statements import Statement, contains, is_one_of, literal_number

table = AuditEvent.__table__

FIELDS = tuple(AuditEvent.model_fields)
"""The columns of a row that becomes an event, in order."""

JSON_FIELDS = tuple(name for name in FIELDS if isinstance(table.c[name].type, JSON | JsonOf))

# Columns whose parameters are text: enums, and on SQLite the hex digits of a UUID.
_AS_TEXT = ("decision", "execution_status", "output_decision", "approval_id")
# Where the groups of a UUID's hex digits begin, and their lengths.
_GROUPS = ((1, 8), (9, 4), (13, 4), (17, 4), (21, 100))
_DECISIONS = {str(each): each for each in Decision}
_STATUSES: dict[str | None, ExecutionStatus | None] = {None: None} | {str(each): each for each in ExecutionStatus}
_OUTPUTS = {str(each): each for each in OutputDecision}
_WITHHELD: dict[str, Any] = {
    **dict.fromkeys(("sanitized_args", "extra"), json.dumps({WITHHELD: INVALID})),
    **dict.fromkeys(("risk_labels", "redaction_flags"), "[]"),
    "approval_id": None,
}


def events_of(rows: Iterable[Sequence[Any]]) -> list[AuditEvent]:
    """Return the events of rows that hold `FIELDS`: detached, and equal to those that were validated.

    Rows of our own database are not validated a second time, and their JSON is valid text. Where somebody has written
    something else past the store, the value is replaced and flagged as one of `write` that is not valid is, so that one
    row hides no other; `evidence verify` names it.

    Raises:
        StoreUnavailableError: A time or a decision cannot be read: nothing may stand in its place.
    """
    return list(map(_event, rows))


def _event(row: Sequence[Any]) -> AuditEvent:
    try:
        return _typed(dict(zip(FIELDS, row, strict=True)))
    except Exception:
        # Every error means the same; `scan_json` raises StopIteration, which would end the list.
        return _repaired(dict(zip(FIELDS, row, strict=True)))


def _repaired(values: dict[str, Any]) -> AuditEvent:
    wrong = []
    for name in _WITHHELD:
        try:
            _typed(values | _WITHHELD | {name: values[name]})
        except Exception:
            wrong.append(name)
    with readable_rows(f"Row {values['id']} of {table.name}", "run `gateway-store evidence verify`, which names it"):
        event = _typed(values | {name: _WITHHELD[name] for name in wrong})
    flags = [RedactionFlag(field=name, reason=INVALID) for name in wrong]
    event.redaction_flags = [*event.redaction_flags, *flags]
    return event


def _typed(values: dict[str, Any]) -> AuditEvent:
    stamp = values["timestamp"]
    if type(stamp) is str:
        # A `replace` takes six times as long, of each event of a listing.
        values["timestamp"] = datetime.fromisoformat(f"{stamp}Z")
    values["decision"] = _DECISIONS[values["decision"]]
    values["execution_status"] = _STATUSES[values["execution_status"]]
    values["output_decision"] = _OUTPUTS[values["output_decision"]]
    labels, extra, flags = values["risk_labels"], values["extra"], values["redaction_flags"]
    values["sanitized_args"] = args = scan_json(values["sanitized_args"], 0)[0]
    values["risk_labels"] = labels = [] if labels == "[]" else scan_json(labels, 0)[0]
    values["extra"] = extra = {} if extra == "{}" else scan_json(extra, 0)[0]
    flags = [] if flags == "[]" else scan_json(flags, 0)[0]
    if not (type(args) is type(extra) is dict and type(labels) is type(flags) is list):
        raise TypeError("JSON of another kind")
    # Raises as well where a label is not text.
    "".join(labels)
    values["redaction_flags"] = flags and [RedactionFlag(**flag) for flag in flags]
    values["approval_id"] = values["approval_id"] and UUID(values["approval_id"])
    return AuditEvent.from_row(values)


def select_events(dialect: str, shape: Shape, *, has_zones: bool = True) -> Select[Any]:
    """Select every column of the events that match, JSON and UUID as text; `has_zones` False: the time without UTC."""
    columns: dict[str, ColumnElement[Any]] = {name: table.c[name] for name in FIELDS}
    columns["approval_id"] = _approval_id(dialect).label("approval_id")
    if dialect == "postgresql":
        columns |= {name: cast(table.c[name], Text()).label(name) for name in JSON_FIELDS}
        stamp = finite_timestamp()
        columns["timestamp"] = (stamp if has_zones else func.timezone("UTC", stamp)).label("timestamp")
    return select(*columns.values()).where(*conditions(dialect, shape))


def _approval_id(dialect: str) -> ColumnElement[str]:
    """The approval as text with hyphens; SQLite holds 32 hex digits."""
    if dialect == "postgresql":
        return cast(table.c.approval_id, Text())
    digits = type_coerce(table.c.approval_id, Text())
    first, *others = (func.substr(digits, start, length) for start, length in _GROUPS)
    return sum((literal_column("'-'", Text()) + each for each in others), first)


def finite_timestamp() -> ColumnElement[datetime]:
    """The timestamp on PostgreSQL, where asyncpg stores the first and the last instant of UTC as infinities."""
    edges: list[Any] = [literal_column(f"TIMESTAMPTZ '{edge.isoformat()}'") for edge in (UTC_MIN, UTC_MAX)]
    return func.least(func.greatest(table.c.timestamp, edges[0]), edges[1])


# Bounded (512 is chosen), because callers choose a page's limit and offset, and with them the number of statements.
@lru_cache(maxsize=512)
def newest(shape: Shape, *, limit: int | None, offset: int = 0, is_after: bool = False) -> Statement:
    """Return the SELECT of a page: newest first, ties broken by id.

    Args:
        shape: The filters; their values are the parameters.
        limit: Most rows; None: all.
        offset: Rows to skip.
        is_after: Whether the page begins after the parameters `p_at` and `p_id`.
    """

    def build(dialect: str) -> Select[Any]:
        statement = select_events(dialect, shape).order_by(table.c.timestamp.desc(), table.c.id.desc())
        if is_after:
            place = bindparam("p_at", type_=UtcDateTime()), bindparam("p_id", type_=BigInteger())
            statement = statement.where(tuple_(table.c.timestamp, table.c.id) < tuple_(*place))
        if limit is not None:
            statement = statement.limit(literal_number(limit))
        if offset:
            statement = statement.offset(literal_number(offset))
        return statement

    return Statement(build)


def oldest(shape: Shape) -> Statement:
    """Return the SELECT of everything that matches, oldest first."""
    return Statement(lambda dialect: select_events(dialect, shape).order_by(table.c.timestamp, table.c.id))


def conditions(dialect: str, shape: Shape) -> list[ColumnElement[bool]]:
    """Return the conditions of a SELECT, with a parameter `p_<filter>` for each filter."""
    return [_condition(dialect, name, several) for name, several in shape]


def _condition(dialect: str, name: str, several: bool) -> ColumnElement[bool]:
    match name:
        case "bound":
            return table.c.org_id == bindparam("p_bound", type_=Text())
        case "id":
            return table.c.id == bindparam("p_row_id", type_=BigInteger())
        case "since":
            return table.c.timestamp >= bindparam("p_since", type_=UtcDateTime())
        case "until":
            return table.c.timestamp < bindparam("p_until", type_=UtcDateTime())
        case "min_risk_score":
            return table.c.risk_score >= bindparam("p_min_risk_score", type_=table.c.risk_score.type)
        case "text":
            places = (table.c.tool_name, table.c.deterministic_rationale, table.c.llm_explanation)
            return contains(dialect, places, bindparam("p_text", type_=Text()))
        case "risk_label":
            return _labelled(dialect, several)
        case "approval_id" if dialect == "postgresql":
            ids: Any = cast(bindparam("p_approval_id", type_=ARRAY(Text())), ARRAY(Uuid()))
            one = cast(bindparam("p_approval_id", type_=Text()), Uuid())
            return table.c.approval_id == (any_(ids) if several else one)
    column = type_coerce(table.c[name], Text()) if name in _AS_TEXT else table.c[name]
    if not several:
        return column == bindparam(f"p_{name}", type_=Text())
    return is_one_of(dialect, column, f"p_{name}", Text())


def _labelled(dialect: str, several: bool) -> ColumnElement[bool]:
    if dialect == "postgresql":
        labels = type_coerce(table.c.risk_labels, postgresql.JSONB())
        if several:
            return labels.has_any(bindparam("p_risk_label", type_=ARRAY(Text())))  # type: ignore[no-any-return]
        return labels.has_key(bindparam("p_risk_label", type_=Text()))  # type: ignore[no-any-return]
    label = func.json_each(table.c.risk_labels).table_valued("value", name="label").c.value
    one = label == bindparam("p_risk_label", type_=Text())
    fits = is_one_of(dialect, label, "p_risk_label", Text()) if several else one
    return exists(select(literal_column("1")).where(fits))


GROUPS = (
    "caller_id",
    "caller_role",
    "tool_name",
    "mcp_server",
    "decision",
    "output_decision",
    "execution_status",
    "risk_label",
    "matched_policy_rule",
    "environment",
    "org_id",
    "session_id",
    "key_id",
    "approver_id",
)
"""The columns that events can be grouped by."""

COUNTED = Metrics(
    counts={
        "calls": "TRUE",
        "denials": "decision = 'DENY'",
        "approvals": "decision = 'APPROVAL_REQUIRED'",
        "errors": "execution_status IN ('TOOL_ERROR', 'TIMEOUT')",
    },
    value="latency_ms",
    percentiles={"latency_p50_ms": 0.5, "latency_p95_ms": 0.95, "latency_p99_ms": 0.99},
)

SPAN = Statement(select(func.min(table.c.timestamp), func.max(table.c.timestamp)))
"""The first and the last time of all events."""


@lru_cache(maxsize=128)
def group_events(shape: Shape, by: tuple[str, ...], zone: Offsets, *, in_buckets: bool) -> Statement:
    """Return the SELECT of the groups: their columns, the bucket if there is one, counts, latencies."""

    def build(dialect: str) -> Select[Any]:
        base = _base(dialect, shape, by).subquery("base")
        return aggregate(dialect, base, by, zone, COUNTED, in_buckets=in_buckets)

    return Statement(build)


def _base(dialect: str, shape: Shape, by: tuple[str, ...]) -> Select[Any]:
    """The events with the columns by which they are grouped."""
    source: Any = table
    at = finite_timestamp() if dialect == "postgresql" else type_coerce(table.c.timestamp, Text())
    columns: list[Any] = [table.c.id, table.c.latency_ms, at.label("at")]
    columns += [type_coerce(table.c[name], Text()).label(name) for name in ("decision", "execution_status")]
    for name in by:
        if name in TIMES:
            continue
        if name != "risk_label":
            columns.append(type_coerce(table.c[name], Text()).label(f"g_{name}"))
            continue
        source, label = _with_labels(dialect)
        columns.append(label.label("g_risk_label"))
    statement = select(*columns).select_from(source).where(*conditions(dialect, shape))
    # An event that carries the same label twice counts once. PostgreSQL looks at the labels of each event: of all rows
    # it would sort the whole table.
    return statement.distinct() if "risk_label" in by and dialect == "sqlite" else statement


def _with_labels(dialect: str) -> tuple[Any, ColumnElement[Any]]:
    labels: Any
    if dialect == "postgresql":
        elements = func.jsonb_array_elements_text(table.c.risk_labels).table_valued("value", name="elements")
        labels = select(elements.c.value).distinct().lateral("labels")
    else:
        labels = func.json_each(table.c.risk_labels).table_valued("value", name="labels")
    return table.outerjoin(labels, true()), labels.c.value
