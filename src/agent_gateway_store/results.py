"""`Page`: what every listing returns. A list that renders in a notebook and in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Page"]

T = TypeVar("T")
_SHOWN = 200
_CELL_CHARS = 120
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    code: f"\\u{code:04x}"
    for code in (0x61C, *range(0x200E, 0x2010), *range(0x2028, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
}


class Page(list[T]):
    """A list of records, newest first where time orders them.

    Attributes:
        next_cursor: Opaque; hand it to the same listing to get the next page. None at the end.
        columns: Names of the fields that a table shows, in order.
    """

    def __init__(
        self, items: Iterable[T] = (), *, next_cursor: str | None = None, columns: tuple[str, ...] | None = None
    ) -> None:
        super().__init__(items)
        self.next_cursor = next_cursor
        self.columns = columns

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the records as plain dicts of JSON values; no secret is among them."""
        return [_as_dict(item) for item in self]

    def _table_rows(self) -> tuple[tuple[str, ...], list[list[str]]]:
        rows = [_as_dict(item) for item in self[:_SHOWN]]
        columns = self.columns or tuple(dict.fromkeys(name for row in rows for name in row))
        return tuple(map(_cell, columns)), [[_cell(row.get(name)) for name in columns] for row in rows]

    def _note(self) -> str:
        if len(self) > _SHOWN:
            return f"first {_SHOWN} of {len(self)} rows"
        return f"{len(self)} row{'' if len(self) == 1 else 's'}"

    def _repr_html_(self) -> str:
        columns, rows = self._table_rows()
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{escape(self._note())}</p>"

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        columns, rows = self._table_rows()
        table = Table(caption=self._note())
        for name in columns:
            table.add_column(Text(name), overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        return table


def _as_dict(item: Any) -> dict[str, Any]:
    if isinstance(item, dict):
        return dict(item)
    hidden = {name for name, field in type(item).model_fields.items() if not field.repr}
    return dict(item.model_dump(mode="json", exclude=hidden))


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    if len(text) > _CELL_CHARS:
        text = f"{text[: _CELL_CHARS - 1]}…"
    return text.translate(_CONTROL)
