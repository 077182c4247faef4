"""`Page`: a list that renders safely and gives plain dicts."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from rich.console import Console

from agent_gateway_store import Page, _text
from agent_gateway_store._text import escape
from agent_gateway_store.models.approval import ApprovalResult
from agent_gateway_store.models.keys import ApiKey, IssuedKey, TrustLevel
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.results.cells import cell
from agent_gateway_store.testing import make_notice
from builders import make_event, make_key, make_request

pytestmark = pytest.mark.unit

SECRET = "do-not-show"


def rendered(page: object) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="truecolor")
    console.print(page)
    return console.file.getvalue()  # type: ignore[attr-defined]


def key(**fields: object) -> ApiKey:
    return make_key(key_hash=SECRET, previous_key_hash=SECRET, **fields)


def test_a_page_is_a_list() -> None:
    """It compares, slices and counts as one, and knows where the next begins; a slice is a page that does not."""
    page = Page([key(), key(), key()], next_cursor="abc", columns=("key_id",), record_type=ApiKey)

    assert page == list(page)
    assert (page[-1], page.next_cursor, Page().next_cursor, bool(Page())) == (list(page)[-1], "abc", None, False)
    for taken in (slice(1), slice(None, None, 2), slice(9, None)):
        part = page[taken]
        assert (type(part), list(part)) == (Page, list(page)[taken])
        assert (part.columns, part.record_type, part.next_cursor) == (("key_id",), ApiKey, None)


@pytest.mark.parametrize("count", [200, 201, 5_000])
def test_a_cut_table_says_so(count: int) -> None:
    """At most 200 rows are drawn, and the rest is not passed over in silence."""
    page = Page([{"n": f"row{number}"} for number in range(count)])
    html, text = page._repr_html_(), rendered(page)
    note = "200 rows" if count == 200 else f"first 200 of {count} rows"

    assert html.count("<tr>") == 201
    assert html.count('<td class="ags-line">row') == 200
    assert "row199" in text
    assert "row200" not in html + text
    assert note in html
    assert note in " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    assert len(page.to_dicts()) == count


@pytest.mark.parametrize(("width", "is_table"), [(60, False), (200, True)])
def test_a_narrow_terminal_shows_each_row_as_lines(width: int, is_table: bool) -> None:
    """Where a table would break every word, each value gets a line of its own."""
    console = Console(file=io.StringIO(), width=width)
    event = make_event()
    console.print(Page([event], columns=("timestamp", "caller_id", "tool_name", "decision", "request_id", "org_id")))
    text = console.file.getvalue()  # type: ignore[attr-defined]

    assert ("┃" in text) is is_table
    assert all(value in text for value in (event.caller_id, event.tool_name, event.decision, event.request_id))
    assert "1 row" in text


def test_a_terminal_gets_no_control_bytes() -> None:
    """Escape sequences, bells, line breaks, bidi marks and surrogates are shown, not obeyed; nor is rich's markup."""
    nasty = "\x1b[31mred\x1b]0;title\x07\r\n\x9b1m\u202e\u2066\u200f\u061c\ud800[bold]x[/bold]"
    text = rendered(Page([{"a": nasty, nasty: 1}]))
    own = re.sub(r"\x1b\[[0-9;]*m", "", text)

    assert "\x1b[31m" not in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", own)
    assert own.count("\\x1b[31mred") == 2
    assert own.count("[bold]x[/bold]") == 2
    assert text.encode()


def test_long_cells_are_cut() -> None:
    page = Page([{"a": "x" * 1_000}])

    assert f"<td>{'x' * 119}…</td>" in page._repr_html_()
    assert "1 row; … marks what is cut; .to_dicts() has everything" in page._repr_html_()
    assert "… marks what is cut" in rendered(page)
    assert "… marks what is cut" not in rendered(Page([{"a": "short"}])) + Page([{"a": "short"}])._repr_html_()
    assert page.to_dicts() == [{"a": "x" * 1_000}]


