"""Altair charts of what the store holds, which can be changed, layered and saved.

Each takes a result (`Page`, `Stats`), a DataFrame (pandas, Polars) or Arrow table of one, or a `SyncGatewayStore` with
the filters of `store.audit.search`. Everything is counted before it is drawn, so a million events make a small chart.
Times are UTC. What comes from the data cannot become markup, a script or an expression.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from agent_gateway_store.notebook import charts
from agent_gateway_store.results import Page
from agent_gateway_store.results.cells import HEX

if TYPE_CHECKING:
    import pandas as pd

    from agent_gateway_store.notebook.charts import Chart

__all__ = ["calls", "latency", "risk", "timeline", "waiting"]

OTHERS = "others"
# Rows that can be read without scrolling; colours that differ enough, with `others` nine of the ten of tableau10;
# columns whose slanted labels do not overlap in the width.
_TOOLS, _CALLERS, _LABELS = 20, 8, 12
_STEPS = [
    *(timedelta(seconds=s) for s in (1, 5, 15, 60, 300, 900)),
    *(timedelta(hours=h) for h in (1, 3, 6)),
    *(timedelta(days=d) for d in (1, 7, 28, 364)),
]
# Bars of a timeline, about five pixels each in the width of a plot.
_MOST = 120
# As many rows as the chart of calls has.
_GROUPS = 20
# The largest page that `list_requests` gives, and ten of them: enough for percentiles, at most a second or two.
_PAGE, _APPROVALS = 500, 5_000
# Bins of a histogram: about 18 pixels each for latencies, and a few more for waits, which are fewer.
_LATENCY_BINS, _WAIT_BINS = 36, 30
_PERCENTILES = {"latency_p50_ms": "p50", "latency_p95_ms": "p95", "latency_p99_ms": "p99"}
_PERCENTILE_COLOURS = {"p50": HEX["info"], "p95": HEX["wait"], "p99": HEX["bad"]}
_ANSWERS = {"APPROVED": "approved", "USED": "approved", "DENIED": "denied", "CANCELLED": "cancelled"}
_ANSWER_COLOURS = {"approved": HEX["good"], "denied": HEX["bad"], "cancelled": HEX["off"]}
_MS_AXIS: dict[str, Any] = {"values": [1, 10, 100, 1_000, 10_000, 100_000], "format": ",d"}
_SECONDS = (
    "datum.value >= 86400 ? datum.value / 86400 + ' d' : datum.value >= 3600 ? datum.value / 3600 + ' h' : "
    "datum.value >= 60 ? datum.value / 60 + ' min' : datum.value + ' s'"
)
_METRICS = frozenset({"bucket", "calls", "denials", "approvals", "errors", *_PERCENTILES})


def timeline(source: Any, *, title: str | None = None, **filters: Any) -> Chart:
    """Draw calls over time, stacked by decision.

    Args:
        source: Audit events, `store.audit.stats(by="decision", bucket="1h")`, or a `SyncGatewayStore`.
        title: In place of the usual one.
        filters: With a store: what to draw, as for `store.audit.search`; `bucket` sets the buckets' length.

    Raises:
        ValueError: The result lacks a column that is needed.
        TypeError: `source` is not one of these.
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
    return charts.finish(chart, title or "Calls by tool and caller", said)


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
    return charts.finish(chart, title or "Risk labels by tool", said)


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
    """Return the length of a time bucket, a multiple of `least`, of which about 120 at most fill the span."""
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
    # In a frame of our own it is JSON text, in one that somebody made it may be a list, an array or nothing.
    if isinstance(value, str):
        value = json.loads(value)
    return [str(each) for each in value] if isinstance(value, Iterable) else []


