"""Nothing is hidden in what people read, and no two values look alike: every surface, every code point."""

from __future__ import annotations

import io
import json
import logging
import unicodedata
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from agent_gateway_store import ApprovalRequest, Page, ToolCall
from agent_gateway_store._text import arguments_text, call_name, code_text, escape, json_text, word
from agent_gateway_store.cli.output import print_fields, say
from agent_gateway_store.notebook.charts import safe
from agent_gateway_store.notebook.inbox import Inbox
from agent_gateway_store.plugins.log import LogNotifier
from agent_gateway_store.plugins.slack.messages import decided_message, pending_message
from agent_gateway_store.testing import make_notice
from builders import make_event

pytestmark = pytest.mark.unit

# Default_Ignorable_Code_Point of DerivedCoreProperties.txt, Unicode 16.0.0
DEFAULT_IGNORABLE = [
    *(0x00AD, 0x034F, 0x061C, *range(0x115F, 0x1161), *range(0x17B4, 0x17B6), *range(0x180B, 0x1810)),
    *(*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0x3164, *range(0xFE00, 0xFE10)),
    *(0xFEFF, 0xFFA0, *range(0xFFF0, 0xFFF9), *range(0x1BCA0, 0x1BCA4), *range(0x1D173, 0x1D17B)),
    *range(0xE0000, 0xE1000),
]
BLANK = [0x2800, 0x16FE4, 0x1D159]
CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_NAMED = {*DEFAULT_IGNORABLE, *BLANK}


def hidden(code: int) -> bool:
    """By Unicode property: what leaves no mark, or a mark that looks like nothing."""
    character = chr(code)
    category = unicodedata.category(character)
    return category in CATEGORIES or (category == "Zs" and character != " ") or code in _NAMED


# Of the private and unassigned planes one in a thousand is enough for the surfaces; `escape` itself is asked for all.
SAMPLE = [code for code in sorted({*range(0x3000), *range(0, 0x110000, 1000), *DEFAULT_IGNORABLE}) if hidden(code)]
_SAMPLE = set(map(chr, SAMPLE))
TEXT = "".join(map(chr, (code for code in SAMPLE if not 0xD800 <= code < 0xE000)))


def leaks(text: str, *, keep: str = "") -> list[str]:
    """The hidden characters that stand in `text` as they are."""
    hidden = _SAMPLE - set(keep)
    return sorted({f"U+{ord(character):04X}" for character in text if character in hidden})


def test_every_code_point_that_leaves_no_mark_is_escaped() -> None:
    """By Unicode property, and nothing else is: what is left is printable."""
    codes = [code for code in range(0x110000) if hidden(code)]
    # One long text takes a fifth of the time of a million short ones.
    escaped = escape("".join(f"a{chr(code)}b" for code in codes))
    printable = "".join(map(chr, sorted(set(range(0x110000)) - set(codes) - {0x5C})))

    assert len(codes) > 900_000
    assert set(map(chr, codes)).isdisjoint(escaped)
    assert escape(printable) == printable


def test_default_ignorables_agree_with_what_python_knows() -> None:
    """Every format character but those that are drawn (Arabic and Kaithi number signs, hieroglyph joiners) is one."""
    drawn = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13460)}
    formats = {code for code in range(0x110000) if unicodedata.category(chr(code)) == "Cf"}

    assert formats - drawn - set(range(0xFFF9, 0xFFFC)) <= set(DEFAULT_IGNORABLE)


def _terminal(text: str) -> str:
    console = Console(width=100_000, record=True, file=io.StringIO(), color_system=None)
    call = ToolCall(server="files", tool="run", arguments={"command": text})
    console.print(Page([make_event(tool_name="run", sanitized_args={"command": text}, deterministic_rationale=text)]))
    console.print(Page([_request(text)]))
    console.print(_request(text).model_copy(update={"tool_call": call}))
    return console.export_text()


def _request(text: str) -> ApprovalRequest:
    call = ToolCall(server=text, tool=text, arguments={"command": text, text: [text]})
    return ApprovalRequest(request_id="r-1", caller_id=text, tool_call=call, risk_explanation=text)


def _html(text: str) -> str:
    event = make_event(tool_name=text, caller_id=text, sanitized_args={text: text}, risk_labels=[text])
    return Page([event])._repr_html_() + Page([_request(text)])._repr_html_() + event._repr_html_()


class _Approvals:
    def __init__(self, text: str) -> None:
        self._text = text

    def list_requests(self, *_: Any, **__: Any) -> list[ApprovalRequest]:
        return [_request(self._text)]


def _inbox(text: str) -> str:
    desk = Inbox(SimpleNamespace(approvals=_Approvals(text)), approver=text, limit=5)
    desk.refresh()
    return repr(desk) + desk._repr_html_()


def _slack(text: str) -> str:
    pieces = [text[start : start + 60] for start in range(0, len(text), 60)]
    messages = []
    for piece in pieces:
        call = ToolCall(server=piece, tool=piece, arguments={piece: piece})
        notice = make_notice(tool_call=call, caller_id=piece, risk_explanation=piece, note=piece)
        messages += [pending_message(notice), decided_message(notice)]
    return json.dumps(messages, ensure_ascii=False)


