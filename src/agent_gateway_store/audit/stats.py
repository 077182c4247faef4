"""Counts and latencies of groups of events, aggregated in SQL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Integer,
    Interval,
    Select,
    Text,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    select,
    true,
    type_coerce,
)

from agent_gateway_store.audit.selects import Shape, conditions, finite_timestamp, table
from agent_gateway_store.results import Stats
from agent_gateway_store.storage.filters import duration
from agent_gateway_store.storage.statements import Statement

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
"""What events can be grouped by."""

_PERCENTILES = (0.5, 0.95, 0.99)
_COUNTS = ("calls", "denials", "approvals", "errors")
_LATENCIES = ("latency_p50_ms", "latency_p95_ms", "latency_p99_ms")
_SECOND = timedelta(seconds=1)
# A Monday, so that buckets of a week begin on Mondays; those of hours and days begin with the UTC hour and day.
_ORIGIN = datetime(1, 1, 1, tzinfo=UTC)
# From there to 1970, which is where SQLite counts from.
_ORIGIN_SECONDS = (datetime(1970, 1, 1, tzinfo=UTC) - _ORIGIN) // _SECOND
# Chosen: about a thousand years.
_LONGEST_BUCKET = timedelta(days=365_000)


def columns_of(by: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the columns to group by.

    Raises:
        TypeError: `by` is neither text nor several of them.
        ValueError: There is no such column, or one is named twice.
    """
    names = () if by is None else (by,) if isinstance(by, str) else tuple(by)
    for name in names:
        if name not in GROUPS:
            raise ValueError(f"by must name one or more of {', '.join(GROUPS)}, not {name!r}.")
    if len(set(names)) < len(names):
        raise ValueError("by must name each column once.")
    return names


def bucket_of(bucket: timedelta | str | None) -> timedelta | None:
    """Return the length of the time buckets.

    Raises:
        TypeError: `bucket` is neither a timedelta nor text.
        ValueError: It is not a positive number of whole seconds, or longer than a thousand years.
    """
    if bucket is None:
        return None
    found = duration("bucket", bucket)
    if found % _SECOND or not _SECOND <= found <= _LONGEST_BUCKET:
        raise ValueError(f"bucket must be whole seconds, one or more, and at most 365,000 days, not {bucket!r}.")
    return found


@lru_cache(maxsize=128)
def group_events(shape: Shape, by: tuple[str, ...], *, in_buckets: bool) -> Statement:
    """Return the SELECT of the groups: their columns, the bucket if there is one, counts, latencies."""

    def build(dialect: str) -> Select[Any]:
        base = _base(dialect, shape, by, in_buckets).subquery("base")
        groups = [base.c[f"g_{name}"] for name in by] + ([base.c.bucket] if in_buckets else [])
        return (_by_percentile_disc if dialect == "postgresql" else _by_rank)(base, groups)

    return Statement(build)


def stats_of(rows: Iterable[Sequence[Any]], by: tuple[str, ...], bucket: timedelta | None) -> Stats:
    """Return the groups: by time, then the largest first, then by name."""
    found = [_row(tuple(row), by, bucket) for row in rows]
    found.sort(key=lambda row: _place(row, by))
    return Stats(found, by=by, bucket=bucket)


def _row(row: tuple[Any, ...], by: tuple[str, ...], bucket: timedelta | None) -> dict[str, Any]:
    at = len(by)
    named: dict[str, Any] = {}
    if bucket is not None:
        start = row[at]
        named["bucket"] = start if isinstance(start, datetime) else _ORIGIN + start * bucket
        at += 1
    named |= dict(zip(by, row, strict=False))
    counts, latencies = row[at : at + len(_COUNTS)], row[at + len(_COUNTS) :]
    # PostgreSQL gives the percentiles as one array.
    if len(latencies) == 1:
        latencies = tuple(latencies[0] or (None,) * len(_LATENCIES))
    return named | dict(zip((*_COUNTS, *_LATENCIES), (*counts, *latencies), strict=True))


def _place(row: Mapping[str, Any], by: tuple[str, ...]) -> tuple[Any, ...]:
    return (row.get("bucket", _ORIGIN), -row["calls"], *((row[name] is None, row[name] or "") for name in by))


def _base(dialect: str, shape: Shape, by: tuple[str, ...], in_buckets: bool) -> Select[Any]:
    """The events with the columns by which they are grouped."""
    source: Any = table
    columns: list[Any] = [table.c.id, table.c.latency_ms]
    columns += [type_coerce(table.c[name], Text()).label(name) for name in ("decision", "execution_status")]
    for name in by:
        if name != "risk_label":
            columns.append(type_coerce(table.c[name], Text()).label(f"g_{name}"))
            continue
        source, label = _with_labels(dialect)
        columns.append(label.label("g_risk_label"))
    if in_buckets:
        columns.append(_bucket(dialect).label("bucket"))
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


def _bucket(dialect: str) -> ColumnElement[Any]:
    if dialect == "postgresql":
        length = bindparam("p_bucket", type_=Interval())
        return func.date_bin(length, finite_timestamp(), literal_column("TIMESTAMPTZ '0001-01-01 00:00:00+00'"))
    # Without the fraction, which SQLite would round to the next second.
    seconds = cast(func.strftime("%s", func.substr(type_coerce(table.c.timestamp, Text()), 1, 19)), Integer)
    return (seconds + literal_column(str(_ORIGIN_SECONDS), Integer())) // bindparam("p_bucket_s", type_=Integer())


def _counts(source: Any) -> list[Any]:
    errors = source.c.execution_status.in_([literal_column("'TOOL_ERROR'"), literal_column("'TIMEOUT'")])
    return [
        func.count().label("calls"),
        func.count().filter(source.c.decision == literal_column("'DENY'")).label("denials"),
        func.count().filter(source.c.decision == literal_column("'APPROVAL_REQUIRED'")).label("approvals"),
        func.count().filter(errors).label("errors"),
    ]


def _by_percentile_disc(base: Any, groups: list[Any]) -> Select[Any]:
    wanted: Any = literal_column(f"ARRAY[{', '.join(map(repr, _PERCENTILES))}]::float8[]")
    latencies = func.percentile_disc(wanted).within_group(base.c.latency_ms).label("latencies")
    return select(*groups, *_counts(base), latencies).select_from(base).group_by(*groups)


def _by_rank(base: Any, groups: list[Any]) -> Select[Any]:
    """The definition of `percentile_disc`, written out: the first value whose rank is at least that share of all."""
    rank = func.row_number().over(partition_by=groups or None, order_by=base.c.latency_ms).label("latency_rank")
    of = func.count().over(partition_by=groups or None).label("latency_count")
    ranked = select(base, rank, of).subquery("ranked")
    share = [
        func.min(
            case((ranked.c.latency_rank >= literal_column(repr(part)) * ranked.c.latency_count, ranked.c.latency_ms))
        ).label(name)
        for part, name in zip(_PERCENTILES, _LATENCIES, strict=True)
    ]
    names = [ranked.c[group.name] for group in groups]
    return select(*names, *_counts(ranked), *share).select_from(ranked).group_by(*names)