def latency(source: Any, *, by: str | None = None, title: str | None = None, **filters: Any) -> Chart:
    """Draw how long calls took: the distribution of events, or the percentiles of groups.

    Events make a histogram of those that ran, with p50, p95 and p99. `Stats`, or events with `by`, make a line for
    each group, the slowest first.

    Args:
        source: Audit events, `store.audit.stats(by="tool_name")`, or a `SyncGatewayStore`.
        by: Column to group events by; with a store the default is tool_name.
        title: In place of the usual one.
        filters: With a store: what to draw, as for `store.audit.search`.

    Raises:
        ValueError, TypeError, MissingExtraError: As for `timeline`.
    """
    instead = 'plot.latency(await store.audit.stats(by="tool_name"))'
    frame = charts.stats_of(source, instead, by=by or "tool_name", **filters)
    if set(_PERCENTILES) <= set(frame.columns):
        return _percentiles(frame, by or _group_of(frame), title)
    charts.need(frame, "latency_ms", *([by] if by else []))
    if "execution_status" in frame.columns:
        frame = frame.dropna(subset=["execution_status"])
    frame = frame.dropna(subset=["latency_ms"])
    if frame.empty:
        return charts.nothing(title, "Latency", "calls that ran")
    if by:
        groups = frame.groupby(by, observed=True)["latency_ms"]
        quantiles = groups.quantile([0.5, 0.95, 0.99]).unstack()
        quantiles.columns = list(_PERCENTILES)
        return _percentiles(quantiles.assign(calls=groups.size()).reset_index(), by, title)
    return _histogram(frame["latency_ms"].astype("float64"), title)


def waiting(source: Any, *, title: str | None = None, status: str | None = None) -> Chart:
    """Draw how long approvals waited for their decision.

    Args:
        source: Approvals (`store.approvals.list_requests()`), or a `SyncGatewayStore`: its newest 5,000.
        title: In place of the usual one.
        status: With a store: only approvals of this status.

    Raises:
        ValueError, TypeError, MissingExtraError: As for `timeline`.
    """
    alt, pd = charts.libraries()
    instead = "plot.waiting(await store.approvals.list_requests(limit=500))"
    frame = charts.frame_of(source, lambda store: _all_approvals(store, status), instead=instead)
    charts.need(frame, "status", "created_at", "decision_at")
    answers = frame["status"].astype("object").map(_ANSWERS)
    decided = frame.assign(answer=answers).dropna(subset=["answer", "decision_at"])
    if decided.empty:
        return charts.nothing(title, "Waiting for approval", "decided approvals")
    times = [pd.to_datetime(decided[name], utc=True) for name in ("created_at", "decision_at")]
    seconds = (times[1] - times[0]).dt.total_seconds().clip(lower=0)
    edges, numbers = _log_bins(seconds, _WAIT_BINS)
    counts = decided.groupby(["answer", numbers.rename("bin")]).size()
    data = pd.DataFrame(
        [
            {"start": float(edges[number]), "end": float(edges[number + 1]), "answer": answer, "approvals": count}
            for (answer, number), count in counts.items()
        ]
    )
    chart = charts.stacked_bars(
        data,
        "answer",
        _ANSWER_COLOURS,
        y="approvals",
        gap=1,
        x=alt.X(
            "start:Q",
            title="waiting time (log scale)",
            scale=alt.Scale(type="log", nice=False),
            axis=alt.Axis(values=[1, 10, 60, 600, 3600, 36000, 86400, 864000], labelExpr=_SECONDS, grid=False),
        ),
        x2="end:Q",
        tooltip=[
            "answer:N",
            alt.Tooltip("approvals:Q"),
            alt.Tooltip("start:Q", format=",.0f", title="from (s)"),
            alt.Tooltip("end:Q", format=",.0f", title="to (s)"),
        ],
    )
    expired = int((frame["status"].astype("object") == "EXPIRED").sum())
    median, most = (charts.span(seconds.quantile(share)) for share in (0.5, 0.95))
    summary = f"{len(decided):,} decided: median {median}, 95 % within {most}"
    return charts.finish(chart, title or "Waiting for approval", f"{summary}; {expired:,} expired undecided")


def _group_of(frame: Any) -> str:
    columns = [name for name in frame.columns if name not in _METRICS]
    if not columns:
        raise ValueError("This plot needs groups: store.audit.stats(by=...).")
    return str(columns[0])


