"""Charts of how long something took: calls, and approvals until their decision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agent_gateway_store.notebook import charts
from agent_gateway_store.results import Page
from agent_gateway_store.results.cells import HEX

if TYPE_CHECKING:
    import pandas as pd

    from agent_gateway_store.notebook.charts import Chart

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
    return charts.finish(chart, title or f"Latency by {by}", said, axis=order)


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
