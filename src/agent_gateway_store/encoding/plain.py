"""Read any Python object as plain built-ins, whatever its own methods do.

Callers hand over subclasses whose methods raise or lie, proxies of what is gone, objects whose `__class__` raises. A
built-in base is read by the base's own method, and every other call is guarded.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from functools import cached_property, partial
from itertools import islice
from pathlib import PurePath
from typing import Any, cast
from uuid import UUID

from pydantic import BaseModel
from pydantic.fields import ModelPrivateAttr

_SURROGATE = re.compile("[\ud800-\udfff]")
# Chosen: a hundred times what is ever stored, and read in a second; an iterator without end must end somewhere.
_MOST_ITEMS = 10_000_000


class Members(list[Any]):
    """The members of a set, in no order."""


class Tagged:
    """An object that JSON does not know, as the text that stands for it."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


CONTAINERS = frozenset({dict, list, tuple, Members})
"""The types that `plain` returns for what has items."""
_UNREADABLE = object()
_BUILT_IN = (dict, list, tuple, set, frozenset)
_PLAIN = CONTAINERS | {str, int, float, bool, type(None), bytes, Tagged}
# In this order: a datetime is a date as well.
_TAGS: tuple[tuple[type[Any], str, Callable[[Any], str]], ...] = (
    (datetime, "datetime", datetime.isoformat),
    (date, "date", date.isoformat),
    (time, "time", time.isoformat),
    (Decimal, "decimal", Decimal.__str__),
    (UUID, "uuid", UUID.__str__),
    (PurePath, "path", PurePath.__str__),
)


def plain(value: Any) -> Any:
    """Return `value` as a plain built-in; its items are left as they are. Never raises an Exception.

    Returns:
        A str, int, float, bool, None, bytes, dict, list or tuple, of exactly that type; `Members` for a set; `Tagged`
        for every other object, and for one that cannot be read as what it is. Enum members are their values,
        dataclasses and Pydantic models the dicts of their fields.
    """
    if type(value) in _PLAIN:
        return value
    for read in (_read, _read_proxy):
        with suppress(Exception):
            found = read(value)
            if type(found) in _PLAIN:
                return found
    return Tagged(f"$object:{type_name(type(value))}:{_repr(value)}")


def holds_more(value: Any) -> bool:
    """True if a model, a dataclass or a container has values that `plain` leaves out, or that cannot be read.

    Those are attributes that are no fields. A `cached_property` says nothing new, and neither does a private attribute
    that is still its default, or still equal to the container that its factory makes.
    """
    kind = type(value)
    has_fields = issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)
    if not has_fields and (kind in _BUILT_IN or not issubclass(kind, _BUILT_IN)):
        return False
    try:
        # The one of `object`, which has what is in slots, too: classes have their own.
        state = object.__getstate__(value)  # type: ignore[attr-defined,unused-ignore]
        parts = [each for each in (state if type(state) is tuple else (state,)) if each]
        found = {name: each for part in parts for name, each in part.items()}
        private = found.get("__pydantic_private__") or {}
        attributes = getattr(kind, "__private_attributes__", {})
        if not all(name in attributes and _is_default(each, attributes[name]) for name, each in private.items()):
            return True
        # What `typing` leaves on an object of a generic class: its type.
        names = {"__orig_class__", *(kind.model_fields if issubclass(kind, BaseModel) else ())}
        if dataclasses.is_dataclass(kind):
            names |= {each.name for each in dataclasses.fields(kind)}
        others = [name for name in found if name not in names and not name.startswith("__pydantic_")]
        return not all(isinstance(inspect.getattr_static(kind, name, None), cached_property) for name in others)
    except Exception:
        return True


def _is_default(value: Any, attribute: ModelPrivateAttr) -> bool:
    default, make = attribute.default, cast("Callable[[], Any] | None", attribute.default_factory)
    if make is not None:
        # Another factory may count, or open a connection.
        if not issubclass(type(value), _BUILT_IN):
            return False
        default = make()
    # Equal, for Pydantic copies defaults.
    return value is default or (type(value) is type(default) and bool(value == default))


def is_text(text: str) -> bool:
    """True if `text` has no lone surrogate, that is, if UTF-8 can hold it."""
    return text.isascii() or _SURROGATE.search(text) is None


def escape_surrogates(text: str) -> str:
    r"""Return `text` with backslashes doubled and every lone surrogate as `\udxxx`."""
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\\", "\\\\"))


def _read(value: Any) -> Any:
    # By the type, for `isinstance` asks `__class__` as well, which may raise.
    kind = type(value)
    # Text before int and both behind enums: a StrEnum is text as well.
    if issubclass(kind, Enum):
        return plain(_enum_value(value))
    if issubclass(kind, str):
        return str.__str__(value)
    if issubclass(kind, int):
        return int.__int__(value)
    if issubclass(kind, float):
        return float.__float__(value)
    if issubclass(kind, bytes | bytearray | memoryview):
        return memoryview(value).tobytes()
    return _tagged(value, kind) or _container(value, kind)


def _read_proxy(value: Any) -> Any:
    """Read what takes the place of another object: a weak proxy, a context-local object."""
    kind = value.__class__
    if kind is type(value):
        return _UNREADABLE
    for base in (str, bool, int, float):
        if issubclass(kind, base):
            return base(value)
    return _container(value, kind)


def _enum_value(member: Any) -> Any:
    try:
        return member.value
    except Exception:
        return member._value_


def _tagged(value: Any, kind: type[Any]) -> Tagged | None:
    for base, name, method in _TAGS:
        if not issubclass(kind, base):
            continue
        try:
            text = str.__str__(value.isoformat() if issubclass(base, date | time) else str(value))
        except Exception:
            text = method(value)
        return Tagged(f"${name}:{escape_surrogates(text)}")
    return None


def _container(value: Any, kind: type[Any]) -> Any:
    if issubclass(kind, AbstractSet):
        return Members(_items(value))
    if issubclass(kind, Mapping):
        return dict(_items(value.items()))
    if issubclass(kind, list | tuple):
        return _items(value)
    if issubclass(kind, BaseModel):
        return _attributes(value, kind.model_fields) | (value.model_extra or {})
    if dataclasses.is_dataclass(kind):
        return _attributes(value, (field.name for field in dataclasses.fields(kind)))
    return _UNREADABLE


def _items(source: Iterable[Any]) -> list[Any]:
    # A list takes its size from `__len__`, which may claim anything, but not through `islice`.
    items = list(islice(iter(source), _MOST_ITEMS + 1))
    if len(items) > _MOST_ITEMS:
        raise ValueError(f"it has more than {_MOST_ITEMS} items")
    return items


def _attributes(value: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return those of the named attributes that `value` has: a field may never have been set."""
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def type_name(kind: type[Any]) -> str:
    """Return the name of a type with its module, or `?` where the type does not give it."""
    try:
        return escape_surrogates(f"{kind.__module__}.{kind.__qualname__}")
    except Exception:
        return "?"


def code_of(function: Callable[..., Any] | None) -> Any:
    """Return the code of a function, a method, a partial, or an object that can be called; None if it has none."""
    found: Any = function
    while isinstance(found, partial):
        found = found.func
    found = inspect.unwrap(found) if callable(found) else found
    if not hasattr(found, "__code__"):
        found = inspect.getattr_static(type(found), "__call__", None)
    return getattr(found, "__code__", None)


def _repr(value: Any) -> str:
    try:
        return escape_surrogates(str.__str__(repr(value)))
    except Exception:
        return "?"
