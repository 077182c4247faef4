"""A record as columns and values, a value as the text of one cell, and which words of a record are badges.

All of it follows from the annotations of the record's class, so that this module needs no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, IntEnum, StrEnum
from functools import cache
from itertools import islice
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from uuid import UUID

from pydantic import BaseModel, SecretStr
from pydantic_core import to_jsonable_python

from agent_gateway_store import _text

# Rows that a view shows: more are not read, and each takes about a kilobyte of the notebook's file.
MAX_ROWS = 200
# Characters of one cell, so that a text takes three or four lines of a column; and of JSON that is folded away.
_CELL_CHARS = 120
# What shows everything of a page.
WHOLE = ".to_dicts()"
_SUMMARY_CHARS = 48
Kind = Literal["text", "category", "time", "integer", "number", "boolean", "json"]
# The first that matches counts: a bool is an int to Python, and an enum of ours is an int or a str.
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
Tone = Literal["good", "bad", "wait", "info", "off"]
_BADGES = frozenset({"decision", "execution_status", "output_decision", "status"})
_WORDS: dict[Tone, tuple[str, ...]] = {
    "good": ("ALLOW", "APPROVED", "APPROVED_OUTPUT_RELEASE", "DELIVERED", "SUCCESS"),
    "bad": ("DEAD", "DENIED", "DENY", "TOOL_ERROR"),
    "wait": ("APPROVAL_REQUIRED", "DUE", "PENDING", "TIMEOUT"),
    "info": ("REDACT", "SANITIZE_AND_ALLOW", "USED"),
    "off": ("CANCELLED", "EXPIRED"),
}
_TONES = {word: tone for tone, words in _WORDS.items() for word in words}
RICH: dict[Tone, str] = {"good": "green", "bad": "bold red", "wait": "yellow", "info": "blue", "off": "dim"}
# As text they have a contrast of 3 or more (WCAG 2.2, 1.4.11) on white and on the grey of dark themes, and as
# areas of a plot they differ clearly.
HEX: dict[Tone, str] = {"good": "#2e9e5b", "bad": "#d6424a", "wait": "#d9900a", "info": "#3d7fd9", "off": "#848d97"}


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
    """Return the columns of a record: its fields in their order, without those that its repr hides.

    Behind them come the properties that its class names in `shown_with`, as JSON.
    """
    fields = (
        _column(name, field.annotation)
        for name, field in record_type.model_fields.items()
        if field.repr and _bare_type(field.annotation) is not SecretStr
    )
    return (*fields, *(Column(name, "json") for name in getattr(record_type, "shown_with", ())))


def as_dict(item: Any) -> dict[str, Any]:
    """Return a record as JSON values, without the fields that its repr, or that of a model inside it, hides."""
    if not isinstance(item, BaseModel):
        return dict(item) if isinstance(item, Mapping) else {"value": item}
    found = item.model_dump(mode="json", exclude=_hidden(type(item)))
    # What a record leaves out of its JSON for other reasons than secrecy is shown to who reads the store.
    names = [column.name for column in columns_of(type(item)) if column.name in item.__dict__]
    return {name: found[name] if name in found else to_jsonable_python(getattr(item, name)) for name in names}


def fields_of(item: Any) -> dict[str, Any]:
    """Return a record's fields unchanged; hidden fields are left out, models inside it are dicts."""
    if not isinstance(item, BaseModel):
        return dict(item) if isinstance(item, Mapping) else {"value": item}
    values = {column.name: getattr(item, column.name, None) for column in columns_of(type(item))}
    return {name: _plain(value) for name, value in values.items()}


def table_rows(items: Iterable[Any], names: Iterable[str] | None = None) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the names of the columns that a table shows, and its rows: at most 200.

    Args:
        items: Records or dicts.
        names: Of the columns; None: those of the rows.
    """
    rows = [fields_of(item) for item in islice(items, MAX_ROWS)]
    if names is None:
        names = dict.fromkeys(name for row in rows for name in row)
    return list(names), rows


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
    # Cut before escaping, which takes long for a long text and never makes one shorter. What is escaped already stays,
    # or an escape would be cut in half and then escaped again.
    shown = _text.escape(text if isinstance(text, _text.Shown) else text[: _CELL_CHARS + 1])
    return _text.Shown(f"{shown[: _CELL_CHARS - 1]}…") if len(shown) > _CELL_CHARS else shown


def summary(value: Any) -> _text.Shown:
    """Return JSON as one short line: an object as `name=value`, a list as its length."""
    if isinstance(value, dict):
        text = _text.arguments_text(value)
    else:
        text = _text.Shown(f"{len(value)} item{'' if len(value) == 1 else 's'}")
    return text if len(text) <= _SUMMARY_CHARS else _text.Shown(f"{text[:_SUMMARY_CHARS]}…")


def is_number(value: Any) -> bool:
    """Return True for a value that is shown as a number: neither a bool nor a member of an enum."""
    return isinstance(value, int | float) and not isinstance(value, bool | Enum)


def is_call(field: str, value: Any) -> bool:
    """Return True for a tool call, as `fields_of` gives it."""
    return field == "tool_call" and isinstance(value, dict) and value.keys() >= {"server", "tool", "arguments"}


def votes_text(field: str, value: Any) -> str | None:
    """Return who voted what and where, for the votes of an approval, as `fields_of` gives them; else None."""
    if field != "votes" or not isinstance(value, list):
        return None
    return ", ".join(f"{vote['approver_id']} {vote['decision']} ({vote['channel']})" for vote in value)


def caption(count: int, *, is_cut: bool, whole: str = WHOLE) -> str:
    """Return the line below a table: how many rows there are, what of them is not shown, and what shows it."""
    rows = f"first {MAX_ROWS} of {count} rows" if count > MAX_ROWS else f"{count} row{'' if count == 1 else 's'}"
    if count > MAX_ROWS or is_cut:
        return f"{rows}; {'… marks what is cut; ' if is_cut else ''}{whole} has everything"
    return rows


def tone_of(field: str, value: Any) -> Tone | None:
    """Return the tone of a word in this field; None if it is not a badge."""
    return _TONES.get(str(value)) if field.lower() in _BADGES else None


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return as_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


@cache
def _hidden(cls: type[BaseModel]) -> dict[str, Any]:
    """Return the `exclude` of `model_dump`: the hidden fields, of models inside this one too."""
    shown = {column.name for column in columns_of(cls)}
    found: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        kind = _bare_type(field.annotation)
        inner = [each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, BaseModel)]
        if name not in shown:
            found[name] = True
        elif inner and (below := _hidden(inner[0])):
            found[name] = below if inner[0] is kind else {"__all__": below}
    return found


def _column(name: str, annotation: Any) -> Column:
    found = _bare_type(annotation)
    if isinstance(found, type):
        for type_, kind in _KINDS:
            if issubclass(found, type_):
                words = tuple(str(member.value) for member in found) if issubclass(found, StrEnum) else ()
                return Column(name, kind, words)
    return Column(name, "json")


def _bare_type(annotation: Any) -> Any:
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
