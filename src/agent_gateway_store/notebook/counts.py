"""Charts of how many calls there were: over time, by tool and caller, by tool and risk label."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from agent_gateway_store.notebook import charts

if TYPE_CHECKING:
    import pandas as pd

    from agent_gateway_store.notebook.charts import Chart

OTHERS = "others"
# Rows that can be read without scrolling; colours that can be told apart, with `others` nine of the ten of tableau10;
# columns whose slanted labels do not overlap in the width.
_TOOLS, _CALLERS, _LABELS = 20, 8, 12
_STEPS = [
    *(timedelta(seconds=s) for s in (1, 5, 15, 60, 300, 900)),
    *(timedelta(hours=h) for h in (1, 3, 6)),
    *(timedelta(days=d) for d in (1, 7, 28, 364)),
]
# Bars of a timeline, about five pixels each in the width of a plot.
_MOST = 120


def timeline(source: Any, *, title: str | None = None, **filters: Any) -> Chart:
    """Draw calls over time, stacked by decision.

    Args:
        source: Audit events, `store.audit.stats(by="decision", bucket="1h")`, or a `SyncGatewayStore`.
        title: In place of the usual one.
        filters: With a store: what to draw, as for `store.audit.search`; `bucket` sets the buckets' length.

    Raises:
        ValueError: The result lacks a column that is needed.
        TypeError: `source` is none of these.
        MissingExtraError: The extra `notebook` is not installed.
    """
    alt, pd = charts.libraries()
    instead = 'plot.timeline(await store.audit.stats(by="decision", bucket="1h"))'
    frame = charts.stats_of(source, instead, **{"by": "decision", "bucket": "1h", **filters})
    when = "bucket" if "bucket" in frame.columns else "timestamp"
    charts.need(frame, when, "decision")
    frame = frame.dropna(subset=[when])
    if frame.empty:
        return charts.nothing(title, "Calls by decision", "events")
    times = pd.to_datetime(frame[when], utc=True)
    step = step_for((times.max() - times.min()).to_pytimedelta(), _bucket_of(source, times, when))
    counts = _counted(frame.assign(start=times.dt.floor(pd.Timedelta(step))), "start", "decision")
    data = pd.DataFrame(
        {
            "start": counts["start"].dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "end": (counts["start"] + step).dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "when": counts["start"].dt.strftime("%Y-%m-%d %H:%M:%S UTC"),
            "decision": charts.safe_column(counts["decision"]),
            "calls": counts["calls"],
        }
    )
    chart = charts.stacked_bars(
        data,
        "decision",
        charts.DECISION_COLOURS,
        y=f"calls per {charts.span(step.total_seconds())}",
        gap=0,
        x=alt.X("start:T", title="time (UTC)", scale=alt.Scale(type="utc"), axis=alt.Axis(grid=False)),
        x2="end:T",
        tooltip=[alt.Tooltip("when:N", title="from"), "decision:N", alt.Tooltip("calls:Q", format=",")],
    )
    first, last = times.min().strftime("%Y-%m-%d %H:%M"), times.max().strftime("%Y-%m-%d %H:%M")
    return charts.finish(chart, title or "Calls by decision", f"{data['calls'].sum():,} calls, {first} to {last} UTC")


def calls(source: Any, *, title: str | None = None, **filters: Any) -> Chart:
    """Draw how often each tool was called and by whom: the 20 busiest tools, the 8 busiest callers and the others.

    Args:
        source: Audit events, `store.audit.stats(by=("caller_id", "tool_name"))`, or a `SyncGatewayStore`.
        title: In place of the usual one.
        filters: With a store: what to draw, as for `store.audit.search`.

    Raises:
        ValueError, TypeError, MissingExtraError: As for `timeline`.
    """
    alt, _ = charts.libraries()
    instead = 'plot.calls(await store.audit.stats(by=("caller_id", "tool_name")))'
    frame = charts.stats_of(source, instead, by=("caller_id", "tool_name"), **filters)
    charts.need(frame, "caller_id", "tool_name")
    counts = _by_tool(frame, "caller_id", name="caller")
    if counts.empty:
        return charts.nothing(title, "Calls by tool and caller", "events")
    tools, callers = _top(counts, "tool", _TOOLS), _top(counts, "caller", _CALLERS)
    total, left_out = int(counts["calls"].sum()), counts["tool"].nunique() - len(tools)
    counts["caller"] = counts["caller"].where(counts["caller"].isin(callers), OTHERS)
    data = _counted(counts[counts["tool"].isin(tools)], "tool", "caller")
    chart = (
        alt.Chart(data)
        .mark_bar()
        .encode(
            y=alt.Y("tool:N", title=None, sort=tools),
            x=alt.X("calls:Q", title="calls", stack="zero", axis=alt.Axis(tickCount=6, tickMinStep=1, format=",d")),
            color=alt.Color(
                "caller:N",
                sort=[*callers, OTHERS],
                scale=alt.Scale(scheme="tableau10"),
                legend=alt.Legend(columns=5, labelLimit=charts.LEGEND_PX),
            ),
            tooltip=["tool:N", "caller:N", alt.Tooltip("calls:Q", format=",")],
        )
        .properties(width=charts.WIDTH - 60, height=alt.Step(19))
    )
    more = f"; {left_out} rarer tools left out" if left_out else ""
    said = f"{total:,} calls{more}"
    return charts.finish(chart, title or "Calls by tool and caller", said, axis=tools, legend=callers)


def risk(source: Any, *, title: str | None = None, **filters: Any) -> Chart:
    """Draw which tools carry which risk labels: a heat map of the number of calls.

    Args:
        source: Audit events, `store.audit.stats(by=("tool_name", "risk_label"))`, or a `SyncGatewayStore`.
        title: In place of the usual one.
        filters: With a store: what to draw, as for `store.audit.search`.

    Raises:
        ValueError, TypeError, MissingExtraError: As for `timeline`.
    """
    alt, _ = charts.libraries()
    instead = 'plot.risk(await store.audit.stats(by=("tool_name", "risk_label")))'
    frame = charts.stats_of(source, instead, by=("tool_name", "risk_label"), **filters)
    charts.need(frame, "tool_name")
    counts = _by_tool(_labels_exploded(frame), "risk_label", name="label")
    if counts.empty:
        return charts.nothing(title, "Risk labels by tool", "risk labels")
    tools, labels = _top(counts, "tool", _TOOLS), _top(counts, "label", _LABELS)
    data = _counted(counts[counts["tool"].isin(tools) & counts["label"].isin(labels)], "tool", "label")
    most = int(data["calls"].max())
    base = alt.Chart(data).encode(
        x=alt.X("label:N", title=None, sort=labels, axis=alt.Axis(labelAngle=-35, orient="bottom")),
        y=alt.Y("tool:N", title=None, sort=tools),
        tooltip=["tool:N", "label:N", alt.Tooltip("calls:Q", format=",")],
    )
    tiles = base.mark_rect(cornerRadius=2, stroke="white", strokeWidth=2).encode(
        color=alt.Color("calls:Q", scale=alt.Scale(scheme="orangered", type="sqrt", domain=[0, most]), legend=None)
    )
    numbers = base.mark_text(fontSize=11).encode(
        text=alt.Text("calls:Q", format=","),
        color=alt.condition(f"datum.calls > {most / 2}", alt.value("white"), alt.value(charts.INK)),
    )
    chart = (tiles + numbers).properties(width=charts.WIDTH - 60, height=alt.Step(24))
    said = "number of calls; a call counts under each of its labels"
    return charts.finish(chart, title or "Risk labels by tool", said, axis=[*tools, *labels])


def _by_tool(frame: Any, column: str, *, name: str) -> Any:
    """Return the calls of each tool with each value of a column, as `tool`, `name` and `calls`, safe to draw."""
    counts = _counted(frame, "tool_name", column)
    return counts.assign(tool=charts.safe_column(counts["tool_name"]), **{name: charts.safe_column(counts[column])})


def _bucket_of(source: Any, times: Any, when: str) -> timedelta | None:
    """Return the length of the buckets of `source`; None for events."""
    if when != "bucket":
        return None
    known = getattr(source, "bucket", None)
    if isinstance(known, timedelta):
        return known
    # A frame of buckets does not say their length; it is the shortest gap between two that have events.
    gaps = times.drop_duplicates().sort_values().diff().dropna()
    found: timedelta = gaps.min().to_pytimedelta() if len(gaps) else timedelta(hours=1)
    return found


def step_for(span: timedelta, least: timedelta | None) -> timedelta:
    """Return the length of a time bucket of which at most about 120 fill the span.

    Args:
        least: Length of the buckets of the data, which the result is a multiple of; None: the data has none.
    """
    for step in _STEPS:
        if step * _MOST >= span and (least is None or (step >= least and step % least == timedelta())):
            return step
    return least or _STEPS[-1]


def _counted(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return how many calls there are for each combination of the columns, in a column `calls`."""
    if "calls" in frame.columns:
        return frame.groupby(list(columns), observed=True, dropna=True)["calls"].sum().reset_index()
    return frame.groupby(list(columns), observed=True, dropna=True).size().rename("calls").reset_index()


def _top(frame: pd.DataFrame, column: str, most: int) -> list[str]:
    """Return the values of `column` with the most calls, the largest first; ties by name."""
    sums = frame.groupby(column, observed=True)["calls"].sum().reset_index()
    return [str(name) for name in sums.sort_values(["calls", column], ascending=[False, True])[column][:most]]


def _labels_exploded(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame with a row for each risk label, in `risk_label`; events without one are left out."""
    if "risk_label" not in frame.columns:
        charts.need(frame, "risk_labels")
        frame = frame.assign(risk_label=frame["risk_labels"].map(_labels)).explode("risk_label")
    return frame.dropna(subset=["risk_label"])


def _labels(value: Any) -> list[str]:
    # In a frame of our own it is JSON text, in one that somebody made it may be a list, an array or charts.nothing.
    if isinstance(value, str):
        value = json.loads(value)
    return [str(each) for each in value] if isinstance(value, Iterable) else []
