"""Canonical JSON and its hashes: RFC 8785 where it applies, and never one form for two values."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import struct
import tracemalloc
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_gateway_store.encoding.canonical import canonical_json, hash_json, types_in
from agent_gateway_store.models.approval import hash_tool_call
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.models.values import ToolCall
from oddities import Broken, Level, Model, Point, Unreadable, nested

pytestmark = pytest.mark.unit

# RFC 8785, appendix B: the bits of a double and its JSON.
NUMBERS = """
0000000000000000 0
8000000000000000 0
0000000000000001 5e-324
8000000000000001 -5e-324
7fefffffffffffff 1.7976931348623157e+308
ffefffffffffffff -1.7976931348623157e+308
4340000000000000 9007199254740992
c340000000000000 -9007199254740992
4430000000000000 295147905179352830000
44b52d02c7e14af5 9.999999999999997e+22
44b52d02c7e14af6 1e+23
44b52d02c7e14af7 1.0000000000000001e+23
444b1ae4d6e2ef4e 999999999999999700000
444b1ae4d6e2ef4f 999999999999999900000
444b1ae4d6e2ef50 1e+21
3eb0c6f7a0b5ed8c 9.999999999999997e-7
3eb0c6f7a0b5ed8d 0.000001
41b3de4355555553 333333333.3333332
41b3de4355555554 333333333.33333325
41b3de4355555555 333333333.3333333
41b3de4355555556 333333333.3333334
41b3de4355555557 333333333.33333343
becbf647612f3696 -0.0000033333333333333333
43143ff3c1cb0959 1424953923781206.2
"""


def test_numbers_of_appendix_b() -> None:
    for line in NUMBERS.strip().splitlines():
        bits, expected = line.split()
        assert canonical_json(list(struct.unpack(">d", bytes.fromhex(bits)))) == f"[{expected}]".encode()


def test_example_of_section_3_2() -> None:
    source = r"""{
        "numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
        "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
        "literals": [null, true, false]
    }"""
    expected = (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )

    assert canonical_json(json.loads(source)) == expected.encode()


def test_keys_are_sorted_by_utf_16_units() -> None:
    """The RFC's sorting example of section 3.2.3: an emoji comes before U+FB33, as in UTF-16."""
    given = {
        "\u20ac": "Euro Sign",
        "\r": "Carriage Return",
        "\ufb33": "Hebrew Letter Dalet With Dagesh",
        "1": "One",
        "\U0001f600": "Emoji: Grinning Face",
        "\u0080": "Control",
        "\u00f6": "Latin Small Letter O With Diaeresis",
    }
    order = ["Carriage Return", "One", "Control", "Latin Small Letter O With Diaeresis", "Euro Sign"]
    order += ["Emoji: Grinning Face", "Hebrew Letter Dalet With Dagesh"]

    assert list(json.loads(canonical_json(given)).values()) == order


