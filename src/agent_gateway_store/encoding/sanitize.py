"""Sanitise: make any text and any JSON storable, visibly, on SQLite and PostgreSQL alike.

What is left as it is reads back identical from both databases, and sanitising twice changes nothing more. Every
replacement is reported with its place and the hash of the original, never with the original itself.

| found | becomes |
| --- | --- |
| NUL in text | U+2400 (symbol for null) |
| lone surrogate | U+FFFD (replacement character) |
| text above the limit | its beginning, `~`, and the SHA-256 of the whole text; where cuts are marked, a mark |
| NaN, infinities, integers beyond ±(2^53 - 1), floats from 1e16 on (JSONB rewrites them) | the tags of `canonical` |
| -0.0 | 0.0 |
| what JSON does not know, keys that are not text | the tags of `canonical`, bounded |
| JSON below depth 100, or inside itself, or beyond the size limit | a mark |

A mark is `[cut: ` and what is missing, in brackets, and ends what was cut. `_text.is_cut` finds it, and `~` with a
SHA-256, for the views.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from agent_gateway_store.encoding.canonical import MAX_SAFE_INTEGER, hash_bytes, tag
from agent_gateway_store.encoding.plain import CONTAINERS, Members, is_text, plain

# Longest text in an indexed column: an index row of PostgreSQL holds 2,704 bytes, and our widest has three such texts.
MAX_KEY_BYTES = 512
# Longest text anywhere else: chosen for human readers, no database asks for it.
MAX_TEXT_BYTES = 65_536
# Most characters of one JSON value, about; chosen as well.
MAX_JSON_CHARS = 4 * MAX_TEXT_BYTES
# Deepest nesting that is kept: a tenth of what SQLite and Python's `json` can read.
MAX_DEPTH = 100
# Chosen: twice a key.
_MAX_TAG_BYTES = 2 * MAX_KEY_BYTES
# Chosen: flags stay a small part of the row.
_MAX_REPORTS = 64
# `~` and a SHA-256 in hex.
_DIGEST_CHARS = 1 + 64
_CUT_TEXT = "[cut: {} more bytes, SHA-256 of the whole {}]"
# Measured, where everything has to be replaced: 0.1 µs for a character and 10 µs for an item of a container.
_HEAVY_CHARS, _ITEM_CHARS = 100_000, 100
# Quotes, colon and comma.
_NODE_CHARS = 4
# From here on Python writes an exponent, and JSONB does not.
_FIRST_REWRITTEN_FLOAT = 1e16
# IEEE 754: the largest finite double.
_LARGEST_FLOAT = sys.float_info.max
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def storable_key(text: str) -> str:
    """Return `text` as an indexed column holds it. Every value that is looked up goes through here."""
    return _cut(_clean(text if type(text) is str else str.__str__(text)), MAX_KEY_BYTES)


def _clean(text: str) -> str:
    if "\0" in text:
        text = text.replace("\0", "\u2400")
    if is_text(text):
        return text
    # The codec would do both at once, at twenty times the time, in which no other thread runs.
    text = _SURROGATE_PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
    slices = (text[place : place + MAX_TEXT_BYTES] for place in range(0, len(text), MAX_TEXT_BYTES))
    return "".join([_LONE_SURROGATE.sub("\ufffd", each) for each in slices])


def _cut(text: str, limit: int) -> str:
    if (data := _above(text, limit)) is None:
        return text
    head = data[: limit - _DIGEST_CHARS].decode("utf-8", "ignore")
    return f"{head}~{hashlib.sha256(data).hexdigest()}"


def _cut_marked(text: str, limit: int) -> str:
    if (data := _above(text, limit)) is None:
        return text
    digest = hashlib.sha256(data).hexdigest()
    head = data[: limit - len(_CUT_TEXT.format(len(data), digest))].decode("utf-8", "ignore")
    return head + _CUT_TEXT.format(len(data) - len(head.encode()), digest)


def _above(text: str, limit: int) -> bytes | None:
    """Return `text` as UTF-8 if that is more than `limit` bytes."""
    # UTF-8 has at most four bytes for a character: a short text need not be encoded.
    if len(text) * 4 <= limit:
        return None
    data = text.encode()
    return data if len(data) > limit else None


def _is_marker(value: Any) -> bool:
    # A marker costs nothing, so that sanitising a second time cuts at the same places.
    return type(value) is str and value.startswith("[cut: ") and len(value) < 64 and value.endswith("]")


def _cost(value: Any) -> int:
    """Return what a scalar takes of the budget, or -1 for a value that cannot simply stay as it is."""
    kind = type(value)
    if kind is str:
        if not value.isascii() or "\0" in value or len(value) > MAX_TEXT_BYTES:
            return -1
        return 0 if _is_marker(value) else len(value)
    if value is None or kind is bool:
        return 0
    if kind is int:
        return 0 if -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER else -1
    return 0 if kind is float and 0 < abs(value) < _FIRST_REWRITTEN_FLOAT else -1


def is_storable(value: Any) -> bool:
    """True if JSON `value` can be stored unchanged. Nearly every value can, and this is much faster than the walk."""
    return 0 <= _plain_cost(value, 0) <= MAX_JSON_CHARS


def _plain_cost(value: Any, depth: int) -> int:
    """Return what `value` takes of the budget, or -1 if it needs the full walk: odd leaves, great depth, great size."""
    kind = type(value)
    if kind is dict and depth < MAX_DEPTH:
        total = 0
        for key, item in value.items():
            if type(key) is not str or not key.isascii() or "\0" in key or len(key) > _MAX_TAG_BYTES:
                return -1
            total += _NODE_CHARS + len(key)
            # Most items are short texts: without a call for each this takes half as long.
            if type(item) is str and item.isascii() and "\0" not in item:
                total += len(item)
                if len(item) > MAX_TEXT_BYTES:
                    return -1
                continue
            cost = _plain_cost(item, depth + 1)
            if cost < 0 or total > MAX_JSON_CHARS:
                return -1
            total += cost
        return total
    if kind is list and depth < MAX_DEPTH:
        total = 0
        for item in value:
            cost = _plain_cost(item, depth + 1)
            if cost < 0 or total > MAX_JSON_CHARS:
                return -1
            total += _NODE_CHARS + cost
        return total
    return _cost(value)


def is_heavy(values: Iterable[Any]) -> bool:
    """True if it could take more than about ten milliseconds to sanitise `values`."""
    left, waiting = _HEAVY_CHARS, [*values]
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind is str:
            left -= len(value)
        elif kind in CONTAINERS:
            left -= _ITEM_CHARS * len(value)
            if left > 0:
                waiting += [*value, *value.values()] if kind is dict else value
        if left < 0:
            return True
    return False


class Scrubber:
    """Makes the values of one row storable and remembers what it replaced.

    Args:
        is_second: The row was stored before. It gets twice the budget, so that a JSON value which was cut then is not
            cut at another place now, because a database keeps the names of a mapping in another order.
        marks_cuts: A long text, too, ends in a mark that people can read. Events keep their form, by whose hash a
            repeat is known.

    Attributes:
        replaced: (place, hash of the original or None), in the order found; at most 64, the last place being `...`.
    """

    def __init__(self, *, is_second: bool = False, marks_cuts: bool = False) -> None:
        self.replaced: list[tuple[str, str | None]] = []
        self.marks_cuts = marks_cuts
        self.json_chars = MAX_JSON_CHARS * 2 if is_second else MAX_JSON_CHARS

    def text(self, place: str, text: str, *, limit: int = MAX_TEXT_BYTES) -> str:
        """Return `text` without NUL and lone surrogates, at most `limit` bytes of UTF-8."""
        text = text if type(text) is str else str(tag(text))
        result = self.cut(_clean(text), limit)
        if result is not text and result != text:
            self.report(place, text.encode("utf-8", "surrogatepass"))
        return result

    def cut(self, text: str, limit: int) -> str:
        """Return at most `limit` bytes of `text`, and at its end that it was cut."""
        # An id is looked up by what it was cut to.
        return _cut_marked(text, limit) if self.marks_cuts and limit > MAX_KEY_BYTES else _cut(text, limit)

    def number(self, place: str, value: float) -> float:
        """Return a float that every database holds: NaN becomes 0.0, infinities the largest float."""
        if math.isfinite(value):
            if value or math.copysign(1.0, value) > 0:
                return value
            result = 0.0
        else:
            result = 0.0 if math.isnan(value) else math.copysign(_LARGEST_FLOAT, value)
        self.report(place, repr(value).encode())
        return result

    def json(self, place: str, value: Any) -> Any:
        """Return `value` as JSON that reads back identical; an unchanged container may be returned itself."""
        return _JsonWalk(self, place).value(value, place, 0)

    def report(self, place: str, original: bytes | None = None) -> None:
        """Note that the value at `place` was replaced."""
        if len(self.replaced) < _MAX_REPORTS:
            last = len(self.replaced) == _MAX_REPORTS - 1
            digest = None if original is None or last else hash_bytes(original)
            self.replaced.append(("..." if last else storable_key(place), digest))


class _JsonWalk:
    """One walk over one JSON value, with its budget of characters."""

    def __init__(self, scrubber: Scrubber, place: str) -> None:
        self.scrubber = scrubber
        self.left = scrubber.json_chars
        self.above: set[int] = set()
        self.repeats: dict[tuple[int, str], int] = {}

    def value(self, value: Any, place: str, depth: int) -> Any:
        if (cost := _cost(value)) >= 0:
            self.left -= cost
            return value
        source = plain(value)
        if type(source) in CONTAINERS and type(source) is not Members:
            return self.container(value, source, place, depth)
        return self.leaf(source, place)

    def text(self, text: str, place: str) -> str:
        text = self.scrubber.text(place, text)
        self.left -= 0 if _is_marker(text) else len(text)
        return text

    def leaf(self, value: Any, place: str) -> Any:
        kind = type(value)
        if kind is str:
            return self.text(value, place)
        if kind is float and abs(value) < _FIRST_REWRITTEN_FLOAT:
            if not value and math.copysign(1.0, value) < 0:
                self.scrubber.report(place, b"-0.0")
                return 0.0
            return value
        tagged = f"$float:{value}" if kind is float else tag(value)
        if not isinstance(tagged, str):
            return tagged
        self.scrubber.report(place, tagged.encode("utf-8", "surrogatepass"))
        kept = self.scrubber.cut(_clean(tagged), _MAX_TAG_BYTES)
        self.left -= len(kept)
        return kept

    def container(self, value: Any, source: Any, place: str, depth: int) -> Any:
        if depth >= MAX_DEPTH:
            return self.marker(place, f"[cut: nested deeper than {MAX_DEPTH} levels]")
        if id(value) in self.above:
            return self.marker(place, "[cut: contains itself]")
        self.above.add(id(value))
        # Only the beginning of a place is reported; the whole would grow with every level.
        place = place if len(place) <= MAX_KEY_BYTES // 4 else storable_key(place)
        try:
            if type(source) is dict:
                return self.mapping(source, place, depth)
            return self.sequence(source, place, depth)
        finally:
            self.above.remove(id(value))

    def sequence(self, source: Any, place: str, depth: int) -> list[Any]:
        out: list[Any] = []
        for item in source:
            self.left -= _NODE_CHARS
            if self.left < 0:
                rest = len(source) - len(out)
                out.append(item if _is_marker(item) else self.marker(place, f"[cut: {rest} more items]"))
                break
            if (cost := _cost(item)) >= 0:
                self.left -= cost
                out.append(item)
            else:
                out.append(self.value(item, f"{place}[{len(out)}]", depth + 1))
        return out

    def mapping(self, source: Mapping[Any, Any], place: str, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, item in source.items():
            self.left -= _NODE_CHARS
            if self.left < 0:
                rest = len(source) - len(out)
                kept = item if _is_marker(item) else self.marker(place, f"[cut: {rest} more entries]")
                out[self.free("[cut]", out)] = kept
                break
            if type(key) is str and key not in out and 0 <= _cost(key) <= _MAX_TAG_BYTES:
                name = key
                self.left -= len(key)
            else:
                name = self.name(key, place, out)
            if (cost := _cost(item)) >= 0:
                self.left -= cost
                out[name] = item
            else:
                out[name] = self.value(item, f"{place}.{name}", depth + 1)
        return out

    def name(self, given: Any, place: str, taken: Mapping[str, Any]) -> str:
        key = plain(given)
        if type(key) is not str:
            key = str(tag(key, as_key=True))
            self.scrubber.report(place, key.encode("utf-8", "surrogatepass"))
        name = key
        if "\0" in key or not key.isascii() or len(key) > _MAX_TAG_BYTES:
            name = self.scrubber.text(place, key, limit=_MAX_TAG_BYTES)
        name = self.free(name, taken)
        self.left -= len(name)
        return name

    def free(self, name: str, taken: Mapping[str, Any]) -> str:
        """Return `name`, or where it is taken `name` and `~2`, `~3`, ... within the limit of a name."""
        if name not in taken:
            return name
        # Thousands of names can be cut to the same one: each search starts where the last one ended.
        base, of = name, (id(taken), name)
        while name in taken:
            count = self.repeats[of] = self.repeats.get(of, 1) + 1
            suffix = f"~{count}"
            room = _MAX_TAG_BYTES - len(suffix)
            beginning = base.encode()[:room].decode("utf-8", "ignore")
            name = (self.scrubber.cut(base, room) if self.scrubber.marks_cuts else beginning) + suffix
        return name

    def marker(self, place: str, text: str) -> str:
        self.scrubber.report(place)
        return text
