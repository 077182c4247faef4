"""What commands print: tables and fields for people, JSON for programs. No control byte of the data reaches a terminal.

Standard output holds the result alone; everything else goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent_gateway_store._text import Shown, arguments_text, call_name, escape, word

if TYPE_CHECKING:
    from rich.console import Console

    from agent_gateway_store.results import Page
    from agent_gateway_store.results.terminal import FittingTable

# Columns. Rich takes 80 for a file or a pipe, which breaks a row with two ids; 240 holds our widest table.
_PIPE_WIDTH = 240
# Columns. Chosen: our longest words fit. What is narrower has no room for a value beside its name, and shows none.
_LEAST_WIDTH = 20
# Columns, more than any table has: to measure how wide a table would be if it had the room.
_ANY_WIDTH = 100_000
# Characters. A UUID has 36; anything longer is broken over lines rather than push the other columns out.
_LONGEST_WHOLE = 40
_TIMES = frozenset(
    {"timestamp", "created_at", "expires_at", "use_before", "decision_at", "decided_at", "used_at", "last_used_at"}
    | {"revoked_at", "previous_key_expires_at", "previous_valid_until"}
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def say(text: str) -> None:
    """Print one line on standard output."""
    typer.echo(escape(text))


def complain(text: str, *, lines: bool = False) -> None:
    """Print on standard error: one line, or several."""
    typer.echo("\n".join(map(escape, text.splitlines())) if lines else escape(text), err=True)


def console(*, at_most: int | None = None) -> Console:
    """Return the terminal; it follows NO_COLOR and COLUMNS. A file or a pipe has room for long rows."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else _PIPE_WIDTH
    found = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, width=width)
    found.width = max(min(found.width, at_most or found.width), _LEAST_WIDTH)
    return found


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON in printable ASCII."""
    text = json.dumps(value, indent=indent, default=str, allow_nan=False)
    # DEL is a control character that JSON allows as it is, and `json` writes as it is.
    return text.replace("\x7f", "\\u007f")


def print_json(value: Any) -> None:
    """Print one JSON document."""
    typer.echo(to_json(value, indent=2))


def print_result(value: Any, text: str, *, as_json: bool) -> None:
    """Print what a command did: JSON for programs, or one line for people."""
    if as_json:
        print_json(value)
    else:
        say(text)


def to_dict(item: Any) -> dict[str, Any]:
    """Return a model as a dict of JSON values without its secrets."""
    from agent_gateway_store.results.cells import as_dict

    return as_dict(item)


def print_page(
    page: Page[Any],
    *,
    columns: Mapping[str, str],
    whole: Container[str] = (),
    optional: Container[str] = (),
    as_json: bool,
) -> None:
    """Print a listing: as a table, or with every field as `{"items": [...], "next_cursor": ...}`.

    `columns` gives each field its heading; those of `whole` are not broken over lines, and those of `optional` are left
    out on a narrow terminal.
    """
    items = page.to_dicts()
    if as_json:
        print_json({"items": items, "next_cursor": page.next_cursor})
        return
    terminal = console()
    table = _table(items, columns, whole)
    if optional and terminal.measure(table, options=terminal.options.update(width=_ANY_WIDTH)).maximum > terminal.width:
        shorter = _table(items, {field: name for field, name in columns.items() if field not in optional}, whole)
        if shorter.fits(terminal.width):
            table = shorter
            left_out = [heading for field, heading in columns.items() if field in optional]
            complain(f"Left out for want of width: {', '.join(left_out)}; --json has everything.")
    terminal.print(table)
    if page.next_cursor:
        complain(f"There is more: --cursor {page.next_cursor}")


def _table(items: list[dict[str, Any]], columns: Mapping[str, str], whole: Container[str]) -> FittingTable:
    from agent_gateway_store.results import terminal
    from agent_gateway_store.results.cells import MAX_ROWS

    rows = [
        {heading: field_text(field, item.get(field)) for field, heading in columns.items()} for item in items[:MAX_ROWS]
    ]
    drawn = terminal.table(tuple(columns.values()), rows, count=len(items), whole="--json")
    for field, column in zip(columns, drawn.columns, strict=True):
        longest = max((len(row[columns[field]]) for row in rows), default=0)
        column.no_wrap = field in whole and longest <= _LONGEST_WHOLE
    return drawn


def print_fields(fields: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
    """Print names and values, a line each."""
    items = fields.items() if isinstance(fields, Mapping) else fields
    pairs = [(escape(name), field_text(name, value)) for name, value in items]
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        say(Shown(f"{name:<{width}}  {value}".rstrip()))


def field_text(name: str, value: Any) -> Shown:
    """Return a field as people read it: times to the second, lists and tool calls as text."""
    if value is None:
        return Shown("")
    if name == "trust_level":
        from agent_gateway_store.models.keys import TrustLevel

        return Shown(TrustLevel(value).name)
    if name == "tool_call":
        name = call_name(value["server"], value["tool"])
        return Shown(f"{name} {arguments_text(value['arguments'])}".rstrip())
    if isinstance(value, str) and name in _TIMES:
        return escape(value[:19].replace("T", " "))
    if name == "votes":
        return Shown(
            ", ".join(f"{word(vote['approver_id'])} {vote['decision']} ({word(vote['channel'])})" for vote in value)
        )
    if isinstance(value, bool):
        return Shown("yes" if value else "no")
    if isinstance(value, dict):
        return arguments_text(value)
    if isinstance(value, list | tuple):
        return Shown(", ".join(map(word, value)))
    return escape(str(value))
