"""Plots count before they draw, name their units, take every form of a result, and say so when there is nothing."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import altair as alt
import pandas as pd
import pytest
import vl_convert

from agent_gateway_store import ApprovalRequest, GatewayStore, Page, Stats
from agent_gateway_store.errors import MissingExtraError
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.notebook import charts, plot
from agent_gateway_store.notebook.plot import step_for
from builders import make_event, make_request

pytestmark = pytest.mark.unit

START = datetime(2026, 5, 1, tzinfo=UTC)
LATENCIES = {"latency_p50_ms": 10.0, "latency_p95_ms": 50.0, "latency_p99_ms": 90.0}


def events(count: int = 48) -> Page[AuditEvent]:
    """An event each hour; every sixth is denied and did not run."""
    return Page(
        make_event(
            timestamp=START + timedelta(hours=number),
            decision="ALLOW" if number % 6 else "DENY",
            execution_status="SUCCESS" if number % 6 else None,
            tool_name=f"tool_{number % 3}",
            caller_id=f"caller_{number % 2}",
            risk_labels=["A", "B"][: number % 3],
            latency_ms=number,
        )
        for number in range(count)
    )


def approval(status: str, waited_s: float | None) -> ApprovalRequest:
    decided = None if waited_s is None else START + timedelta(seconds=waited_s)
    return make_request(status=status, created_at=START, decision_at=decided)


def rows_of(chart: Any) -> list[dict[str, Any]]:
    return [row for rows in chart.to_dict().get("datasets", {}).values() for row in rows]


def said(chart: Any) -> str:
    title = chart.to_dict()["title"]
    return " | ".join([title["text"], *title["subtitle"]])


def test_a_plot_takes_every_form_of_a_result() -> None:
    page = events()
    forms = [page.to_pandas(), page.to_polars(), page.to_arrow(), list(page)]
    for draw in (plot.timeline, plot.calls, plot.latency, plot.risk):
        chart = draw(page).to_dict()
        for source in forms:
            assert draw(source).to_dict() == chart, type(source)


def test_the_timeline_counts_each_decision_in_each_bucket() -> None:
    """The sums are those of the data, layers lie on each other, axes are UTC and name the bucket."""
    chart = plot.timeline(events())

    rows = rows_of(chart)
    assert sum(row["calls"] for row in rows if row["decision"] == "DENY") == 8
    assert sum(row["calls"] for row in rows) == 48
    assert all(row["top"] - row["bottom"] == row["calls"] for row in rows)
    spec = chart.to_dict()["encoding"]
    assert spec["x"]["scale"]["type"] == "utc"
    assert (spec["x"]["title"], spec["y"]["title"]) == ("time (UTC)", "calls per 1 h")
    assert said(chart) == "Calls by decision | 48 calls, 2026-05-01 00:00 to 2026-05-02 23:00 UTC"


def test_the_timeline_of_stats_keeps_their_buckets() -> None:
    rows = [
        {"bucket": START + timedelta(hours=6 * number), "decision": "ALLOW", "calls": 2, "denials": 0} | LATENCIES
        for number in range(1_000)
    ]
    few, many = (plot.timeline(Stats(part, by="decision", bucket=timedelta(hours=6))) for part in (rows[:3], rows))

    assert few.to_dict()["encoding"]["y"]["title"] == "calls per 6 h"
    assert many.to_dict()["encoding"]["y"]["title"] == "calls per 7 d"
    assert sum(row["calls"] for row in rows_of(many)) == 2_000
    assert len(rows_of(many)) < 130


def test_a_bucket_suits_the_span() -> None:
    for span, least, step in (
        (timedelta(), None, timedelta(seconds=1)),
        (timedelta(hours=2), None, timedelta(minutes=1)),
        (timedelta(days=14), None, timedelta(hours=3)),
        (timedelta(days=14), timedelta(hours=1), timedelta(hours=3)),
        (timedelta(days=1), timedelta(hours=2), timedelta(hours=6)),
        (timedelta(days=3_000), None, timedelta(days=28)),
        (timedelta(days=60_000), None, timedelta(days=364)),
        (timedelta(minutes=5), timedelta(minutes=7), timedelta(days=7)),
    ):
        assert step_for(span, least) == step


def test_calls_are_counted_by_tool_and_caller() -> None:
    """The 20 busiest tools and the 8 busiest callers; the others are one, and what is left out is told."""
    page = Page(
        make_event(tool_name=f"tool_{tool:02}", caller_id=f"caller_{caller:02}")
        for tool in range(25)
        for caller in range(12)
        for _ in range(2 if tool < 20 and caller < 8 else 1)
    )
    chart = plot.calls(page)

    rows = rows_of(chart)
    assert {row["tool"] for row in rows} == {f"tool_{number:02}" for number in range(20)}
    assert {row["caller"] for row in rows} == {f"caller_{number:02}" for number in range(8)} | {"others"}
    assert sum(row["calls"] for row in rows if row["caller"] == "others") == 20 * 4
    assert said(chart) == f"Calls by tool and caller | {len(page)} calls; 5 rarer tools left out"


def test_latency_draws_what_ran() -> None:
    """Calls that were refused took no time; every other is in one bin; groups have a line each, of events or stats."""
    chart = plot.latency(events())
    by_events = plot.latency(events(), by="tool_name")
    by_stats = plot.latency(
        Stats([{"tool_name": f"tool_{n}", "calls": 3} | LATENCIES for n in range(3)], by="tool_name")
    )

    assert sum(row["count"] for row in rows_of(chart) if "count" in row) == 40
    ran = pd.Series([number for number in range(48) if number % 6])
    assert f"40 calls that ran: p50 {ran.quantile(0.5):,.0f} ms, p95 {ran.quantile(0.95):,.0f} ms" in said(chart)
    lines = {(f"tool_{number}", name) for number in range(3) for name in ("p50", "p95", "p99")}
    for grouped in (by_events, by_stats):
        assert {(row["group"], row["percentile"]) for row in rows_of(grouped) if "percentile" in row} == lines
        assert said(grouped).startswith("Latency by tool_name | p50, p95 and p99 in milliseconds")


def test_risk_counts_a_call_under_each_of_its_labels() -> None:
    """From events, whose labels are lists or JSON, and from stats, where a row without a label falls out."""
    from_events = plot.risk(events())
    stats = Stats(
        [{"tool_name": "t", "risk_label": label, "calls": 5} | LATENCIES for label in ("A", None)],
        by=("tool_name", "risk_label"),
    )

    assert {(row["tool"], row["label"], row["calls"]) for row in rows_of(from_events)} == {
        ("tool_1", "A", 16),
        ("tool_2", "A", 16),
        ("tool_2", "B", 16),
    }
    assert [(row["label"], row["calls"]) for row in rows_of(plot.risk(stats))] == [("A", 5)]


def test_waiting_draws_what_was_decided() -> None:
    page = Page(
        [approval("USED", 60), approval("APPROVED", 90), approval("DENIED", 5), approval("PENDING", None)]
        + [approval("EXPIRED", None)] * 2
    )
    chart = plot.waiting(page)

    counts: dict[str, int] = {}
    for row in rows_of(chart):
        counts[row["answer"]] = counts.get(row["answer"], 0) + row["approvals"]
    assert counts == {"approved": 2, "denied": 1}
    assert said(chart) == "Waiting for approval | 3 decided: median 1 min, 95 % within 1.45 min; 2 expired undecided"


def test_nothing_to_draw_is_said() -> None:
    empty = Page([], record_type=AuditEvent)
    for draw in (plot.timeline, plot.calls, plot.latency, plot.risk):
        for source in (empty, empty.to_pandas()):
            chart = draw(source, title="Mine")
            assert said(chart) == "Mine"
            assert "in this result." in json.dumps(chart.to_dict())
    for page in (Page([], record_type=ApprovalRequest), Page([approval("PENDING", None)])):
        assert "No decided approvals in this result." in json.dumps(plot.waiting(page).to_dict())


def test_many_events_make_a_small_chart() -> None:
    frame = pd.DataFrame(
        {
            "timestamp": [START + timedelta(seconds=37 * number) for number in range(6_000)],
            "decision": "ALLOW",
            "caller_id": [f"caller_{number % 300}" for number in range(6_000)],
            "tool_name": [f"tool_{number % 700}" for number in range(6_000)],
            "risk_labels": [[f"label_{number % 90}"] for number in range(6_000)],
            "latency_ms": range(6_000),
        }
    )

    for draw in (plot.timeline, plot.calls, plot.latency, plot.risk):
        assert len(rows_of(draw(frame))) <= 300, draw.__name__


def test_a_dark_theme_leaves_dark_ink_on_white() -> None:
    """A theme of the notebook changes neither the ground, around the marks and behind them, nor the ink on it."""
    with alt.theme.enable("dark"):
        drawn = vl_convert.vegalite_to_svg(plot.latency(events()).to_json())

    fills = set(re.findall(r'fill="(#\w+|white)"', drawn))
    assert {"white", charts.INK} <= fills
    assert fills & {"#fff", "#333"} == set()


def test_text_of_the_data_is_neither_markup_nor_a_field_name() -> None:
    nasty = "</script><b>datum['x']\x1b\u202e"
    page = Page([make_event(tool_name=nasty, caller_id=nasty, risk_labels=[nasty], execution_status="SUCCESS")])

    for draw in (plot.calls, plot.risk, plot.timeline, plot.latency):
        text = draw(page, title=nasty).to_json()
        assert "<" not in text
        assert "\\u001b" not in text
        assert "x3c/script>" in text


async def test_what_is_missing_is_named() -> None:
    """The column that a plot needs, and what to write for an asynchronous store or what was not awaited."""
    with pytest.raises(ValueError, match="needs decision; the result has timestamp"):
        plot.timeline(events().to_pandas()[["timestamp"]])
    with pytest.raises(ValueError, match=r"needs groups: store\.audit\.stats"):
        plot.latency(Stats([{"calls": 1} | LATENCIES]))
    store = GatewayStore("sqlite://")
    with pytest.raises(TypeError, match=r"write: plot\.calls\(await store\.audit\.stats"):
        plot.calls(store)
    with pytest.raises(TypeError, match=r"not awaited; write: plot\.timeline\(await"):
        plot.timeline(store.audit.list_recent())
    with pytest.raises(TypeError, match="cannot be drawn from int"):
        plot.risk(5)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    page = events()
    for missing in ("altair", "pandas"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(MissingExtraError, match=r"agent-gateway-store\[notebook\]"):
                plot.calls(page)


@pytest.mark.parametrize(("chosen", "kept"), [("default", "svg"), ("json", "json")])
def test_a_plot_asks_no_public_server_for_scripts(chosen: str, kept: str) -> None:
    with alt.renderers.enable(chosen):
        drawn = plot.timeline(events())._repr_mimebundle_()

        assert alt.renderers.active == kept
    assert "https://cdn" not in json.dumps(drawn)
    assert kept == "json" or drawn["image/svg+xml"].startswith("<svg")
