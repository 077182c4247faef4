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
are arrays. A container that cannot be read counts as any other object.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import math
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

import rfc8785
from pydantic import BaseModel

from agent_gateway_store.settings import default_hash_key

__all__ = ["MAX_SAFE_INTEGER", "canonical_json", "hash_bytes", "hash_json", "is_text", "opened", "tag"]

# The largest integer that every reader of JSON takes exactly: section 2.2 of RFC 7493.
MAX_SAFE_INTEGER = 2**53 - 1
# rfc8785 recurses: far below Python's limit of 1,000 frames.
_COLLAPSE_EVERY = 64
# 617 digits: below 640, the lowest limit on decimal digits that Python can be set to (sys.set_int_max_str_digits).
_DECIMAL_BITS = 2048
_LIKE_A_TAG = re.compile(r"\$+[a-z0-9]+:")
_SURROGATE = re.compile("[\ud800-\udfff]")


def hash_json(value: Any, *, key: str | None = None) -> str:
    """Return SHA-256 of the canonical JSON of `value`, or HMAC-SHA-256 under `key` (default: setting HASH_KEY)."""
    return hash_bytes(canonical_json(value), key=key)


def hash_bytes(data: bytes, *, key: str | None = None) -> str:
    """Return SHA-256 of `data` (64 hex digits), or HMAC-SHA-256 under `key` (default: setting HASH_KEY)."""
    secret = default_hash_key() if key is None else key
    if secret:
        return hmac.new(secret.encode(), data, hashlib.sha256).hexdigest()
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return the RFC 8785 form of `value`, tagged as the table of this module says. Takes any depth and any object."""
    return rfc8785.dumps(_tagged(value))


class _Frame:
    """One open container of the walk, which has its own stack because values may be nested deeper than Python's."""

    __slots__ = ("is_set", "items", "key", "out", "source_id")

    def __init__(self, value: Any, source: Any) -> None:
        self.source_id = id(value)
        self.is_set = isinstance(value, AbstractSet)
        self.key: str | None = None
        self.out: dict[str, Any] | list[Any]
        if isinstance(source, Mapping):
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


def _source(value: Any) -> Any:
    return list(value) if isinstance(value, AbstractSet) else opened(value)


def _tagged(root: Any) -> Any:
    source = _source(root)
    if source is None:
        return tag(root)
    frames = [_Frame(root, source)]
    level_of = {id(root): 0}
    sets_open = int(frames[0].is_set)
    while True:
        frame = frames[-1]
        for key, value in frame.items:
            if isinstance(frame.out, dict):
                frame.key = key if type(key) is str and _is_plain(key) else tag(key, as_key=True)
            inner = _source(value)
            if inner is None:
                frame.put(tag(value))
                continue
            if (level := level_of.get(id(value))) is not None:
                frame.put(f"$cycle:{len(frames) - level}")
                continue
            level_of[id(value)] = len(frames)
            frames.append(_Frame(value, inner))
            sets_open += frames[-1].is_set
            break
        else:
            del level_of[frames.pop().source_id]
            sets_open -= frame.is_set
            collapse = bool(frames) and len(frames) % _COLLAPSE_EVERY == 0
            result = frame.closed(in_set=sets_open > 0, collapse=collapse)
            if not frames:
                return result
            frames[-1].put(result)


def opened(value: Any) -> Any:
    """Return `value` as a list, tuple or mapping; None for a leaf."""
    kind = type(value)
    if kind is dict or kind is list or kind is tuple:
        return value
    if isinstance(value, Enum):
        value = value.value
    try:
        if isinstance(value, Mapping):
            return dict(value.items())
        if isinstance(value, list | tuple):
            return list(value)
        if isinstance(value, BaseModel):
            return _attributes(value, type(value).model_fields) | (value.model_extra or {})
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _attributes(value, (field.name for field in dataclasses.fields(value)))
    except Exception:
        # A container that raises when it is read is hashed by its type and repr.
        return None
    return None


def _attributes(value: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return those of the named attributes that `value` has: a field may never have been set."""
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _is_plain(text: str) -> bool:
    return not _LIKE_A_TAG.match(text) and (text.isascii() or is_text(text))


def is_text(text: str) -> bool:
    """True if `text` has no lone surrogate, that is, if UTF-8 can hold it."""
    return text.isascii() or _SURROGATE.search(text) is None


def _escape_surrogates(text: str) -> str:
    r"""Return `text` with backslashes doubled and every lone surrogate as `\udxxx`."""
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\\", "\\\\"))


def _digits(value: int) -> str:
    """Return the decimal digits of `value`, or hex ones where Python refuses to make decimal digits."""
    return str(value) if value.bit_length() <= _DECIMAL_BITS else hex(value)


def tag(value: Any, *, as_key: bool = False) -> Any:
    """Return the I-JSON scalar by which a leaf enters canonical JSON."""
    # Text first and bool before int: a StrEnum is text as well, and a bool is an int.
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str):
        value = str.__str__(value)
        if not is_text(value):
            return f"$text:{_escape_surrogates(value)}"
        return f"${value}" if _LIKE_A_TAG.match(value) else value
    if value is None or isinstance(value, bool):
        return f"${'null' if value is None else 'bool'}:{str(value).lower()}" if as_key else value
    if isinstance(value, int):
        return f"$int:{_digits(value)}" if as_key or abs(value) > MAX_SAFE_INTEGER else int(value)
    if isinstance(value, float):
        return f"$float:{float(value)}" if as_key or not math.isfinite(value) else float(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"$bytes:{base64.b64encode(bytes(value)).decode()}"
    if isinstance(value, AbstractSet):
        return _tagged(value)
    if as_key and opened(value) is not None:
        return f"$json:{canonical_json(value).decode()}"
    return _tag_object(value)


# In this order: a datetime is a date as well.
_TAGGED: tuple[tuple[type[Any], str], ...] = (
    (datetime, "datetime"),
    (date, "date"),
    (time, "time"),
    (Decimal, "decimal"),
    (UUID, "uuid"),
    (PurePath, "path"),
)


def _tag_object(value: Any) -> str:
    try:
        for type_, name in _TAGGED:
            if isinstance(value, type_):
                text = value.isoformat() if isinstance(value, date | time) else str(value)
                return f"${name}:{_escape_surrogates(text)}"
        text = repr(value)
    except Exception:
        # A hash must be had of any object, also of one whose `__repr__` raises.
        text = "?"
    return f"$object:{type(value).__module__}.{type(value).__qualname__}:{_escape_surrogates(text)}"