def _percentiles(frame: Any, by: str, title: str | None) -> Chart:
    alt, _ = charts.libraries()
    charts.need(frame, by)
    frame = frame.dropna(subset=[by, *_PERCENTILES])
    if frame.empty:
        return charts.nothing(title, "Latency", "calls that ran")
    frame = frame.sort_values("calls", ascending=False)[:_GROUPS] if "calls" in frame.columns else frame[:_GROUPS]
    frame = frame.assign(group=charts.safe_column(frame[by])).drop_duplicates("group")
    order = list(frame.sort_values("latency_p95_ms", ascending=False)["group"])
    data = frame.melt("group", list(_PERCENTILES), "percentile", "ms").replace({"percentile": _PERCENTILES})
    data = data.assign(ms=data["ms"].astype("float64").clip(lower=1.0))
    base = alt.Chart(data).encode(y=alt.Y("group:N", title=None, sort=order, axis=alt.Axis(grid=True)))
    scale = alt.Scale(type="log")
    lines = base.mark_rule(color="#b8c0c8", strokeWidth=2).encode(
        x=alt.X("min(ms):Q", title="latency (ms, log scale)", scale=scale), x2="max(ms):Q"
    )
    points = base.mark_circle(size=80, opacity=1).encode(
        x=alt.X("ms:Q", scale=scale, axis=alt.Axis(**_MS_AXIS)),
        color=charts.colours("percentile", data, _PERCENTILE_COLOURS),
        tooltip=["group:N", "percentile:N", alt.Tooltip("ms:Q", format=",.0f", title="ms")],
    )
    chart = (lines + points).properties(width=charts.WIDTH - 60, height=alt.Step(20))
    said = "p50, p95 and p99 in milliseconds; the slowest first"
    return charts.finish(chart, title or f"Latency by {by}", said)


def _histogram(values: Any, title: str | None) -> Chart:
    alt, pd = charts.libraries()
    edges, numbers = _log_bins(values, _LATENCY_BINS)
    counts = numbers.value_counts().reindex(range(_LATENCY_BINS), fill_value=0)
    data = pd.DataFrame({"start": edges[:-1], "end": edges[1:], "count": counts})
    marks = {name: float(values.quantile(share)) for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}
    rules = pd.DataFrame([{"percentile": name, "ms": max(1.0, ms)} for name, ms in marks.items()])
    scale = alt.Scale(type="log", nice=False)
    bars = (
        alt.Chart(data)
        .mark_bar(binSpacing=1, color=HEX["info"])
        .encode(
            x=alt.X("start:Q", title="latency (ms, log scale)", scale=scale, axis=alt.Axis(**_MS_AXIS, grid=False)),
            x2="end:Q",
            y=alt.Y("count:Q", title="calls", axis=alt.Axis(tickMinStep=1, format=",d")),
            y2=alt.datum(0),
            tooltip=[
                alt.Tooltip("start:Q", format=",.0f", title="from (ms)"),
                alt.Tooltip("end:Q", format=",.0f", title="to (ms)"),
                alt.Tooltip("count:Q", format=",", title="calls"),
            ],
        )
    )
    lines = alt.Chart(rules).mark_rule(color=charts.INK, strokeDash=[4, 3]).encode(x=alt.X("ms:Q", scale=scale))
    names = lines.mark_text(dy=-4, baseline="bottom", fontSize=11, color=charts.INK).encode(
        y=alt.value(0), text="percentile:N"
    )
    summary = ", ".join(f"{name} {ms:,.0f} ms" for name, ms in marks.items())
    chart = (bars + lines + names).properties(width=charts.WIDTH, height=220)
    return charts.finish(chart, title or "Latency", f"{len(values):,} calls that ran: {summary}")


def _all_approvals(store: Any, status: str | None) -> Any:
    page = store.approvals.list_requests(status, limit=_PAGE)
    found = list(page)
    while page.next_cursor and len(found) < _APPROVALS:
        page = store.approvals.list_requests(status, limit=_PAGE, cursor=page.next_cursor)
        found += page
    return Page(found, record_type=page.record_type)


def _log_bins(values: pd.Series, count: int) -> tuple[Any, pd.Series]:
    """Return the edges of `count` bins of equal width on a logarithmic axis, and the number of each value's bin.

    What is smaller than 1 counts as 1.
    """
    import numpy

    _, pd = charts.libraries()
    raised = values.clip(lower=1.0)
    low, high = float(raised.min()), float(raised.max())
    # One value alone still gets a bar that can be seen: wider than the value by about a third on either side.
    if high <= low:
        low, high = low / 1.3, high * 1.3
    edges = numpy.geomspace(low, high, count + 1)
    return edges, pd.cut(raised, edges, labels=False, include_lowest=True)
