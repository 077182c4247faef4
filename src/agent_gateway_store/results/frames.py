"""Which columns the frame of a record has, and of which Arrow type.

One place for both ways into a frame: a `Page` of objects, and bulk reads that make no objects. Derived from the
annotations of the record's class, so that it knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin
from uuid import UUID

from pydantic import BaseModel, SecretStr

from agent_gateway_store.errors import MissingExtraError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Column", "Kind", "arrow", "arrow_schema", "bare_type", "columns_of", "settle"]

Kind = Literal["text", "category", "time", "integer", "number", "boolean", "json"]
_KINDS: tuple[tuple[type, Kind], ...] = (
    (bool, "boolean"),
    (IntEnum, "integer"),
    (int, "integer"),
    (float, "number"),
    (datetime, "time"),
    (StrEnum, "category"),
    (str, "text"),
    (UUID, "text"),
)


@dataclass(frozen=True)
class Column:
    """One column of a frame.

    Attributes:
        kind: text (string), category (dictionary of strings), time (timestamp[us, UTC]), integer (int64), number
            (float64), boolean (bool), json (string that holds JSON).
        categories: The values that a category can have, in their order; empty: those that occur.
    """

    name: str
    kind: Kind
    categories: tuple[str, ...] = ()


@cache
def columns_of(record_type: type[BaseModel]) -> tuple[Column, ...]:
    """Return the columns of a record: its fields in their order, those left out that its repr hides."""
    return tuple(
        _column(name, field.annotation)
        for name, field in record_type.model_fields.items()
        if field.repr and not _is_secret(field.annotation)
    )


def arrow(feature: str = "to_arrow()") -> Any:
    """Return the module `pyarrow`.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import pyarrow
    except ImportError as exc:
        raise MissingExtraError(feature, extra="notebook") from exc
    return pyarrow


def arrow_schema(columns: type[BaseModel] | tuple[Column, ...]) -> pa.Schema:
    """Return the Arrow schema of a record, or of columns.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    pa = arrow()
    if isinstance(columns, type):
        columns = columns_of(columns)
    types: Mapping[Kind, Any] = {
        "text": pa.string(),
        "category": pa.dictionary(pa.int32(), pa.string()),
        "time": pa.timestamp("us", tz="UTC"),
        "integer": pa.int64(),
        "number": pa.float64(),
        "boolean": pa.bool_(),
        "json": pa.string(),
    }
    return pa.schema([(column.name, types[column.kind]) for column in columns])


def settle(table: pa.Table, columns: type[BaseModel] | tuple[Column, ...]) -> pa.Table:
    """Return `table` with exactly these columns, in this order and of these types.

    Every chunk of a category column gets the same dictionary: all values that it can have, in their order.

    Raises:
        KeyError: A column is missing.
        pyarrow.ArrowInvalid: A value does not fit its type.
    """
    pa = arrow()
    if isinstance(columns, type):
        columns = columns_of(columns)
    schema = arrow_schema(columns)
    arrays = [_settled(table.column(column.name), column, schema.field(column.name).type) for column in columns]
    return pa.Table.from_arrays(arrays, schema=schema)


def _settled(array: pa.ChunkedArray, column: Column, target: pa.DataType) -> pa.ChunkedArray:
    pa = arrow()
    if column.kind != "category" or not column.categories:
        return array.cast(target) if array.type != target else array
    import pyarrow.compute as pc

    words = pa.array(column.categories, pa.string())

    def numbered(values: Any) -> Any:
        indices = pc.index_in(values, value_set=words)
        if indices.null_count != values.null_count:
            raise pa.ArrowInvalid(f"{column.name} holds a value that is none of {', '.join(column.categories)}")
        return indices

    chunks = []
    for chunk in array.chunks:
        if pa.types.is_dictionary(chunk.type):
            indices = numbered(chunk.dictionary.cast(pa.string())).take(chunk.indices)
        else:
            indices = numbered(chunk.cast(pa.string()))
        chunks.append(pa.DictionaryArray.from_arrays(indices.cast(pa.int32()), words))
    return pa.chunked_array(chunks, type=target)


def _column(name: str, annotation: Any) -> Column:
    found = bare_type(annotation)
    if isinstance(found, type):
        for type_, kind in _KINDS:
            if issubclass(found, type_):
                words = tuple(str(member.value) for member in found) if issubclass(found, StrEnum) else ()
                return Column(name, kind, words)
    return Column(name, "json")


def bare_type(annotation: Any) -> Any:
    """Return an annotation without `Annotated` and without None; None for a union of several types."""
    while get_origin(annotation) in (Annotated, Union, UnionType):
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
            continue
        left = [each for each in get_args(annotation) if each is not NoneType]
        if len(left) != 1:
            return None
        annotation = left[0]
    return annotation


def _is_secret(annotation: Any) -> bool:
    found = bare_type(annotation)
    return isinstance(found, type) and issubclass(found, SecretStr)
