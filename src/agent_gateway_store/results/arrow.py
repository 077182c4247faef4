"""Records as Arrow, and Arrow as pandas and Polars.

Both ways into a frame use it: a `Page` of objects, and bulk reads that make no objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from agent_gateway_store.errors import MissingExtraError, needs_extra
from agent_gateway_store.results.cells import Column, Kind, as_dict

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow as pa

_INT64 = range(-(2**63), 2**63)


def arrow(feature: str = "to_arrow()") -> Any:
    """Return the module `pyarrow`.

    Raises:
        MissingExtraError: It is not installed.
    """
    with needs_extra(feature, extra="notebook"):
        import pyarrow
    return pyarrow


def arrow_schema(columns: tuple[Column, ...]) -> pa.Schema:
    """Return the Arrow schema of columns.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    pa = arrow()
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


def text_schema(columns: tuple[Column, ...]) -> pa.Schema:
    """Return the schema of columns whose categories are still text, as values come in; `conform` makes them such."""
    return arrow_schema(tuple(Column(each.name, "text") if each.kind == "category" else each for each in columns))


def conform(table: pa.Table, columns: tuple[Column, ...]) -> pa.Table:
    """Return `table` with exactly these columns, in this order and of these types.

    Every chunk of a category column gets the same dictionary: all values that it can have, in their order.

    Raises:
        KeyError: A column is missing.
        pyarrow.ArrowInvalid: A value does not fit its type.
    """
    pa = arrow()
    schema = arrow_schema(columns)
    arrays = [_conformed(table.column(column.name), column, schema.field(column.name).type) for column in columns]
    return pa.Table.from_arrays(arrays, schema=schema)


def to_table(records: Sequence[Any], columns: tuple[Column, ...] | None) -> pa.Table:
    """Return records as an Arrow table.

    Args:
        records: Models or dicts.
        columns: Its columns; None: those of the rows. A column whose values have several kinds is text.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    pa = arrow()
    if columns is None:
        records = [as_dict(item) for item in records]
        columns = _guessed(records)
    schema = text_schema(columns)
    arrays = [
        pa.array([_value(_get(item, column.name), column.kind) for item in records], field.type)
        for column, field in zip(columns, schema, strict=True)
    ]
    return conform(pa.Table.from_arrays(arrays, schema=schema), columns)


def pandas_converter() -> Callable[[pa.Table], pandas.DataFrame]:
    """Return what makes a pandas DataFrame of an Arrow table; integers and booleans with gaps keep their type.

    Raises:
        MissingExtraError: pandas or pyarrow is not installed.
    """
    _require("pandas", extra="notebook")
    return _as_pandas


def polars_converter() -> Callable[[pa.Table], polars.DataFrame]:
    """Return what makes a Polars DataFrame of an Arrow table.

    Raises:
        MissingExtraError: polars or pyarrow is not installed.
    """
    _require("polars", extra="polars")
    return _as_polars


def _require(library: str, *, extra: str) -> None:
    # Not by importing them: that takes a second of the event loop, where a converter is called in a thread.
    if find_spec(library) is None or find_spec("pyarrow") is None:
        raise MissingExtraError(f"to_{library}()", extra=extra)


def _as_pandas(table: pa.Table) -> pandas.DataFrame:
    import pandas

    pa = arrow()
    frame: pandas.DataFrame = table.to_pandas()
    # Arrow makes floats and objects of them, which round ids above 2**53 and compare unlike booleans.
    gaps = {pa.int64(): "Int64", pa.bool_(): "boolean"}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count and column.type in gaps:
            frame[name] = pandas.array(column.to_pylist(), dtype=gaps[column.type])
    return frame


def _as_polars(table: pa.Table) -> polars.DataFrame:
    import polars

    return polars.DataFrame(table)


def _conformed(array: pa.ChunkedArray, column: Column, target: pa.DataType) -> pa.ChunkedArray:
    pa = arrow()
    if column.kind != "category" or not column.categories:
        return array.cast(target) if array.type != target else array
    import pyarrow.compute as pc

    # The chunks of a result have dictionaries of their own: for each, its words are numbered by the one of the column.
    words = pa.array(column.categories, pa.string())

    def numbered(values: Any) -> Any:
        indices = pc.index_in(values, value_set=words)
        if indices.null_count != values.null_count:
            raise pa.ArrowInvalid(f"{column.name} holds a value that is not one of {', '.join(column.categories)}")
        return indices

    chunks = []
    for chunk in array.chunks:
        if pa.types.is_dictionary(chunk.type):
            indices = numbered(chunk.dictionary.cast(pa.string())).take(chunk.indices)
        else:
            indices = numbered(chunk.cast(pa.string()))
        chunks.append(pa.DictionaryArray.from_arrays(indices.cast(pa.int32()), words))
    return pa.chunked_array(chunks, type=target)


def _get(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, dict) else getattr(item, name, None)


def _value(value: Any, kind: Kind) -> Any:
    if value is None:
        return None
    match kind:
        case "json":
            return _text(json.dumps(value, default=_json, ensure_ascii=False))
        case "time":
            moment = datetime.fromisoformat(value) if isinstance(value, str) else value
            return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        case "text" | "category":
            return _text(str(value.value if isinstance(value, Enum) else value))
        case "integer":
            return int(value)
        case "number":
            return float(value)
    return bool(value)


def _text(value: str) -> str:
    # Lone surrogates, which Arrow cannot hold, become visible escapes.
    return value.encode("utf-8", "backslashreplace").decode()


def _json(value: Any) -> Any:
    return as_dict(value) if isinstance(value, BaseModel) else str(value)


def _guessed(rows: Iterable[dict[str, Any]]) -> tuple[Column, ...]:
    kinds: dict[str, set[Kind]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(str(name), set()).update([] if value is None else [_kind(value)])
    return tuple(
        Column(name, "number" if found == {"integer", "number"} else found.pop() if len(found) == 1 else "text")
        for name, found in kinds.items()
    )


def _kind(value: Any) -> Kind:
    match value:
        case bool():
            return "boolean"
        case int():
            return "integer" if value in _INT64 else "text"
        case float():
            return "number"
        case datetime():
            return "time"
        case dict() | list() | tuple():
            return "json"
    return "text"
