"""A table of rich that a narrow terminal shows as a block of lines for each row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

# Characters. A word or two: a text that is broken into shorter pieces cannot be read.
_LEAST_WIDTH = 8
# Columns that the border and the padding of a column take, and the border at the end.
_BORDER, _LAST_BORDER = 3, 1


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
