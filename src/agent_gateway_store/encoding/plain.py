"""Read any Python object as plain built-ins, whatever its own methods do.

Callers hand over subclasses whose methods raise or lie, proxies of what is gone, objects whose `__class__` raises. A
built-in base is read by the base's own method, and every other call is guarded.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from functools import cached_property, partial
from gc import get_referents
from itertools import islice
from pathlib import PosixPath, PurePath, WindowsPath
from types import MappingProxyType, MethodDescriptorType, WrapperDescriptorType
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
_BUILT_IN: tuple[type[Any], ...] = (dict, list, tuple, set, frozenset)
_SCALARS: tuple[type[Any], ...] = (str, int, float, bytes, bytearray)
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
_TAGGED: tuple[type[Any], ...] = tuple(base for base, *_ in _TAGS)
_READ_AS_BASE: tuple[type[Any], ...] = (*_SCALARS, *_TAGGED, *_BUILT_IN)
_SLOTTED = {UUID, *PosixPath.__mro__, *WindowsPath.__mro__}
# Of these types themselves `plain` says all; of classes below those written in C, all but attributes.
_ALL_READ = _PLAIN | {bytearray, date, Decimal, UUID, set, frozenset}
_READ_NATIVES = {object, OrderedDict, *_READ_AS_BASE}
_READ_MODULES = {"numpy", "asyncpg.pgproto.pgproto"}
_READ_MODULES |= {f"pandas._libs.tslibs.{name}" for name in ("base", "nattype", "timestamps")}
_NATIVE_METHODS = {WrapperDescriptorType, MethodDescriptorType}
# By which method a container is read, and as what.
_READERS: dict[Any, type[Any]] = {
    **dict.fromkeys((dict.items, OrderedDict.items), dict),
    **dict.fromkeys((list.__iter__, tuple.__iter__), list),
    **dict.fromkeys((set.__iter__, frozenset.__iter__), Members),
}


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


def holds_more(value: Any, read: Any) -> bool:
    """True if `read`, which `plain` returned for `value`, leaves something out, or may do so where nobody sees it.

    That is an attribute that is not a field, what a class in C keeps beside what is read of it, a value of a form that
    has several of one name. A `cached_property` says nothing new, nor does a private attribute that is still its
    default, or still equal to the container that its factory makes. What is read by its repr counts as left out.
    """
    kind = type(value)
    if kind in _ALL_READ:
        return False
    try:
        if issubclass(kind, Enum):
            inner = _enum_value(value)
            return inner is not value._value_ or holds_more(inner, read)
        if kind is MappingProxyType:
            return holds_more(get_referents(value)[0], read)
        return not _is_read(value, kind, read) or bool(_left_out(value, kind, read))
    except Exception:
        return True


def _is_read(value: Any, kind: type[Any], read: Any) -> bool:
    """True if `read` has all of a value but attributes."""
    natives = {base.__module__ for base in kind.__mro__ if base not in _READ_NATIVES and _is_native(base)}
    if not natives <= _READ_MODULES or issubclass(kind, _SCALARS):
        return natives <= _READ_MODULES
    if issubclass(kind, _TAGGED):
        if issubclass(kind, datetime | time) and (value.tzinfo is not None or value.fold) and value.utcoffset() is None:
            return False
        # A class in C says more than its base, such as nanoseconds; another one may say less.
        return bool(natives) or read.text == _tag_of(value, kind, by_base=True)
    if issubclass(kind, _BUILT_IN):
        return _READERS.get(kind.items if issubclass(kind, dict) else kind.__iter__) is type(read)
    return issubclass(kind, Mapping | AbstractSet | BaseModel) or dataclasses.is_dataclass(kind)


def _left_out(value: Any, kind: type[Any], read: Any) -> set[str]:
    """Return the names of the attributes that are not in `read`."""
    found = attributes_of(value)
    # What `typing` leaves on an object of a generic class, its type; the module, as on pandas' NaT.
    names = found.keys() - {"__orig_class__", "__module__"}
    names -= {name for base in kind.__mro__ if base in _SLOTTED for name in base.__dict__.get("__slots__", ())}
    if issubclass(kind, Mapping | AbstractSet) and not issubclass(kind, _BUILT_IN):
        # The dict that a wrapper such as UserDict reads.
        names -= {name for name in names if type(found[name]) in _BUILT_IN and _ids(found[name]) == _ids(read)}
    elif not issubclass(kind, _READ_AS_BASE):
        private = found.get("__pydantic_private__") or {}
        attributes = getattr(kind, "__private_attributes__", {})
        fields = kind.model_fields if issubclass(kind, BaseModel) else (each.name for each in dataclasses.fields(kind))
        names = {name for name in names.difference(fields) if not name.startswith("__pydantic_")}
        names |= {
            name for name, each in private.items() if name not in attributes or not _is_default(each, attributes[name])
        }
    return {name for name in names if not isinstance(inspect.getattr_static(kind, name, None), cached_property)}


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of `value`, also those in slots, whatever its class says of them."""
    state = object.__getstate__(value)  # type: ignore[attr-defined,unused-ignore]
    parts = [each for each in (state if type(state) is tuple else (state,)) if each]
    return {name: each for part in parts for name, each in part.items()}


def _is_native(kind: type[Any]) -> bool:
    """True if a class is written in C: its objects may hold more than their attributes."""
    return any(type(each) in _NATIVE_METHODS and each.__objclass__ is kind for each in vars(kind).values())


def _ids(items: Any) -> list[int]:
    return [*map(id, items), *(map(id, items.values()) if type(items) is dict else ())]


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
    text = _tag_of(value, kind)
    return _container(value, kind) if text is None else Tagged(text)


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


def _tag_of(value: Any, kind: type[Any], *, by_base: bool = False) -> str | None:
    for base, name, method in _TAGS:
        if not issubclass(kind, base):
            continue
        try:
            own = value.isoformat() if issubclass(base, date | time) else str(value)
            text = method(value) if by_base else str.__str__(own)
        except Exception:
            text = method(value)
        return f"${name}:{escape_surrogates(text)}"
    return None


def _container(value: Any, kind: type[Any]) -> Any:
    if issubclass(kind, AbstractSet):
        return Members(_items(value))
    if issubclass(kind, Mapping):
        pairs = _items(value.multi_items() if hasattr(kind, "multi_items") else value.items())
        members = dict(pairs)
        return members if len(members) == len(pairs) else _grouped(pairs)
    if issubclass(kind, list | tuple):
        return _items(value)
    if issubclass(kind, BaseModel):
        return _attributes(value, kind.model_fields) | (value.model_extra or {})
    if dataclasses.is_dataclass(kind):
        return _attributes(value, (field.name for field in dataclasses.fields(kind)))
    return _UNREADABLE


def _grouped(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return the members of a form: of several of one name the list."""
    members: dict[Any, list[Any]] = {}
    for name, each in pairs:
        members.setdefault(name, []).append(each)
    return {name: found if len(found) > 1 else found[0] for name, found in members.items()}


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
