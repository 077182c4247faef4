"""`_repr_html_`: escaped, bounded, without a script, and without a rule that reaches beyond it."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from html.parser import HTMLParser
from typing import Any

import pytest

from agent_gateway_store import Page
from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.approval import CastVote, VoteDecision
from agent_gateway_store.models.audit import AuditEvent, ExecutionStatus
from agent_gateway_store.models.keys import TrustLevel
from agent_gateway_store.results.html import style
from agent_gateway_store.testing import make_notice
from builders import make_event, make_request

pytestmark = pytest.mark.unit

NASTY = "<script>alert('1')</script>\"&<img src=x onerror=alert(1)>"
TAGS = {
    *("style", "div", "table", "thead", "tbody", "tr", "th", "td", "p", "span", "details", "summary", "pre", "small"),
    "b",
}


class Reader(HTMLParser):
    """Collects the elements of a view; complains of one that is not ours, or of an attribute besides `class`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.classes: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        assert {name for name, _ in attrs} <= {"class"}
        self.open.append(tag)
        self.classes += [name for _, value in attrs for name in (value or "").split()]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f"{data}|"


@pytest.mark.parametrize(
    "view",
    [
        Page(
            [{"a": NASTY, NASTY: 1, "decision": NASTY, "tool_call": {"server": NASTY, "tool": NASTY, "arguments": {}}}]
        ),
        Page([{"a": {NASTY: [NASTY]}, "b": [NASTY], "c": [{"x": NASTY}]}]),
        Page([], columns=(NASTY,), next_cursor=NASTY),
        make_event(tool_name=NASTY, sanitized_args={NASTY: NASTY}, risk_labels=[NASTY], llm_explanation=NASTY),
        make_request(caller_id=NASTY, risk_explanation=NASTY),
    ],
    ids=["cells", "json", "columns", "event", "approval"],
)
def test_nothing_of_the_data_becomes_markup(view: Any) -> None:
    """The elements are ours, each closed, and none has an attribute besides its class."""
    html = view._repr_html_()

    read = Reader(html)
    assert "<script" not in html
    assert "<img" not in html
    assert "ags-view" in read.classes


def test_the_style_reaches_only_the_view() -> None:
    """Every rule begins at the view's class, or at a theme above it; nothing is fetched."""
    css = re.sub(r"@media [^{]*\{(.*?\})\s*\}", r"\1", style().removeprefix("<style>").removesuffix("</style>"))

    selectors = [each.strip() for rule in re.findall(r"([^{}]+)\{", css) for each in rule.split(",")]
    assert len(selectors) > 30
    themes = r"\[data-jp-theme-light(=\"\w+\")?\]|\[data-md-color-scheme=\"\w+\"\]|\.vscode-\w+"
    assert [each for each in selectors if not re.match(rf"^(({themes}) )?\.ags-view[ .]?", each)] == []
    assert not re.search(r"url\(|@import|expression|</", css)


def test_words_that_decide_are_badges() -> None:
    """Each decision and status has the colour of what it means; the same word in another field is plain."""
    page = Page(
        [
            {"decision": "ALLOW", "status": "PENDING", "tool_name": "ALLOW"},
            {"decision": "DENY", "status": "EXPIRED"},
            {"decision": "APPROVAL_REQUIRED", "execution_status": "TOOL_ERROR"},
            {"decision": "SANITIZE_AND_ALLOW"},
            *({"execution_status": str(each)} for each in ExecutionStatus),
        ],
        columns=("decision", "status", "execution_status", "tool_name"),
    )

    badges = re.findall(r'<span class="ags-badge ags-(\w+)">(\w+)</span>', page._repr_html_())
    assert badges == [
        ("good", "ALLOW"),
        ("wait", "PENDING"),
        ("bad", "DENY"),
        ("off", "EXPIRED"),
        ("wait", "APPROVAL_REQUIRED"),
        ("bad", "TOOL_ERROR"),
        ("info", "SANITIZE_AND_ALLOW"),
        ("good", "SUCCESS"),
        ("bad", "TOOL_ERROR"),
        ("wait", "TIMEOUT"),
        ("off", "CANCELLED"),
        ("good", "APPROVED_OUTPUT_RELEASE"),
    ]
    assert '<td class="ags-line">ALLOW</td>' in page._repr_html_()


