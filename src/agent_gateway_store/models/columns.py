"""Column types that read back exactly what was written, on SQLite and on PostgreSQL."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import JSON, BigInteger, ColumnElement, DateTime, Dialect, Integer, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import ReturnTypeFromArgs
from sqlalchemy.types import TypeDecorator, TypeEngine

UTC_MIN = datetime.min.replace(tzinfo=UTC)
UTC_MAX = datetime.max.replace(tzinfo=UTC)
INVALID = "INVALID"
"""What stands in place of a text that cannot be read."""
# What no clock gives.
_UNREADABLE = UTC_MIN + timedelta(microseconds=1)
READABLE_SQL = (
    f"CASE WHEN isfinite({{0}}) AND NOT {{0}} BETWEEN TIMESTAMPTZ '{UTC_MIN.isoformat()}' "
    f"AND TIMESTAMPTZ '{UTC_MAX.isoformat()}' THEN TIMESTAMPTZ '{_UNREADABLE.isoformat()}' ELSE {{0}} END"
)
"""A time of PostgreSQL, whose years go on to 294276: over one that Python cannot hold the driver loses all rows."""


def as_utc(value: datetime) -> datetime:
    """Return `value` in UTC. Naive is taken as UTC; what UTC cannot hold becomes its first or last instant.

    Raises:
        ValueError: Its time zone cannot be read, or it is not a time (pandas' NaT).
    """
    if type(value) is not datetime:
        value = _exact(value)
    # Nearly every value is in UTC already and is returned itself.
    if value.tzinfo is UTC:
        return value
    try:
        offset = value.utcoffset()
    except Exception as exc:
        raise ValueError("its time zone cannot be read") from exc
    if offset is None:
        return value.replace(tzinfo=UTC, fold=0)
    try:
        return value.astimezone(UTC)
    except OverflowError:
        return UTC_MIN if value.year == 1 else UTC_MAX


def _exact(value: datetime) -> datetime:
    """Return a plain datetime: a subclass may hold nanoseconds, which no database keeps, or override any method."""
    try:
        is_time = bool(value == value)
    except Exception:
        is_time = True
    if not is_time:
        raise ValueError("it is not a time")
    parts = ("year", "month", "day", "hour", "minute", "second", "microsecond", "tzinfo", "fold")
    return datetime(**{part: getattr(datetime, part).__get__(value) for part in parts})


def token_digest(token: str) -> str:
    """Return the SHA-256 (64 hex digits) under which an approval token is stored."""
    # A token from outside may hold a lone surrogate, which must find nothing rather than raise.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def BigKey() -> TypeEngine[int]:  # noqa: N802  reads as the type it returns
    """64-bit primary key. SQLite numbers rows only in a column of type INTEGER, which has 64 bits there."""
    return BigInteger().with_variant(Integer(), "sqlite")


def Json() -> TypeEngine[Any]:  # noqa: N802
    """JSON on SQLite, JSONB on PostgreSQL; None is SQL NULL."""
    return JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


class _Readable(ReturnTypeFromArgs[datetime]):
    inherit_cache = True


@compiles(_Readable)
def _plain(element: _Readable, compiler: Any, **options: Any) -> str:
    text: str = compiler.process(element.clauses, **options)
    return text


@compiles(_Readable, "postgresql")
def _readable(element: _Readable, compiler: Any, **options: Any) -> str:
    return READABLE_SQL.format(compiler.process(element.clauses, **options))


class UtcDateTime(TypeDecorator[datetime]):
    """An instant: stored in UTC, read back aware."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return _Readable(column)

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else as_utc(value)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value == _UNREADABLE:
            raise OverflowError("a time that Python cannot hold")
        return None if value is None else as_utc(value)


class EnumText(TypeDecorator[Any]):
    """A `StrEnum` stored as its value: unlike a native enum, it takes a new member without a migration."""

    impl: type[TypeEngine[Any]] = Text
    cache_ok = True

    def __init__(self, enum: type[Enum]) -> None:
        super().__init__()
        self.enum = enum
        self._members = {member.value: member for member in enum}

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return None if value is None else self.enum(value).value

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        # Ten times as fast as calling the class, which raises the error for an unknown value.
        return None if value is None else self._members.get(value) or self.enum(value)


class EnumNumber(EnumText):
    """An `IntEnum` stored as its number, so that levels compare in SQL."""

    impl = Integer
    cache_ok = True


class JsonOf(TypeDecorator[Any]):
    """A Pydantic type in a JSON column: dumped on the way in, validated on the way out."""

    impl = Json()
    cache_ok = True

    def __init__(self, type_: Any) -> None:
        super().__init__()
        self.type_ = type_
        self._adapter: TypeAdapter[Any] = TypeAdapter(type_)

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return None if value is None else self._adapter.dump_python(value, mode="json", warnings=False)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        return None if value is None else self._adapter.validate_python(value)


class TokenDigest(TypeDecorator[str]):
    """A secret token: the column holds its SHA-256, comparisons hash the value first, reading gives None."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else token_digest(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        return None
