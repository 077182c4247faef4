"""Counts and latencies of groups of events."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sqlalchemy import ColumnElement, Select, Text, func, select, true, type_coerce

from agent_gateway_store.audit.selects import Shape, conditions, finite_timestamp, table
from agent_gateway_store.storage.grouping import TIMES, Metrics, Offsets, aggregate
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
