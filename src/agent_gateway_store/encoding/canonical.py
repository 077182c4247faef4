"""Hashes of JSON that other languages can reproduce: RFC 8785 canonical JSON, by the `rfc8785` package.

RFC 8785 takes I-JSON only (RFC 7493). Everything else enters as a tagged string, so that nothing is rounded and two
different values never share a canonical form:

| value | enters as |
| --- | --- |
| integer beyond ±(2^53 - 1) | `$int:` and its decimal digits (`$int:0x` and hex digits from 2^2048 on) |
| NaN, infinities | `$float:nan`, `$float:inf`, `$float:-inf` |
| text with a lone surrogate | `$text:` and the text, backslash doubled, the surrogate as `\\udxxx` |
| bytes | `$bytes:` and base64 |
| date, time, Decimal, UUID, path | `$date:`, `$datetime:`, `$time:`, `$decimal:`, `$uuid:`, `$path:` and its text |
| set | `$set:` and the canonical JSON of its sorted members; inside another set, `$sha256:` and the SHA-256 of that |
| key that is not text | the same tags, with `$int:`, `$float:`, `$bool:` and `$null:` for any number, boolean, null |
| key that is a container | `$json:` and its canonical JSON |
| key that would equal one before it | `$again:`, which one it is (2, 3, ...), `:` and the key |
| text that begins like a tag | one more `$` before it |
| container inside itself | `$cycle:` and how many levels up |
| container at depth 64, 128, ... | `$sha256:` and the SHA-256 of its own canonical JSON |
| any other object | `$object:`, its type and its repr |

Enum members are their values, dataclasses and Pydantic models the objects of their fields (and extra fields), tuples
are arrays. A name with several values, as in a form, has the array of them. A container that cannot be read counts as
any other object. A time has its offset, and not the name of its zone.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import re
from contextlib import suppress
from datetime import timedelta, timezone
from fractions import Fraction
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import Any
from zoneinfo import ZoneInfo

import rfc8785
from pydantic import BaseModel

from agent_gateway_store.encoding.plain import (
    CONTAINERS,
    Members,
    Tagged,
    attributes_of,
    escape_surrogates,
    holds_more,
    is_text,
    plain,
    type_name,
)
from agent_gateway_store.settings import default_hash_key

# The largest integer that every reader of JSON takes exactly: section 2.2 of RFC 7493.
MAX_SAFE_INTEGER = 2**53 - 1
# rfc8785 recurses: far below Python's limit of 1,000 frames.
_COLLAPSE_EVERY = 64
# 617 digits: below 640, the lowest limit on decimal digits that Python can be set to (sys.set_int_max_str_digits).
_DECIMAL_BITS = 2048
_SIMPLE_DEPTH = 16  # chosen: deeper than calls are, and far from where containers are collapsed or end in themselves
_ENCODE = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode
# Exactly these: a subclass may have any repr.
_REPR_SAYS_ALL = frozenset(
    {timedelta, timezone, complex, range, Fraction, ZoneInfo}
    | {IPv4Address, IPv6Address, IPv4Network, IPv6Network, IPv4Interface, IPv6Interface}
)
# By name: NumPy is not always there (and the repr of its `void` is cut), and Pydantic has a class for each kind of URL.
_REPR_SAYS_ALL_BELOW = frozenset(
    {"numpy.number", "numpy.bool", "numpy.bool_", "numpy.datetime64"}
    | {"pydantic.networks.AnyUrl", "pydantic.networks._BaseMultiHostUrl"}
)
_JSON_SCALARS = frozenset({str, int, float, bool, type(None)})
_JSON_TYPES = _JSON_SCALARS | {dict, list}
_LIKE_A_TAG = re.compile(r"\$+[a-z0-9]+:")


def hash_json(value: Any, *, key: str | None = None, strict: bool = False) -> str:
    """Return SHA-256 of the canonical JSON of `value`, or HMAC-SHA-256 under `key` (default: setting HASH_KEY).

    Raises:
        TypeError: `strict`, and there is an object that enters by its repr, which may be the same for two that differ,
            or one with values outside its fields, which do not enter.
    """
    return hash_bytes(canonical_json(value, strict=strict), key=key)


def hash_bytes(data: bytes, *, key: str | None = None) -> str:
    """Return SHA-256 of `data` (64 hex digits), or HMAC-SHA-256 under `key` (default: setting HASH_KEY)."""
    secret = default_hash_key() if key is None else key
    if secret:
        return hmac.new(secret.encode(), data, hashlib.sha256).hexdigest()
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any, *, strict: bool = False) -> bytes:
    """Return the RFC 8785 form of `value`, tagged as the table of this module says. Takes any depth and any object.

    Raises:
        TypeError: As for `hash_json`.
    """
    # The same bytes from the encoder in C: it writes all but floats as RFC 8785 does, and sorts names of ASCII alike.
    with suppress(RuntimeError):  # another thread changes it meanwhile
        if _is_simple(value):
            return _ENCODE(value).encode()
    if strict:
        _require_known(value)
    return rfc8785.dumps(_tagged(value))


def types_in(root: Any) -> str:
    """Return a hash of what types stand where in `root`; empty where JSON has them all.

    Two values of which one holds an enum member, a named tuple or a model, and the other text, a list or another model,
    may have the same canonical JSON, and so have different hashes. The time and memory it takes grow as that JSON does.
    """
    return "" if _has_json_types(root) else _digest(rfc8785.dumps(_tagged(root, typed=True)))


def _has_json_types(root: Any) -> bool:
    seen: set[int] = set()
    items = [root]
    while items:
        item = items.pop()
        if type(item) not in _JSON_TYPES:
            return False
        if type(item) in CONTAINERS and id(item) not in seen:
            seen.add(id(item))
            # Without the scalars, which may be as many as there are bytes.
            for inside in (item, item.values()) if type(item) is dict else (item,):
                items.extend(each for each in inside if type(each) not in _JSON_SCALARS)
    return True


def _typed(value: Any, form: Any) -> Any:
    """Return `form`, that of `value`, behind its type where JSON does not have that.

    Of a model it says which fields were given, too: a tool may leave alone what is a default, and clear what is an
    explicit None.
    """
    kind = type(value)
    if kind in _JSON_TYPES:
        return form
    was_given = sorted(getattr(value, "model_fields_set", ())) if issubclass(kind, BaseModel) else ""
    return [f"$type:{type_name(kind)}{was_given}", form]


def _is_simple(value: Any, depth: int = 0) -> bool:
    kind = type(value)
    if kind is str:
        return _is_plain(value)
    if kind is int:
        return bool(abs(value) <= MAX_SAFE_INTEGER)
    if value is None or kind is bool:
        return True
    if depth == _SIMPLE_DEPTH:
        return False
    if kind is list or kind is tuple:
        return all(_is_simple(item, depth + 1) for item in value)
    return kind is dict and all(
        type(key) is str and key.isascii() and _is_plain(key) and _is_simple(item, depth + 1)
        for key, item in value.items()
    )


def members_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, as `object_pairs_hook` of `json.loads`; ValueError if a name stands twice.

    Of two members of one name, readers would take either.
    """
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("it holds a name twice")
    return members


