"""Nothing of the data runs or fetches anything in a real browser, whatever field, column or title it stands in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import vl_convert
from playwright.sync_api import Page as Tab

from agent_gateway_store import ApprovalRequest, AuditEvent, Page, Stats, ToolCall
from agent_gateway_store.models.approval import ApprovalResult
from agent_gateway_store.models.keys import ApiKey, TrustLevel
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.notebook import plot
from agent_gateway_store.notebook.inbox import Inbox
from browser import Seen, browser, picture
from builders import make_event
from xss import PAYLOADS

pytestmark = pytest.mark.system

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


def texts_of(record: type[Any], payload: str) -> dict[str, Any]:
    """The payload for every field that takes free text."""
    fields = record.model_fields.items()
    return {
        name: payload
        for name, field in fields
        if field.annotation in (str, str | None) and not name.endswith(("args_hash", "call_hash", "token"))
    }


def event(payload: str) -> AuditEvent:
    """An event that is hostile in every field."""
    return make_event(
        **texts_of(AuditEvent, payload),
        sanitized_args={payload: [payload, {payload: payload}]},
        risk_labels=[payload],
        redaction_flags=[{"field": payload, "reason": payload, "original_hash": payload}],
        execution_status="SUCCESS",
        timestamp=NOW,
    )


def approval(payload: str) -> ApprovalRequest:
    """An approval that is hostile in every field."""
    return ApprovalRequest(
        **texts_of(ApprovalRequest, payload),
        tool_call=ToolCall(server=payload, tool=payload, arguments={payload: payload}),
        output_payload={payload: payload},
        created_at=NOW,
        decision_at=NOW + timedelta(minutes=1),
        status="APPROVED",
    )


def key(payload: str) -> ApiKey:
    """An API key that is hostile in every field."""
    return ApiKey(**texts_of(ApiKey, payload), trust_level=TrustLevel.LOW)


def stats() -> Stats:
    """An aggregation whose groups are all payloads."""
    numbers = {"calls": 3, "denials": 1, "approvals": 1, "errors": 0}
    latencies = {"latency_p50_ms": 1.0, "latency_p95_ms": 5.0, "latency_p99_ms": 9.0}
    groups = ("caller_id", "tool_name", "risk_label", "decision")
    rows = [dict.fromkeys(groups, payload) | {"bucket": NOW} | numbers | latencies for payload in PAYLOADS]
    return Stats(rows, by=groups, bucket=timedelta(hours=1))


class Listing:
    """A store whose approvals are hostile; nothing else of it is used."""

    class approvals:  # noqa: N801  stands for an attribute
        """As `store.approvals`."""

        @staticmethod
        def list_requests(status: str, limit: int) -> Page[ApprovalRequest]:
            """All of them."""
            return Page([approval(payload) for payload in PAYLOADS])


def inbox() -> Inbox:
    """The table that stands in for the inbox where widgets are off, for a hostile approver."""
    made = Inbox(Listing(), approver=PAYLOADS[0], limit=100)
    made.refresh()
    return made


@pytest.fixture(scope="module")
def tab() -> Iterator[tuple[Tab, Seen]]:
    """A tab of one browser, and what it did."""
    with browser() as (context, seen):
        yield context.new_page(), seen


def stay_quiet(tab: tuple[Tab, Seen], html: str, path: Path, name: str, *, wait_for: str = ".ags-view") -> Tab:
    """Show the page, open what is folded, move and click about; nothing may run and nothing may be asked for."""
    page, seen = tab
    seen.errors.clear(), seen.tried.clear(), seen.requests.clear()
    path.write_text(f"<!doctype html><meta charset=utf-8><title>x</title><body>{html}", encoding="utf-8")
    page.goto(path.as_uri(), wait_until="load")
    page.wait_for_selector(wait_for, timeout=5_000)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    for mark in page.locator("svg [role='graphics-symbol']").all()[:12]:
        box = mark.bounding_box()
        if box is not None:
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_timeout(100)
    assert (seen.errors, seen.tried, seen.requests) == ([], [], [])
    return page


VIEWS: dict[str, Any] = {
    "events": lambda: Page([event(payload) for payload in PAYLOADS]),
    "events-all-columns": lambda: Page([event(p) for p in PAYLOADS], columns=tuple(AuditEvent.model_fields)),
    "approvals": lambda: Page([approval(p) for p in PAYLOADS], columns=tuple(ApprovalRequest.model_fields)),
    "keys": lambda: Page([key(payload) for payload in PAYLOADS]),
    "stats": stats,
    "columns": lambda: Page([dict.fromkeys(PAYLOADS, "x")], next_cursor=PAYLOADS[0]),
    "inbox": inbox,
}


@pytest.mark.parametrize("name", VIEWS)
def test_tables_are_harmless(name: str, tab: tuple[Tab, Seen], tmp_path: Path) -> None:
    """Every payload in every field and as the name of a column; the payloads are there to be read."""
    html = VIEWS[name]()._repr_html_()

    page = stay_quiet(tab, html, tmp_path / "page.html", name)

    picture(page, f"xss-{name}")
    assert page.locator(".ags-view").count() == 1
    text = page.locator(".ags-view").inner_text()
    assert PAYLOADS[0] in text
    assert (
        page.locator(".ags-view :is(script, img, svg, iframe, object, embed, link, meta, a, video, form)").count() == 0
    )


def test_cards_are_harmless(tab: tuple[Tab, Seen], tmp_path: Path) -> None:
    """The card of one event, approval, key and result for each payload."""
    cards = []
    for payload in PAYLOADS:
        result = ApprovalResult(approval_id=approval("x").approval_id, status=ApprovalStatus.DENIED, note=payload)
        cards += [each._repr_html_() for each in (event(payload), approval(payload), key(payload), result)]

    page = stay_quiet(tab, "".join(cards), tmp_path / "page.html", "cards")

    assert page.locator(".ags-card").count() == 4 * len(PAYLOADS)


TITLE = "".join(PAYLOADS[:6])
# Drawn within the test: what only collects the tests need not load the libraries that draw.
CHARTS: dict[str, Callable[[Any], Any]] = {
    "timeline": lambda frame: plot.timeline(frame.assign(decision=pd.Series(PAYLOADS, dtype="object")), title=TITLE),
    "calls": lambda frame: plot.calls(frame, title=TITLE),
    "latency": lambda frame: plot.latency(frame, title=TITLE),
    "latency-by": lambda frame: plot.latency(frame, by="tool_name"),
    "latency-stats": lambda _: plot.latency(stats(), title=TITLE),
    "risk": lambda frame: plot.risk(frame, title=TITLE),
    "risk-stats": lambda _: plot.risk(stats()),
    "waiting": lambda _: plot.waiting(Page([approval(payload) for payload in PAYLOADS]), title=TITLE),
    "empty": lambda frame: plot.calls(frame[:0], title=TITLE),
}
"""Each plot over a frame of hostile events, with a hostile title."""


@pytest.mark.parametrize("name", CHARTS)
def test_charts_are_harmless(name: str, tab: tuple[Tab, Seen], tmp_path: Path) -> None:
    """As a notebook shows them (Vega in the page, its libraries inline), tooltips and all, and as SVG."""
    chart = CHARTS[name](Page([event(payload) for payload in PAYLOADS]).to_pandas())

    live = chart.to_html(inline=True, embed_options={"actions": False})
    page = stay_quiet(tab, live, tmp_path / "live.html", f"chart-{name}", wait_for="svg.marks")
    picture(page, f"xss-chart-{name}")
    assert chart.to_json().count("<") == 0
    svg = vl_convert.vegalite_to_svg(chart.to_json())
    page = stay_quiet(tab, svg, tmp_path / "still.html", f"chart-{name}-svg", wait_for="svg")
    assert page.locator("svg :is(script, a, image, foreignObject, use, animate)").count() == 0


def test_the_trap_works(tab: tuple[Tab, Seen], tmp_path: Path) -> None:
    """The same payloads unescaped do run and do ask, so that silence means something."""
    page, seen = tab
    ran, asked = 0, 0
    for payload in PAYLOADS[:24]:
        seen.errors.clear(), seen.tried.clear(), seen.requests.clear()
        path = tmp_path / "page.html"
        path.write_text(f"<!doctype html><meta charset=utf-8><base href=http://xss.example/><body>{payload}")
        page.goto(path.as_uri(), wait_until="load")
        page.wait_for_timeout(30)
        ran += any(error.startswith("dialog") for error in seen.errors)
        asked += any("xss.example" in each for each in seen.tried) and any("xss.example" in r for r in seen.requests)

    assert ran >= 8
    assert asked >= 4
