"""The scrubber: whatever comes in, what goes out is storable, bounded, flagged, and stays as it is."""

from __future__ import annotations

import hashlib
import json
import math
import time
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_gateway_store._text import is_cut
from agent_gateway_store.audit.record import encode_event, to_values
from agent_gateway_store.encoding.sanitize import MAX_JSON_CHARS, MAX_KEY_BYTES, MAX_TEXT_BYTES, Scrubber, storable_key
from agent_gateway_store.models.audit import RedactionFlag
from builders import make_event
from oddities import Broken, Level, Point, nested

pytestmark = pytest.mark.unit

SECRET = "hunter2"


def scrub(value: Any) -> tuple[Any, list[tuple[str, str | None]]]:
    scrubber = Scrubber()
    result = scrubber.json("args", value)
    return result, scrubber.replaced


UNCHANGED = [
    *(None, True, 0, -1, 2**53 - 1, -(2**53) + 1, 0.5, 1e15, 5e-324, 2.5e-7, 9999999999999998.0, 0.0, "", "text"),
    *("$int:5", "\x1b[31m", "\u202e", "\u2028", "\uffff", "\U0010ffff", "\ufeff", {}, [], {"": [None]}, "\\u0000"),
]


def test_what_is_storable_stays() -> None:
    """Ordinary values, control characters and bidi marks among them, pass unflagged."""
    for value in UNCHANGED:
        result, replaced = scrub({"k": value})
        assert (json.dumps(result), replaced) == (json.dumps({"k": value}), [])


REPLACED: list[tuple[Any, Any]] = [
    ("a\0b", "a\u2400b"),
    ("\ud800", "\ufffd"),
    ("a\udfffb\ud800c", "a\ufffdb\ufffdc"),
    ("\udc00\ud800", "\ufffd\ufffd"),
    ("\ud83d\ude00", "\U0001f600"),
    ("\ufeff\ud800", "\ufeff\ufffd"),
    (math.nan, "$float:nan"),
    (math.inf, "$float:inf"),
    (-math.inf, "$float:-inf"),
    (-0.0, 0.0),
    (1e16, "$float:1e+16"),
    (1e23, "$float:1e+23"),
    (-1.7976931348623157e308, "$float:-1.7976931348623157e+308"),
    (2**53, "$int:9007199254740992"),
    (-(2**64), "$int:-18446744073709551616"),
    (b"\0\xff", "$bytes:AP8="),
    ({2}, "$set:[2]"),
    (Decimal("1.10"), "$decimal:1.10"),
    (date(2024, 5, 1), "$date:2024-05-01"),
    (datetime(2024, 5, 1, tzinfo=UTC), "$datetime:2024-05-01T00:00:00+00:00"),
    (UUID(int=1), "$uuid:00000000-0000-0000-0000-000000000001"),
    (PurePosixPath("/etc"), "$path:/etc"),
    (Level.BIG, "$float:1e+20"),
    (Level.ZERO, 0.0),
    (Level.PAIR, [1, "\u2400"]),
]


def test_what_is_not_storable_is_replaced_and_reported() -> None:
    for value, expected in REPLACED:
        result, replaced = scrub({"k": [value]})

        assert json.dumps(result) == json.dumps({"k": [expected]})
        assert replaced[0][0].startswith("args.k[0]")
        assert all(digest is None or len(digest) == 64 for _, digest in replaced)


def test_huge_integers_are_cut() -> None:
    """10**5000 becomes text of bounded length, and two of them stay two."""
    (first, second), replaced = scrub([10**5000, 10**5000 + 1])

    assert first.startswith("$int:0x")
    assert first != second
    assert len(first) <= 1024
    assert [place for place, _ in replaced] == ["args[0]", "args[1]"]


@pytest.mark.parametrize("levels", [99, 100, 101, 5_000, 100_000])
def test_nesting_is_cut_at_depth_100(levels: int) -> None:
    """A hundred containers are kept; what is below becomes a marker."""
    result, replaced = scrub(nested(levels - 1, []))
    depth, found = 0, result
    while isinstance(found, dict | list) and found:
        depth, found = depth + 1, found["a"] if isinstance(found, dict) else found[0]

    assert (len(replaced), depth) == ((0, levels - 1) if levels <= 100 else (1, 100))
    assert found == ([] if levels <= 100 else "[cut: nested deeper than 100 levels]")


def test_cycles_are_cut() -> None:
    """A container inside itself becomes a marker; the same one twice side by side does not."""
    inner: list[Any] = [1]
    value = {"a": inner, "b": inner}
    assert scrub(value) == ({"a": [1], "b": [1]}, [])
    inner.append(value)

    assert scrub(value)[0]["a"] == [1, "[cut: contains itself]"]