def test_arguments_fold() -> None:
    """A line to see, the whole behind it; one that is huge is cut and says how long it was."""
    html = Page([make_event(sanitized_args={"path": "a.txt", "text": "x" * 10_000})], columns=("sanitized_args",))

    shown = html._repr_html_()
    assert "<details><summary>path=a.txt text=xxx" in shown
    assert re.search(r"… \(10,0\d\d characters in all\)</pre></details>", shown)
    assert len(shown) < 20_000


def test_a_cell_for_each_column() -> None:
    """The chosen columns in their order, None as an empty cell, and a count that says when there is more."""
    page = Page([{"a": 1, "b": None, "c": 3}, {"a": "x y"}], columns=("b", "a"), next_cursor="abc")

    table = re.search(r"<table .*</table>", page._repr_html_())
    assert table is not None
    assert table[0] == (
        '<table class="ags-table"><thead><tr><th>b</th><th>a</th></tr></thead><tbody>'
        '<tr><td></td><td class="ags-num">1</td></tr><tr><td></td><td>x y</td></tr></tbody></table>'
    )
    assert '<p class="ags-foot">2 rows; there is more: pass next_cursor</p>' in page._repr_html_()


def test_an_empty_page_shows_its_columns() -> None:
    """It knows the kind of its records, so that nothing found still looks like the listing it is."""
    read = Reader(Page([], record_type=AuditEvent)._repr_html_())

    assert "|request_id|" in f"|{read.text}"
    assert "0 rows" in read.text


def test_times_are_utc_and_enums_named() -> None:
    """A time of any zone is shown in UTC, which the heading says; a trust level by its name."""
    when = datetime(2026, 5, 1, 2, 30, tzinfo=timezone(timedelta(hours=2)))
    html = Page([{"at": when, "trust_level": TrustLevel.LOW}])._repr_html_()

    assert "<th>at <small>UTC</small></th>" in html
    assert '<td class="ags-line">2026-05-01 00:30:00</td>' in html
    assert ">LOW</td>" in html


def test_a_card_has_what_is_set_and_names_the_rest() -> None:
    """One event: what was called and how it was decided at the top, long text whole, empty fields in one line."""
    rationale = "because\nof " + "this and that " * 20
    read = Reader(make_event(decision="DENY", deterministic_rationale=rationale, sanitized_args={})._repr_html_())

    assert read.text.startswith("AuditEvent |files.read_file| |DENY|")
    assert rationale in read.text
    assert re.search(r"empty: .*sanitized_args.*approver_id", read.text)


def test_other_records_have_cards() -> None:
    for record in (make_request(), make_request().tool_call):
        read = Reader(record._repr_html_())
        assert read.text.startswith(f"{type(record).__name__} |")
        assert "/tmp/report.txt" in read.text
    notice = make_notice(created_at=datetime(2026, 5, 1, tzinfo=UTC))._repr_html_()
    assert ("files.delete_file" in notice, "2026-05-01 00:00:00" in notice) == (True, True)


def test_votes_are_one_line_of_a_table() -> None:
    """Who voted what by which channel; hostile names are escaped."""
    request = make_request()
    vote = CastVote(approver_id=NASTY, decision=VoteDecision.DENIED, note="", channel="slack", voted_at=utc_now())
    request.__dict__["votes"] = [vote]
    reader = Reader(Page([request], columns=("votes",))._repr_html_())

    assert "<script>alert" in reader.text
    assert "DENIED (slack)" in reader.text