def _require_known(root: Any) -> None:
    # The items themselves, for an id that is free is taken again.
    seen: dict[int, Any] = {}
    items = [root]
    while items:
        item = items.pop()
        source = plain(item)
        if type(source) is Tagged and source.text.startswith("$object:"):
            if not _says_all(item):
                raise TypeError(f"an object of the type {type_name(type(item))}")
        elif holds_more(item, source):
            raise TypeError(f"an object of the type {type_name(type(item))} with values outside its fields")
        if type(source) in CONTAINERS and id(item) not in seen:
            seen[id(item)] = item
            items.extend([*source, *source.values()] if type(source) is dict else source)


def _says_all(value: Any) -> bool:
    """True if the repr of such an object holds its whole value."""
    kind = type(value)
    if kind in _REPR_SAYS_ALL:
        return True
    names = {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}
    # A class below may have more attributes than Pydantic's, and a repr that hides the password.
    repr_of = next(base.__module__ for base in kind.__mro__ if "__repr__" in vars(base))
    if names.isdisjoint(_REPR_SAYS_ALL_BELOW) or repr_of not in {"numpy", "pydantic.networks"}:
        return False
    return attributes_of(value).keys() <= {"_url"}


class _Frame:
    """One open container of the walk, which has its own stack because values may be nested deeper than Python's."""

    __slots__ = ("is_set", "items", "key", "out", "value")

    def __init__(self, value: Any, source: Any) -> None:
        self.value = value
        self.is_set = type(source) is Members
        self.key: str | None = None
        self.out: dict[str, Any] | list[Any]
        if type(source) is dict:
            # A copy: another thread may change the mapping meanwhile.
            self.out, self.items = {}, iter(list(source.items()))
        else:
            self.out, self.items = [], iter([(None, item) for item in source])

    def put(self, value: Any) -> None:
        if isinstance(self.out, dict):
            assert self.key is not None  # noqa: S101
            name, count = self.key, 1
            while name in self.out:
                count += 1
                name = f"$again:{count}:{self.key}"
            self.out[name] = value
        else:
            self.out.append(value)

    def closed(self, *, in_set: bool, collapse: bool) -> Any:
        if not self.is_set:
            return _digest(rfc8785.dumps(self.out)) if collapse else self.out
        text = f"$set:[{b','.join(sorted(map(rfc8785.dumps, self.out))).decode()}]"
        # A set inside a set: text in text would double its backslashes at each level.
        return _digest(text.encode()) if in_set else text