SURFACES: dict[str, Callable[[str], str]] = {
    "html": _html,
    "terminal": _terminal,
    "inbox": _inbox,
    "slack": _slack,
    "chart": lambda text: "".join(safe(text[at : at + 20], most=10**6) for at in range(0, len(text), 20)),
    "json": lambda text: json_text({text: [text]}, indent=2),
    "code": code_text,
}


@pytest.mark.parametrize("surface", SURFACES)
def test_no_surface_lets_hidden_characters_through(surface: str) -> None:
    drawn = "".join(SURFACES[surface](TEXT[at : at + 100]) for at in range(0, len(TEXT), 100))

    assert leaks(drawn, keep="\n\r\t") == []


def test_the_command_line_lets_none_through(capsys: pytest.CaptureFixture[str]) -> None:
    say(TEXT)
    print_fields({"tool_call": {"server": TEXT, "tool": TEXT, "arguments": {"a": TEXT}}, "note": TEXT, TEXT: [TEXT]})

    assert leaks(capsys.readouterr().out, keep="\n") == []


async def test_a_log_line_lets_none_through(caplog: pytest.LogCaptureFixture) -> None:
    """One line for each notice, whatever it says."""
    notices = []
    for at in range(0, len(TEXT), 100):
        piece = TEXT[at : at + 100]
        call = ToolCall(server=piece, tool=piece, arguments={})
        notices.append(make_notice(tool_call=call, caller_id=piece, risk_explanation=piece))
    with caplog.at_level(logging.INFO):
        for notice in notices:
            await LogNotifier().notify_pending(notice)

    assert leaks("".join(record.getMessage() for record in caplog.records)) == []


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("\u26a0\ufe0f Deletes", "\u26a0\ufe0f Deletes"),
        ("\U0001f468\u200d\U0001f4bb", "\U0001f468\u200d\U0001f4bb"),
        ("\u2764\ufe0f\u200d\U0001f525", "\u2764\ufe0f\u200d\U0001f525"),
        ("a\ufe0f", "a\\ufe0f"),
        ("\u26a0\ufe0f\ufe0f", "\u26a0\ufe0f\\ufe0f"),
        ("\u26a0\ufe0e", "\u26a0\\ufe0e"),
        ("\U0001f468\u200d", "\U0001f468\\u200d"),
        ("\U0001f468\u200dx", "\U0001f468\\u200dx"),
        ("\U0001f3f4\U000e0067\U000e007f", "\U0001f3f4\\U000e0067\\U000e007f"),
    ],
)
def test_an_emoji_keeps_its_selector_and_its_joiners(text: str, drawn: str) -> None:
    """What changes the picture stays; what is not followed by one, a second selector and tags are shown."""
    assert escape(text) == drawn


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("\u200b", "\\u200b"),
        ("\\u200b", "\\\\u200b"),
        ("\\\u200b", "\\\\\\u200b"),
        ("C:\\Windows\\Fonts", "C:\\Windows\\Fonts"),
        ("C:\\new", "C:\\\\new"),
        ("a\\", "a\\"),
        ("\\\\server", "\\\\\\server"),
    ],
)
def test_a_backslash_is_not_taken_for_an_escape(text: str, drawn: str) -> None:
    """It is doubled where it would be, and only there."""
    assert escape(text) == drawn


hard = st.text(
    alphabet=st.sampled_from(list("\\\\xuUnrt0b2 =\"'.,:{}[]1a\u200b\n\t\u2764\ufe0f\u200d\U000e0041")), max_size=8
)
values = st.recursive(
    hard | st.none() | st.booleans() | st.integers(-20, 20) | st.sampled_from(["1", "true", "null", "", " ", "None"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hard, inner, max_size=3),
    max_leaves=4,
)
arguments = st.dictionaries(hard, values, max_size=3)


@settings(max_examples=150)
@given(hard, hard)
def test_different_texts_are_shown_differently(one: str, other: str) -> None:
    assert (escape(one) == escape(other)) == (one == other)
    assert (escape(one, keep="\n") == escape(other, keep="\n")) == (one == other)


@settings(max_examples=50)
@given(arguments, arguments)
def test_different_arguments_are_different_lines(one: dict[str, Any], other: dict[str, Any]) -> None:
    """On one line and over several, also where a value is written to look like several arguments."""
    same = json.dumps(one) == json.dumps(other)

    assert (arguments_text(one) == arguments_text(other)) == same
    assert (json_text(one, indent=2) == json_text(other, indent=2)) == same
    assert json.loads(json_text(one)) == one


@given(hard, hard, hard, hard)
def test_different_tools_have_different_names(server: str, tool: str, other_server: str, other_tool: str) -> None:
    same = (server, tool) == (other_server, other_tool)

    assert (call_name(server, tool) == call_name(other_server, other_tool)) == same


def test_the_cases_that_were_found() -> None:
    """A value that pretends to be an argument, a text that pretends to be a number, a point in a name."""
    forged = arguments_text({"amount": 5, "memo": "rent amount=5000000"})

    assert forged == 'amount=5 memo="rent amount=5000000"'
    assert arguments_text({"amount": '5 memo="rent amount=5000000"'}) != forged
    assert (word(1), word("1"), word(True), word("true"), word(None), word("None"), word("")) == (
        *("1", '"1"', "true", '"true"', "null", "None", '""'),
    )
    assert call_name("a.b", "c") == '"a.b".c' != call_name("a", "b.c")
