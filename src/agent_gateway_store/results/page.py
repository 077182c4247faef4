"""`Page`: a list of records that renders and converts, and `Stats`: what an aggregation returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, TypeVar, get_args, overload

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from agent_gateway_store.results import arrow, html
from agent_gateway_store.results.cells import Column, as_dict, columns_of, table_rows

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow as pa
    from rich.table import Table

T = TypeVar("T")

METRICS = (
    Column("calls", "integer"),
    Column("denials", "integer"),
    Column("approvals", "integer"),
    Column("errors", "integer"),
    Column("latency_p50_ms", "number"),
    Column("latency_p95_ms", "number"),
    Column("latency_p99_ms", "number"),
)

# Groups that are numbers.
_NUMBERS = ("hour_of_day", "weekday")


class Page(list[T]):
    """A list of records, newest first where time orders them. A slice of it is a `Page`.

    A notebook shows it as a table, and so does a terminal with rich; `repr` is that of a list. As a type of Pydantic
    and FastAPI, `Page[AuditEvent]`, it is the object `{"items": [...], "next_cursor": ...}`.

    Attributes:
        next_cursor: Opaque; pass it to the same listing for the next page. None at the end.
        columns: Names of the fields that a table shows, in order; None: all of them.
        record_type: Class of the records, which an empty page has no other way to know; None: that of the records.
    """

    def __init__(
        self,
        items: Iterable[T] = (),
        *,
        next_cursor: str | None = None,
        columns: tuple[str, ...] | None = None,
        record_type: type[BaseModel] | None = None,
    ) -> None:
        super().__init__(items)
        self.next_cursor = next_cursor
        self.columns = columns
        self.record_type = record_type

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> T: ...
    @overload
    def __getitem__(self, index: slice, /) -> Self: ...
    def __getitem__(self, index: SupportsIndex | slice, /) -> T | Self:
        if isinstance(index, slice):
            return self._of(super().__getitem__(index))
        return super().__getitem__(index)

    def _of(self, items: Iterable[T]) -> Self:
        return type(self)(items, columns=self.columns, record_type=self.record_type)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        (item,) = get_args(source) or (Any,)
        field = core_schema.typed_dict_field
        items = field(core_schema.list_schema(handler.generate_schema(item)))
        cursor = core_schema.nullable_schema(core_schema.str_schema())
        maybe_cursor = field(core_schema.with_default_schema(cursor, default=None), required=False)
        sent = core_schema.typed_dict_schema({"items": items, "next_cursor": field(cursor)})
        given = core_schema.typed_dict_schema({"items": items, "next_cursor": maybe_cursor}, extra_behavior="forbid")

        def validate(value: Any, check: core_schema.ValidatorFunctionWrapHandler) -> Any:
            if isinstance(value, list):
                found = check({"items": list(value), "next_cursor": getattr(value, "next_cursor", None)})
            else:
                found = check(value)
            page = value._of(found["items"]) if isinstance(value, cls) else cls(found["items"])
            page.next_cursor = found["next_cursor"]
            return page

        return core_schema.no_info_wrap_validator_function(
            validate,
            given,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda page: {"items": list(page), "next_cursor": page.next_cursor}, return_schema=sent
            ),
        )

    def frame_columns(self) -> tuple[Column, ...] | None:
        """Return the columns of its frame; None if they follow from the rows."""
        kinds = {self.record_type} if self.record_type else set(map(type, self))
        if len(kinds) == 1 and issubclass(kind := kinds.pop(), BaseModel):
            return columns_of(kind)
        return None

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the records as plain dicts of JSON values; no secret is among them."""
        return [as_dict(item) for item in self]

    def to_arrow(self) -> pa.Table:
        """Return an Arrow table; an empty page has the same columns and types.

        Times are `timestamp[us, UTC]`, enums dictionaries of their values, ids and JSON text.

        Raises:
            MissingExtraError: pyarrow is not installed.
        """
        return arrow.to_table(self, self.frame_columns())

    def to_pandas(self) -> pandas.DataFrame:
        """Return a pandas DataFrame: aware times, categories for enums, `Int64` where a whole number is missing.

        Raises:
            MissingExtraError: pandas or pyarrow is not installed.
        """
        return arrow.pandas_converter()(self.to_arrow())

    def to_polars(self) -> polars.DataFrame:
        """Return a Polars DataFrame: aware times, `Categorical` for enums.

        Raises:
            MissingExtraError: polars or pyarrow is not installed.
        """
        return arrow.polars_converter()(self.to_arrow())

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self.to_arrow().__arrow_c_stream__(requested_schema)

    def _repr_html_(self) -> str:
        return html.table_html(*self._table(), count=len(self), has_more=bool(self.next_cursor))

    def __rich__(self) -> Table:
        # Deferred: a gateway that shows nothing must not load rich.
        from agent_gateway_store.results.terminal import table

        return table(*self._table(), count=len(self))

    def _table(self) -> tuple[list[str], list[dict[str, Any]]]:
        names = self.columns
        if names is None and (known := self.frame_columns()):
            names = tuple(column.name for column in known)
        return table_rows(self, names)


class Stats(Page[dict[str, Any]]):
    """Counts and percentiles, a row for each group: the group's columns, then the metrics.

    Attributes:
        by: Names of the columns that were grouped by; the time bucket is not among them.
        bucket: Length of a time bucket; None: not grouped by time. Rows then have `bucket`, its start, in UTC or in
            the time zone that was asked for.
        metrics: Columns of the counts and percentiles.
    """

    def __init__(
        self,
        items: Iterable[Mapping[str, Any]] = (),
        *,
        by: str | Iterable[str] = (),
        bucket: timedelta | None = None,
        metrics: tuple[Column, ...] = METRICS,
        next_cursor: str | None = None,
    ) -> None:
        self.metrics = metrics
        self.by = (by,) if isinstance(by, str) else tuple(by)
        self.bucket = bucket
        super().__init__(map(dict, items), next_cursor=next_cursor, columns=tuple(c.name for c in self.frame_columns()))

    def frame_columns(self) -> tuple[Column, ...]:
        """Return the columns of its frame."""
        start = () if self.bucket is None else (Column("bucket", "time"),)
        groups = (Column(name, "integer" if name in _NUMBERS else "category") for name in self.by)
        return (*start, *groups, *self.metrics)

    def _of(self, items: Iterable[dict[str, Any]]) -> Self:
        return type(self)(items, by=self.by, bucket=self.bucket, metrics=self.metrics)
