"""Objects whose own methods raise or lie: subclasses of every built-in, proxies, dead references, odd types."""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import weakref
from datetime import UTC, datetime, time, timedelta, tzinfo
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID

__all__ = ["OBJECTS", "Nanoseconds", "UnreadableTime"]


class Hostile(Exception):
    """Raised by every method here; no code can expect it."""


def _raises(*_arguments: Any, **_named: Any) -> Any:
    raise Hostile


def _subclass(base: type[Any], *methods: str) -> type[Any]:
    return type(
        f"Hostile{base.__name__.title()}", (base,), dict.fromkeys(methods, _raises) | {"__hash__": base.__hash__}
    )


Text = _subclass(str, "__str__", "__len__", "__eq__", "__contains__", "encode", "isascii")
Integer = _subclass(int, "__str__", "__int__", "__index__", "__abs__", "__gt__", "__le__", "bit_length")
Real = _subclass(float, "__float__", "__abs__", "__lt__", "__bool__", "__repr__")
Data = _subclass(bytes, "__bytes__", "__len__")
Map = _subclass(dict, "items", "__iter__", "__len__")
Items = _subclass(list, "__iter__", "__len__")
BadSet = _subclass(set, "__iter__", "__len__")
BadPath = _subclass(PurePosixPath, "__str__", "__repr__")
BadUuid = _subclass(UUID, "__str__", "__repr__")
BadDecimal = _subclass(Decimal, "__str__", "__repr__")
UnreadableTime = _subclass(datetime, "isoformat", "astimezone", "utcoffset", "replace")
Unprintable = _subclass(object, "__repr__")
Unreachable = _subclass(object, "__getattribute__")


class Nanoseconds(datetime):
    """A time with nine digits of a second, as data frames have it."""

    def isoformat(self, *args: Any, **named: Any) -> str:
        """Return three digits more than a datetime holds."""
        return super().isoformat(*args, **named).replace("+", "123+")


class LyingList(list[Any]):
    """A list that claims to be huge."""

    def __len__(self) -> int:
        return 2**62


class AbstractMap(collections.abc.Mapping[str, Any]):
    """A mapping whose values cannot be had."""

    __getitem__ = _raises

    def __iter__(self) -> Any:
        return iter("a")

    def __len__(self) -> int:
        return 1


class NoClass:
    """An object that does not say what it is."""

    __class__ = property(_raises)  # type: ignore[assignment]


class SaysNumber:
    """An object whose repr is not text."""

    def __repr__(self) -> str:
        return 3  # type: ignore[return-value]


class EndlessRepr:
    """An object whose repr never ends."""

    def __repr__(self) -> str:
        return repr(self)


class BadZone(tzinfo):
    """A time zone that cannot be asked."""

    utcoffset = _raises


class LateZone(tzinfo):
    """A time zone that is two years wide."""

    def utcoffset(self, _moment: datetime | None) -> timedelta:
        """Return more than a zone may."""
        return timedelta(days=700)


class BadEnum(enum.Enum):
    """Members whose value cannot be had."""

    A = 1
    value = property(_raises)  # type: ignore[assignment]


class _Meta(type):
    __getattribute__ = _raises


class BadType(metaclass=_Meta):
    """A class that tells nothing of itself."""


@dataclasses.dataclass
class BadField:
    """A dataclass with a field that raises."""

    a: Any = 1

    def __getattribute__(self, name: str) -> Any:
        return _raises() if name == "a" else object.__getattribute__(self, name)


class _Gone:
    pass


def _released() -> memoryview:
    view = memoryview(b"abc")
    view.release()
    return view


OBJECTS: dict[str, Any] = {
    "text": Text("abc"),
    "integer": Integer(5),
    "large integer": Integer(2**70),
    "digits": 10**5_000,
    "real": Real(1.5),
    "not a number": Real("nan"),
    "bytes": Data(b"x"),
    "mapping": Map(a=1),
    "abstract mapping": AbstractMap(),
    "list": Items([1]),
    "lying list": LyingList([1]),
    "set": BadSet([1]),
    "path": BadPath("a"),
    "uuid": BadUuid(int=3),
    "decimal": BadDecimal("1"),
    "time": UnreadableTime(2026, 1, 2, tzinfo=UTC),
    "nanoseconds": Nanoseconds(2026, 1, 2, tzinfo=UTC),
    "zone": datetime(2026, 1, 2, tzinfo=BadZone()),
    "wide zone": datetime(2026, 1, 2, tzinfo=LateZone()),
    "time of day": time(1, 2, tzinfo=BadZone()),
    "no repr": Unprintable(),
    "no attributes": Unreachable(),
    "no class": NoClass(),
    "numeric repr": SaysNumber(),
    "endless repr": EndlessRepr(),
    "enum": BadEnum.A,
    "bad type": BadType,
    "of a bad type": BadType(),
    "dataclass": BadField(),
    "dead reference": weakref.proxy(_Gone()),
    "released view": _released(),
    "generator": (number for number in range(3)),
    "complex": 1 + 2j,
}
"""What each is, to the object."""
