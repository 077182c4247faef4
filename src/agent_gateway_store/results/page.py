"""`Page`: a list of records that renders and converts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, TypeVar, overload

from pydantic import BaseModel

from agent_gateway_store.results.frames import Column, columns_of

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow as pa
    from rich.table import Table

__all__ = ["Page"]

T = TypeVar("T")


class Page(list[T]):
    """A list of records, newest first where time orders them. A slice of it is a `Page`.

    A notebook shows it as a table, a terminal that knows rich does too; `repr` is that of a list.

    Attributes:
        next_cursor: Opaque; hand it to the same listing to get the next page. None at the end.
        columns: Names of the fields that a table shows, in order; None: all of them.
        record_type: Class of the records, which an empty page cannot know otherwise; None: that of the first record.
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

    def frame_columns(self) -> tuple[Column, ...] | None:
        """Return the columns of its frame; None if they must be read off the rows."""
        kinds = {self.record_type} if self.record_type else set(map(type, self))
        if len(kinds) == 1 and issubclass(kind := kinds.pop(), BaseModel):
            return columns_of(kind)
        return None

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the records as plain dicts of JSON values; no secret is among them."""
        from agent_gateway_store.results.cells import as_dict

        return [as_dict(item) for item in self]

    def to_arrow(self) -> pa.Table:
        """Return an Arrow table; an empty page has the same columns and types.

        Times are `timestamp[us, UTC]`, enums dictionaries of their values, ids and JSON text.

        Raises:
            MissingExtraError: pyarrow is not installed.
        """
        from agent_gateway_store.results.convert import to_table

        return to_table(self, self.frame_columns())

    def to_pandas(self) -> pandas.DataFrame:
        """Return a pandas DataFrame: aware times, categories for enums, `Int64` where a whole number is missing.

        Raises:
            MissingExtraError: pandas or pyarrow is not installed.
        """
        from agent_gateway_store.results.convert import as_pandas

        return as_pandas(self.to_arrow())

    def to_polars(self) -> polars.DataFrame:
        """Return a Polars DataFrame: aware times, `Categorical` for enums.

        Raises:
            MissingExtraError: polars or pyarrow is not installed.
        """
        from agent_gateway_store.results.convert import as_polars

        return as_polars(self.to_arrow())

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self.to_arrow().__arrow_c_stream__(requested_schema)

    def _repr_html_(self) -> str:
        from agent_gateway_store.results.html import table_html

        return table_html(self)

    def __rich__(self) -> Table:
        from agent_gateway_store.results.terminal import table

        return table(self)