def _digest(data: bytes) -> str:
    return f"$sha256:{hashlib.sha256(data).hexdigest()}"


def _tagged(root: Any, *, typed: bool = False) -> Any:
    """Return `root` as I-JSON; `typed`: every value behind its type where JSON does not have that."""
    source = plain(root)
    if type(source) not in CONTAINERS:
        return _typed(root, tag(source)) if typed else tag(source)
    frames = [_Frame(root, source)]
    level_of = {id(root): 0}
    sets_open = int(frames[0].is_set)
    while True:
        frame = frames[-1]
        for key, value in frame.items:
            if isinstance(frame.out, dict):
                if type(key) is str and _is_plain(key):
                    frame.key = key
                else:
                    frame.key = _digest(rfc8785.dumps(_tagged(key, typed=True))) if typed else tag(key, as_key=True)
            inner = plain(value)
            if type(inner) not in CONTAINERS:
                frame.put(_typed(value, tag(inner)) if typed else tag(inner))
                continue
            if (level := level_of.get(id(value))) is not None:
                frame.put(f"$cycle:{len(frames) - level}")
                continue
            level_of[id(value)] = len(frames)
            frames.append(_Frame(value, inner))
            sets_open += frames[-1].is_set
            break
        else:
            del level_of[id(frames.pop().value)]
            sets_open -= frame.is_set
            collapse = bool(frames) and len(frames) % _COLLAPSE_EVERY == 0
            result = frame.closed(in_set=sets_open > 0, collapse=collapse)
            if typed:
                result = _typed(frame.value, result)
            if not frames:
                return result
            frames[-1].put(result)


def _is_plain(text: str) -> bool:
    return not _LIKE_A_TAG.match(text) and (text.isascii() or is_text(text))


def tag(value: Any, *, as_key: bool = False) -> Any:
    """Return the I-JSON scalar by which a leaf enters canonical JSON."""
    value = plain(value)
    kind = type(value)
    if kind is str:
        if not is_text(value):
            return f"$text:{escape_surrogates(value)}"
        return f"${value}" if _LIKE_A_TAG.match(value) else value
    if value is None or kind is bool:
        return f"${'null' if value is None else 'bool'}:{str(value).lower()}" if as_key else value
    if kind is int:
        if not as_key and abs(value) <= MAX_SAFE_INTEGER:
            return value
        return f"$int:{value if value.bit_length() <= _DECIMAL_BITS else hex(value)}"
    if kind is float:
        return f"$float:{value}" if as_key or not math.isfinite(value) else value
    if kind is bytes:
        return f"$bytes:{base64.b64encode(value).decode()}"
    if kind is Tagged:
        return value.text
    # A set is text already; a mapping or a sequence is a leaf only as the name of a member.
    return _tagged(value) if kind is Members else f"$json:{canonical_json(value).decode()}"