def test_a_small_graph_that_unfolds_without_end_is_bounded() -> None:
    """[x, x] nested sixty times has 2**60 leaves; it costs a moment and a bounded row."""
    value: Any = ["leaf"]
    for _ in range(60):
        value = [value, value]
    result, replaced = scrub(value)

    assert len(json.dumps(result)) < 8 * MAX_JSON_CHARS
    assert 1 < len(replaced) <= 64


def test_long_lists_and_objects_are_cut_where_the_budget_ends() -> None:
    """Of what is too long the beginning is kept, and a marker says how much is missing."""
    listed, listed_flags = scrub([f"item {number:094}" for number in range(10_000)])
    mapped, mapped_flags = scrub({"[cut]": 1} | {f"key {number:095}": number for number in range(9_999)})

    assert listed[-1] == f"[cut: {10_000 - len(listed) + 1} more items]"
    assert mapped["[cut]~2"] == f"[cut: {10_000 - len(mapped) + 1} more entries]"
    assert 2_000 < len(listed) < 3_000
    assert listed_flags == mapped_flags == [("args", None)]


def test_long_text_is_cut_and_ends_in_its_hash() -> None:
    """A megabyte becomes 64 kB of text: its beginning, ~ and the SHA-256 of the whole."""
    text = "\u20ac" * 350_000
    (kept,), replaced = scrub([text])
    digest = hashlib.sha256(text.encode()).hexdigest()

    assert kept.endswith(f"~{digest}")
    assert MAX_TEXT_BYTES - 4 < len(kept.encode()) <= MAX_TEXT_BYTES
    assert text.startswith(kept[: -len(digest) - 1])
    assert replaced == [("args[0]", digest)]

    marked = Scrubber(marks_cuts=True).text("a", text)
    head, _, mark = marked.partition("[")
    missing = len(text.encode()) - len(head.encode())
    assert text.startswith(head)
    assert mark == f"cut: {missing} more bytes, SHA-256 of the whole {digest}]"
    assert MAX_TEXT_BYTES - 4 < len(marked.encode()) <= MAX_TEXT_BYTES


CUT: dict[str, Any] = {
    "text": "x" * 65_537,
    "wide text": "\u20ac" * 65_536,
    "text that reads like a mark": "[cut: 1 more items] " * 4_000,
    "text of an earlier version": "x" * 9 + "~" + "0a" * 32,
    "bytes": b"x" * 2_000,
    "integer": 10**5000,
    "object": [Broken(), Decimal("1" * 2_000)],
    "name": {"n" * 1_025: 1},
    "names that meet": {"n" * 1_021 + "\0": 1, "n" * 1_021 + "\u2400": 2},
    "long names that meet": {"n" * 1_025 + "\0": 1, "n" * 1_025 + "\u2400": 2},
    "items": ["x" * 60_000] * 6,
    "entries": {str(number): "x" * 60_000 for number in range(6)},
    "depth": nested(101, []),
}


@pytest.mark.parametrize("value", CUT.values(), ids=CUT.keys())
def test_whatever_is_cut_holds_a_mark(value: Any) -> None:
    """Views look for it; a second pass neither adds one nor loses one."""
    once = Scrubber(marks_cuts=True).json("args", {"a": {"b": [value]}})
    again = Scrubber(marks_cuts=True)

    assert is_cut(once)
    assert json.dumps(again.json("args", once)) == json.dumps(once)
    assert again.replaced == []


def test_names_that_meet_lose_nothing_without_a_mark() -> None:
    """The number behind the second one takes the room of a mark, not that of its last characters alone."""
    result = Scrubber(marks_cuts=True).json("args", CUT["names that meet"])
    [_, second] = result

    assert is_cut(second)
    assert second.endswith("~2")
    assert len(second.encode()) <= 1024


def test_what_is_whole_holds_no_mark() -> None:
    for value in (*UNCHANGED, "[cut: it", "a [cut: 1 more items] b", "x" * 65_536, "\0", math.nan):
        assert not is_cut(Scrubber(marks_cuts=True).json("args", {"k": [value]}))


def test_longer_ids_end_in_their_hash() -> None:
    """Above 512 bytes of UTF-8 an id is cut, ends in ~ and a SHA-256, fits, and is its own storable form."""
    for text in ("x" * 512, "\u20ac" * 170, "\U0001f600" * 128):
        assert storable_key(text) == text
    for text in ("x" * 513, "\u20ac" * 171, "\U0001f600" * 129, "\ud800" * 171, "\0" * 200):
        kept = storable_key(text)
        assert len(kept.encode()) <= MAX_KEY_BYTES
        assert kept[-65] == "~"
        assert kept != storable_key(text + "x")
        assert storable_key(kept) == kept