plain_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    # Text like a tag is the one part of plain JSON that is not left alone.
    | st.text().filter(lambda text: not text.startswith("$")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text().filter(lambda text: not text.startswith("$")), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(plain_json)
def test_plain_json_hashes_as_rfc_8785(value: Any) -> None:
    """For plain JSON another implementation of RFC 8785 gives the same hash, and key order does not matter."""
    expected = hashlib.sha256(rfc8785.dumps(value)).hexdigest()
    turned = dict(reversed(value.items())) if isinstance(value, dict) else value

    assert hash_json(value) == hash_json(turned) == hash_json(json.loads(json.dumps(value))) == expected


def test_a_key_makes_it_an_hmac(monkeypatch: pytest.MonkeyPatch) -> None:
    """HASH_KEY from the argument or the environment; the argument wins, then the prefixed name, and "" is none."""
    args = {"a": 1}

    def keyed(secret: str) -> str:
        return hmac.new(secret.encode(), b'{"a":1}', hashlib.sha256).hexdigest()

    assert AuditEvent.hash_args(args, key="one") == keyed("one")
    monkeypatch.setenv("HASH_KEY", "two")
    assert AuditEvent.hash_args(args) == keyed("two")
    monkeypatch.setenv("AGENT_GATEWAY_STORE_HASH_KEY", "three")
    assert AuditEvent.hash_args(args) == keyed("three")
    assert AuditEvent.hash_args(args, key="one") == keyed("one")
    assert canonical_json([5, 0]) == canonical_json([5.0, -0.0]) == b"[5,0]"
    unkeyed = hashlib.sha256(b'{"a":1}').hexdigest()
    assert AuditEvent.hash_args(args, key="") == unkeyed
    monkeypatch.setenv("AGENT_GATEWAY_STORE_HASH_KEY", "")
    assert AuditEvent.hash_args(args) == unkeyed


def test_a_tool_call_is_bound_by_server_tool_and_arguments() -> None:
    call = ToolCall(server="s", tool="t", arguments={"a": 1, "b": 2})
    others = [
        ToolCall(server="x", tool="t", arguments={"a": 1, "b": 2}),
        ToolCall(server="s", tool="x", arguments={"a": 1, "b": 2}),
        ToolCall(server="s", tool="t", arguments={"a": 1, "b": 3}),
    ]

    assert hash_tool_call(call) == hash_tool_call(ToolCall(server="s", tool="t", arguments={"b": 2, "a": 1}))
    assert len({hash_tool_call(call), *map(hash_tool_call, others)}) == 4
    assert hash_tool_call(call, key="k") != hash_tool_call(call)


NASTY: list[Any] = [
    *(None, True, False, 0, 1, -1, 5, 0.5, 1e16, 1e23, 5e-324, 1.5, math.nan, math.inf, -math.inf),
    *(2**53 - 1, 2**53, 2**53 + 1, 2**53 + 2, -(2**53), -(2**53) - 1, 2.0**53, 10**16, 10**23, 2**63, 2**64),
    *(10**400, 10**400 + 1, 10**5000, 10**5000 + 1, 2**2048, 2**2048 - 1, "0x1", "$int:0x1"),
    *("", "1", "true", "null", "NaN", "5", "$int:5", "$$int:5", "$$$int:5", "$", "$:", "$int", "int:5", "$Int:5"),
    *("$float:nan", "$text:\\ud800", "\ud800", "\\ud800", "\udfff", "\\udfff", "\ud83d\ude00", "\U0001f600"),
    *("\ud800\\", "\ud800\\\\", "\0", "\\u0000", "\ufffd", "$text:", "$cycle:1", "$sha256:" + "0" * 64, "$set:[]"),
    *(b"", b"abc", "abc", "$bytes:YWJj", "YWJj", [], {}, "[]", "{}", [[]], [{}], [None], [1, 2], ["1", 2], [[1], 2]),
    *({"a": 1}, {"a": "1"}, {"1": 0}, {1: 0}, {True: 0}, {None: 0}, {"null": 0}, {1.5: 0}, {"1.5": 0}, {"$int:1": 0}),
    *({"$bool:true": 0}, {b"abc": 0}, {"abc": 0}, {(1, 2): 0}, {"(1, 2)": 0}, {"\ud800": 0}, {"$again:2:a": 0}),
    *({Level.NAME: 1, "name": 2}, {"name": 2}, {"name": 1}, {(10**5000,): 0}, {(10**5001,): 0}, {"$json:[1,2]": 0}),
    *(frozenset(), {1}, {1, 2}, {"1"}, frozenset({frozenset()}), frozenset({frozenset({1})}), {(1, 2)}),
    *(date(2024, 5, 1), "2024-05-01", datetime(2024, 5, 1), datetime(2024, 5, 1, tzinfo=UTC), "$date:2024-05-01"),
    *(Decimal("1.0"), Decimal("1.00"), "1.0", "$decimal:1.0", UUID(int=1), str(UUID(int=1)), PurePosixPath("/x"), "/x"),
    *(Point(3), Model(x=3, y=1), Model(x=3, y=2), Broken(), Unreadable(a=1), object, "name"),
]


@pytest.mark.parametrize(
    "wrap",
    [lambda value: value, lambda value: [value], lambda value: {"k": value}, lambda value: {"k": [[value], 1]}],
    ids=["bare", "in-list", "in-object", "nested"],
)
def test_no_two_nasty_values_share_a_form(wrap: Any) -> None:
    """All pairs: neither a tag nor its spelling as text, nor neighbours among numbers, meet."""
    seen: dict[bytes, Any] = {}
    for value in NASTY:
        form = canonical_json(wrap(value))
        # 2.0**53 is a JSON number, the integer enters as a tag.
        assert form not in seen, (value, seen[form])
        seen[form] = value

    assert len(seen) == len(NASTY)


def fingerprint(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value, "literal"
    if isinstance(value, int):
        return (float(value), "number") if abs(value) < 2**53 else (value, "integer")
    if isinstance(value, float):
        return (value + 0.0, "number") if math.isfinite(value) else (str(value), "float")
    if isinstance(value, list):
        return tuple(map(fingerprint, value)), "list"
    if isinstance(value, dict):
        entries = {((type(name).__name__, str(name)), fingerprint(item)) for name, item in value.items()}
        return frozenset(entries), "dict"
    return value, type(value).__name__


tag_like = st.builds(
    "{}{}{}".format,
    st.sampled_from(["$", "$$", "", "\\"]),
    st.sampled_from(["int:", "float:", "text:", "bytes:", "null:", "bool:", "again:2:", "json:"]),
    st.sampled_from(["5", "nan", "true", "\ud800", "\\ud800", "\\\\ud800", "9007199254740992", ""]),
)
nasty_text = tag_like | st.text(st.sampled_from("$:\\\ud800\udc00u5ab\0\ufffd"), max_size=6)
near_limits = st.builds(
    lambda base, sign, step: sign * base + step,
    st.sampled_from([0, 2**53, 2**63, 2**64, 10**30, 2**2048, 10**700]),
    st.sampled_from([1, -1]),
    st.integers(-2, 2),
)
nasty_leaf = (
    st.none()
    | st.booleans()
    | near_limits
    | st.floats()
    | st.builds(float, st.integers(2**53 - 2, 2**53 + 4))
    | nasty_text
    | st.binary(max_size=3)
)
nasty_key = nasty_text | st.integers(-2, 2) | st.none() | st.sampled_from([1.5, math.inf, b"a", b"", "1", "None"])
nasty_json = st.recursive(
    nasty_leaf,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(nasty_key, inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(nasty_json, min_size=12, max_size=12))
def test_forms_are_equal_exactly_if_the_values_are(values: list[Any]) -> None:
    """Over every pair of a dozen nasty values: the same canonical form if and only if the same value."""
    form_of = {fingerprint(value): canonical_json(value) for value in values}

    assert len(set(form_of.values())) == len(form_of)
    assert all(canonical_json(value) == form_of[fingerprint(value)] for value in values)
    assert all(rfc8785.dumps(json.loads(form, parse_int=float)) == form for form in form_of.values())


def test_any_depth_is_told_apart() -> None:
    """5,000 levels, five times what Python recurses to; a difference at the bottom shows at the top."""
    assert len({canonical_json(nested(5_000, bottom)) for bottom in (1, "1", {})}) == 3


def test_nested_sets_of_any_depth_are_told_apart() -> None:
    """Sets in sets neither recurse nor blow up, whatever order they are walked in."""

    def nest(bottom: Any) -> Any:
        for _ in range(5_000):
            bottom = frozenset({bottom, 7})
        return bottom

    assert len(canonical_json(nest(1))) < 200
    assert len({canonical_json(nest(bottom)) for bottom in (1, 2, "1")}) == 3
    assert canonical_json({3, 1, 2}) == canonical_json({2, 3, 1}) == b'"$set:[1,2,3]"'


def test_types_cost_what_the_json_does() -> None:
    """However long the names above them are, and however deep they stand; each container is read once."""
    long, reads = "k" * 20_000, 0

    class Row(tuple[int, ...]):
        def __iter__(self) -> Any:
            nonlocal reads
            reads += 1
            return super().__iter__()

    deep: Any = Row([1])
    in_keys: Any = Row([2])
    for _ in range(50):
        deep, in_keys = frozenset([deep]), {1: in_keys}
    shapes = [
        ({long: [0] * 5_000}, True),
        ({long: [[]] * 2_000}, True),
        ({1: {2: {"a": [0] * 5_000}}}, True),
        ({long: [(0,)] * 2_000}, False),
        ({1: {2: [(0,)] * 2_000}}, False),
        ({(long, 1): [(0,)] * 2_000}, False),
        ([deep, in_keys], False),
    ]
    for n, (value, is_plain) in enumerate(shapes):
        tracemalloc.start()
        try:
            assert (types_in(value) == "") is is_plain
            assert tracemalloc.get_traced_memory()[1] < 8 * 2**20, n
        finally:
            tracemalloc.stop()

    assert reads == 2


def test_cycles_end() -> None:
    """A container inside itself is named by how far up it is, and differs from one that is not."""
    inner: list[Any] = []
    outer: dict[str, Any] = {"a": inner, "b": [inner, inner]}
    assert canonical_json(outer) == b'{"a":[],"b":[[],[]]}'
    inner.append(inner)
    assert canonical_json(outer) == b'{"a":["$cycle:1"],"b":[["$cycle:1"],["$cycle:1"]]}'
    inner[0] = outer

    assert canonical_json(outer) == b'{"a":["$cycle:2"],"b":[["$cycle:3"],["$cycle:3"]]}'


def test_objects_enter_by_their_fields() -> None:
    """Enums are their values, dataclasses and models their fields, extra ones too; an unset field is left out."""
    assert canonical_json(Level.NAME) == b'"name"'
    assert canonical_json([Level.PAIR, (1, "\0")]) == b'[[1,"\\u0000"],[1,"\\u0000"]]'
    assert canonical_json(Point(3)) == b'{"x":3}'
    assert canonical_json(Model(x=1, extra="y")) == b'{"extra":"y","x":1}'
    assert canonical_json(ToolCall(server="s", tool="t")) == b'{"arguments":{},"server":"s","tool":"t"}'
    assert canonical_json(Broken()).endswith(b'Broken:?"')
