"""A page and one record as tables of rich, in which control bytes are shown and have no effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any

from agent_gateway_store import _text
from agent_gateway_store.results import cells

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.table import Table
    from rich.text import Text

    from agent_gateway_store.results.fitting import FittingTable


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
    from rich.text import Text

    from agent_gateway_store.results.fitting import FittingTable

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
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(type(record).__name__), show_header=False)
    drawn.add_column(style="dim")
    drawn.add_column(overflow="fold")
    for name, value in cells.fields_of(record).items():
        if value is None or value in ("", [], {}):
            continue
        if isinstance(value, dict | list):
            drawn.add_row(Text(name), Text(_text.json_text(value, indent=2)))
        else:
            drawn.add_row(Text(name), Text(_text.escape(value)) if type(value) is str else _styled(name, value))
    return drawn


def _styled(name: str, value: Any) -> Text:
    from rich.text import Text

    tone = cells.tone_of(name, value)
    if cells.is_call(name, value):
        name = _text.call_name(value["server"], value["tool"])
        text = cells.cell(_text.Shown(f"{name} {cells.summary(value['arguments'])}".rstrip()))
    elif (votes := cells.votes_text(name, value)) is not None:
        text = cells.cell(votes)
    else:
        text = cells.summary(value) if isinstance(value, dict) else cells.cell(value)
    return Text(text, style=cells.RICH[tone] if tone else "")
