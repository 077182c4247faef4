"""A record as a dict, its fields as they are shown, and a value as the text of one cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import Enum, IntEnum
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

from agent_gateway_store import _text
from agent_gateway_store.results.frames import bare_type, columns_of

if TYPE_CHECKING:
    from agent_gateway_store.results.page import Page

__all__ = [
    "SHOWN",
    "as_dict",
    "caption",
    "cell",
    "fields_of",
    "is_call",
    "is_number",
    "shown",
    "summary",
    "time_text",
]

SHOWN = 200
_CELL_CHARS = 120
_SUMMARY_CHARS = 48


def as_dict(item: Any) -> dict[str, Any]:
    """Return a record as JSON values without what its repr, or that of a model inside it, hides."""
    if not isinstance(item, BaseModel):
        return dict(item) if isinstance(item, Mapping) else {"value": item}
    return item.model_dump(mode="json", exclude=_hidden(type(item)))


def fields_of(item: Any) -> dict[str, Any]:
    """Return a record's fields as they are; hidden ones are left out, models inside it are dicts."""
    if not isinstance(item, BaseModel):
        return dict(item) if isinstance(item, Mapping) else {"value": item}
    values = {column.name: getattr(item, column.name, None) for column in columns_of(type(item))}
    return {name: _plain(value) for name, value in values.items()}


def shown(page: Page[Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the names of the columns that a table shows, and its rows: at most 200."""
    rows = [fields_of(item) for item in list.__getitem__(page, slice(SHOWN))]
    if page.columns is not None:
        return list(page.columns), rows
    known = page.frame_columns()
    names: Iterable[str] = (column.name for column in known) if known else (name for row in rows for name in row)
    return list(dict.fromkeys(names)), rows


def time_text(value: datetime) -> str:
    """Return an instant in UTC, to the second."""
    utc = value if value.tzinfo is None else value.astimezone(UTC)
    return utc.replace(tzinfo=None, microsecond=0).isoformat(sep=" ")


def cell(value: Any) -> _text.Shown:
    """Return a value as one short line: None is empty, a time is in UTC to the second, JSON is compact."""
    if value is None:
        return _text.Shown("")
    if isinstance(value, datetime):
        text: str = time_text(value)
    elif isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        text = _text.Shown(", ".join(map(_text.word, value)))
    elif isinstance(value, dict | list | tuple):
        text = _text.json_text(value)
    elif isinstance(value, IntEnum):
        text = value.name
    elif isinstance(value, float):
        text = f"{value:.6g}"
    else:
        text = value if isinstance(value, str) else str(value)
    shown = _text.escape(text)
    return _text.Shown(f"{shown[: _CELL_CHARS - 1]}…") if len(shown) > _CELL_CHARS else shown


def summary(value: Any) -> _text.Shown:
    """Return JSON as one short line: an object as `name=value`, a list as its length."""
    if isinstance(value, dict):
        text = _text.arguments_text(value)
    else:
        text = _text.Shown(f"{len(value)} item{'' if len(value) == 1 else 's'}")
    return text if len(text) <= _SUMMARY_CHARS else _text.Shown(f"{text[:_SUMMARY_CHARS]}…")


def is_number(value: Any) -> bool:
    """Return True for what is shown as a number: neither a truth value nor a word of an enum."""
    return isinstance(value, int | float) and not isinstance(value, bool | Enum)


def is_call(field: str, value: Any) -> bool:
    """Return True for a tool call, as `fields_of` gives it."""
    return field == "tool_call" and isinstance(value, dict) and value.keys() >= {"server", "tool", "arguments"}


def caption(count: int) -> str:
    """Return the line below a table: how many rows there are, and how many of them it shows."""
    return f"first {SHOWN} of {count} rows" if count > SHOWN else f"{count} row{'' if count == 1 else 's'}"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return as_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


@cache
def _hidden(cls: type[BaseModel]) -> dict[str, Any]:
    """What `model_dump` must leave out, models inside this one included."""
    found: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        kind = bare_type(field.annotation)
        inner = [each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, BaseModel)]
        if name not in {column.name for column in columns_of(cls)}:
            found[name] = True
        elif inner and (below := _hidden(inner[0])):
            found[name] = below if inner[0] is kind else {"__all__": below}
    return found