def test_long_cells_are_cut_before_they_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long text only the part that is shown is escaped, and what is shown is the same."""
    text = "\x00\\x00 👩\u200d👩 " * 10_000
    expected = f"{escape(text)[:119]}…"
    lengths: list[int] = []
    monkeypatch.setattr(_text, "escape", lambda given: lengths.append(len(given)) or escape(given))

    assert cell(text) == expected
    assert lengths == [121]


def test_dicts_are_json_without_hidden_fields() -> None:
    """Tokens and key hashes are left out; the rest is JSON: text for times, enums and ids."""
    approval_id = uuid4()
    call = {"server": "s", "tool": "t"}
    created_at = datetime(2024, 5, 1, tzinfo=UTC)
    request = make_request(approval_id=approval_id, token=SECRET, tool_call=call, created_at=created_at)
    result = ApprovalResult(approval_id=approval_id, token=SECRET, status=ApprovalStatus.APPROVED)
    page = Page([key(), request, result])
    dicts = page.to_dicts()

    assert SECRET not in f"{dicts}{page._repr_html_()}{rendered(page)}{page}"
    assert not {"token", "key_hash", "previous_key_hash"} & {name for row in dicts for name in row}
    assert dicts[0]["trust_level"] == 2
    assert dicts[1]["created_at"] == "2024-05-01T00:00:00Z"
    assert dicts[1]["approval_id"] == str(approval_id)
    assert dicts[1]["tool_call"] == {"server": "s", "tool": "t", "arguments": {}}
    assert dicts[2]["status"] == "APPROVED"


def test_models_inside_a_model_hide_their_secrets_too() -> None:
    """An issued key holds its row: neither the plaintext nor the hash in that row is shown anywhere."""
    issued = IssuedKey(plaintext=SECRET, api_key=key())
    page = Page([issued])

    shown = f"{page.to_dicts()}{page._repr_html_()}{rendered(page)}{issued._repr_html_()}{rendered(issued)}"
    assert page.to_dicts()[0]["api_key"]["key_id"] == "k1"
    assert SECRET not in shown
    assert SECRET not in str(page.to_arrow().to_pylist())


def test_a_terminal_shows_decisions_in_their_colour() -> None:
    """A word that decides is coloured and whole, arguments are one line, one record is a list of what is set."""
    event = make_event(decision="DENY", sanitized_args={"path": "a.txt", "n": [1]})
    page, card = rendered(Page([event], columns=("decision", "tool_name", "sanitized_args"))), rendered(event)

    assert "\x1b[1;31mDENY" in page
    assert "path=a.txt n=[1]" in page
    assert "\x1b[1;31mDENY" in card
    assert '"path": "a.txt"' in card
    assert "approver_id" not in card


def test_a_tool_call_is_one_line_in_a_terminal() -> None:
    """Server, tool and arguments; without arguments nothing follows."""
    calls = [{"server": "files", "tool": "delete", "arguments": arguments} for arguments in ({"path": "a.txt"}, {})]

    text = rendered(Page([{"tool_call": call} for call in calls]))
    assert "files.delete path=a.txt" in text
    assert re.search(r"files\.delete +│", text)


def test_an_approval_that_was_not_stored_whole_says_so() -> None:
    """As a card and in a table, in a notebook and in a terminal; a whole one does not."""

    def views(arguments: dict[str, object]) -> list[str]:
        approval = make_request(tool_call={"server": "s", "tool": "t", "arguments": arguments})
        notice = make_notice(tool_call=approval.tool_call)
        shown = [approval, notice, Page([approval])]
        texts = [view for each in shown for view in (each._repr_html_(), rendered(each))]
        # A terminal breaks the sentence over lines.
        return ["".join(re.findall(r"\w", re.sub(r"\x1b\[[0-9;]*m", "", text))) for text in texts]

    sentence = "".join(re.findall(r"\w", _text.CUT_CALL))
    for arguments, is_said in (({"cmd": "[cut: 1 more entries]"}, True), ({"cmd": "ls"}, False)):
        assert [sentence in view for view in views(arguments)] == [is_said] * 6


def test_a_page_of_anything_renders() -> None:
    """What is no record has one column; a notebook shows no traceback in place of a list. Dicts are copies."""
    page, source = Page(range(2)), {"a": 1}
    Page([source]).to_dicts()[0]["a"] = 2

    assert source == {"a": 1}
    assert ">1</td>" in page._repr_html_()
    assert "value" in rendered(page)
    assert page.to_arrow().to_pydict() == {"value": [0, 1]}


def test_only_numbers_are_aligned_as_numbers() -> None:
    """Truth values and words of an enum stand on the left, as in a notebook."""
    page = Page([{"calls": 7, "p50": 1.5, "is_active": True, "trust_level": TrustLevel.LOW}])

    assert [column.justify for column in page.__rich__().columns] == ["right", "right", "left", "left"]
    assert page._repr_html_().count("<th class=ags-num>") == 2
