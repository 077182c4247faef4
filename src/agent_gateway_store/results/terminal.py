"""A page and one record as tables of rich, in which control bytes are shown and have no effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table
from rich.text import Text

from agent_gateway_store import _text
from agent_gateway_store.results import cells

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, ConsoleOptions, RenderResult

# Characters. A word or two: a text that is broken into shorter pieces cannot be read.
_LEAST_WIDTH = 8
# Columns that the border and the padding of a column take, and the border at the end.
_BORDER, _LAST_BORDER = 3, 1


def table(
    columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, count: int, whole: str = cells.WHOLE
) -> FittingTable:
    """Return a table, and a caption that says how many rows there are, and whether values are cut.

    A terminal that is too narrow for it shows a block of lines for each row.

    Args:
        columns: Their names, in order.
        rows: Those to show, as `table_rows` returns them.
        count: How many rows there are.
        whole: What shows a cut value whole.
    """
    drawn = FittingTable()
    for name in columns:
        values = [row[name] for row in rows if row.get(name) is not None]
        is_numeric = bool(values) and all(map(cells.is_number, values))
        is_whole = any(isinstance(value, datetime | bool | Enum) or cells.tone_of(name, value) for value in values)
        drawn.add_column(
            Text(cells.cell(name)),
            overflow="fold",
            justify="right" if is_numeric else "left",
            no_wrap=is_numeric or is_whole,
        )
    is_cut = False
    for row in rows:
        shown = [_styled(name, row.get(name)) for name in columns]
        is_cut = is_cut or any(text.plain.endswith("…") for text in shown)
        drawn.add_row(*shown)
    drawn.caption = cells.caption(count, is_cut=is_cut, whole=whole)
    return drawn


def card(record: BaseModel) -> Table:
    """Return one record: a line for each field that is set."""
    drawn = Table(title=Text(type(record).__name__), show_header=False)
    drawn.add_column(style="dim")
    drawn.add_column(overflow="fold")
    for name, value in cells.fields_of(record).items():
        if value is None or value in ("", [], {}):
            continue
        if isinstance(value, dict | list):
            if cells.is_call(name, value) and _text.is_cut(value):
                drawn.add_row(Text(""), Text(_text.CUT_CALL, style=cells.RICH["bad"]))
            drawn.add_row(Text(name), Text(_text.json_text(value, indent=2)))
        else:
            drawn.add_row(Text(name), Text(_text.escape(value)) if type(value) is str else _styled(name, value))
    return drawn


def _styled(name: str, value: Any) -> Text:
    tone = cells.tone_of(name, value)
    if cells.is_call(name, value):
        name = _text.call_name(value["server"], value["tool"])
        text = cells.cell(_text.Shown(f"{name} {cells.summary(value['arguments'])}".rstrip()))
        if _text.is_cut(value):
            text = _text.Shown(f"{_text.CUT_CALL} {text}")
    elif (votes := cells.votes_text(name, value)) is not None:
        text = cells.cell(votes)
    else:
        text = cells.summary(value) if isinstance(value, dict) else cells.cell(value)
    return Text(text, style=cells.RICH[tone] if tone else "")


class FittingTable(Table):
    """A table where it fits; else a line for each value of a row, and an empty line after each row."""

    def fits(self, width: int) -> bool:
        """Return True if it can be read in this many columns."""
        return sum(map(_least_width, self.columns)) + _LAST_BORDER <= width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.fits(options.max_width):
            yield from super().__rich_console__(console, options)
            return
        blocks = Table.grid(padding=(0, 2))
        blocks.add_column(style="dim", no_wrap=True)
        blocks.add_column(overflow="fold")
        for row in zip(*(column.cells for column in self.columns), strict=True):
            for column, cell in zip(self.columns, row, strict=True):
                blocks.add_row(column.header, cell)
            blocks.add_row()
        yield blocks
        yield Text(str(self.caption or ""), style="table.caption")


def _least_width(column: Column) -> int:
    longest = max((cell.cell_len for cell in column.cells if isinstance(cell, Text)), default=0)
    heading = column.header.cell_len if isinstance(column.header, Text) else 0
    return max(longest if column.no_wrap else min(longest, _LEAST_WIDTH), min(heading, _LEAST_WIDTH)) + _BORDER