def test_keys_that_become_the_same_stay_apart() -> None:
    """Keys are made text; those that meet are numbered, and every value is kept."""
    value = {
        1: "a",
        "$int:1": "b",
        None: "c",
        2.5: "d",
        "\0": "e",
        "\u2400": "f",
        "\ud800": "g",
        chr(0xFFFD): "h",
        (1,): "i",
    }
    result, replaced = scrub(value)

    assert sorted(result.values()) == sorted(value.values())
    assert result["$int:1"] == "a"
    assert result["$int:1~2"] == "b"
    assert result["\ufffd~2"] == "h"
    assert {place for place, _ in replaced} == {"args"}


def test_many_colliding_keys_cost_little() -> None:
    """Thousands of keys of lone surrogates, all of which become one name, take no quadratic time."""
    value = {chr(0xD800 + one) + chr(0xD800 + two): 0 for one in range(150) for two in range(150)}
    started = time.monotonic()
    result, _ = scrub(value)

    assert len(result) == len(value)
    assert time.monotonic() - started < 3


def test_long_keys_in_deep_objects_cost_little() -> None:
    """The places of replacements do not grow with the names above them."""
    value: Any = [[float("nan")] for _ in range(20_000)]
    for level in range(90):
        value = {f"{level}" * 400: value}
    started = time.monotonic()
    _, replaced = scrub(value)

    assert time.monotonic() - started < 3
    assert all(len(place.encode()) <= MAX_KEY_BYTES for place, _ in replaced)


def test_scores_become_finite() -> None:
    """A float column gets a number that every database holds."""
    largest = 1.7976931348623157e308
    for score, kept in ((0.5, 0.5), (math.nan, 0.0), (math.inf, largest), (-math.inf, -largest), (-0.0, 0.0)):
        row = to_values(encode_event(make_event(risk_score=score)))
        assert repr(row["risk_score"]) == repr(kept)
        assert [flag.field for flag in row["redaction_flags"]] == ([] if score == 0.5 else ["risk_score"])


def test_flags_name_the_place_and_never_the_original() -> None:
    """Every field that was touched is flagged UNSTORABLE; nothing of what was cut or replaced is in a flag."""
    long = SECRET * 20_000
    made = make_event(
        request_id=f"{SECRET}\0" * 100,
        tool_name="\ud800",
        llm_explanation=long,
        sanitized_args={"a": [f"{SECRET}\0"], "b": {SECRET: b"hunter2"}},
        risk_labels=["ok", "\0"],
        risk_score=math.nan,
        latency_ms=2**63,
        timestamp=datetime.max,
        redaction_flags=[RedactionFlag(field="\0", reason="PII")],
    )
    before = repr(made)
    record = encode_event(made)
    # The event is the caller's.
    assert repr(made) == before
    row = to_values(record)
    given, *flags = row["redaction_flags"]

    assert given == RedactionFlag(field="\u2400", reason="PII")
    assert {flag.reason for flag in flags} == {"UNSTORABLE"}
    places = "request_id tool_name llm_explanation sanitized_args.a[0] risk_labels[1] risk_score latency_ms timestamp"
    assert {flag.field for flag in flags} >= {*places.split(), "redaction_flags[0]"}
    original = [flag for flag in flags if SECRET in repr(flag) and flag.field != f"sanitized_args.b.{SECRET}"]
    assert original == []
    assert (row["latency_ms"], row["tool_name"], row["risk_labels"]) == (2**63 - 1, "\ufffd", ["ok", "\u2400"])


nasty_text = st.text(st.characters(), max_size=8) | st.text(
    st.sampled_from("\0\ud800\udfff\u2400\ufffda~2$:"), max_size=5
)
nasty_leaf = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**53, -(2**53), 2**53 - 1, 10**700, -0.0, 1e16, 9999999999999998.0, math.nan])
    | st.floats()
    | nasty_text
    | st.binary(max_size=4)
    | st.sampled_from([Decimal("1"), Level.BIG, Level.PAIR, "x" * 70_000, "[cut: 1 more items]"])
    | st.builds(Point, st.just(1))
    | st.builds(Broken)
)
nasty_key = nasty_text | st.integers(-1, 1) | st.none() | st.sampled_from(["\0" + "a" * 1021, "\u2400" + "a" * 1021])
nasty_json = st.recursive(
    nasty_leaf | st.sampled_from(["x" * 60_000, ["y" * 65_000] * 5]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(nasty_key, inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(nasty_json)
def test_sanitizing_twice_changes_nothing_more(value: Any) -> None:
    """The result is plain JSON in UTF-8 without NUL, and a second pass returns it unflagged."""
    once, _ = scrub(value)
    twice, replaced = scrub(once)
    text = json.dumps(once, ensure_ascii=False, allow_nan=False)

    assert json.dumps(twice, ensure_ascii=False) == text
    assert replaced == []
    assert "\\u0000" not in text.replace("\\\\", "")
    assert json.loads(text.encode()) == once
