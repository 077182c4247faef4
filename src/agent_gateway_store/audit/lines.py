"""Rows of the audit log as lines of JSON or CSV, made without an object for each event."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from operator import add
from typing import Any

from agent_gateway_store.audit.selects import FIELDS, JSON_FIELDS

__all__ = ["csv_head", "csv_line", "defused", "json_line"]

_quoted = json.encoder.encode_basestring
_JSON = tuple(map(FIELDS.index, JSON_FIELDS))
_TIMESTAMP = FIELDS.index("timestamp")

# What a spreadsheet takes for the beginning of a formula (the list of OWASP's "CSV Injection", with the full-width
# signs that some fold), also behind blanks. It begins a cell at the beginning of ours; and inside of it, behind a line
# end, a tab or a semicolon, where it minds no quotes since its list separator is another one (in much of Europe `;`).
_BLANKS = r"\s\x00-\x20\u00ad\u180e\u200b-\u200f\u2060\ufeff"
_SIGNS = r"[=+\-@\uff1d\uff0b\uff0d\uff20]"
_FIRST = re.compile(rf"\A(?=[\t\r\n]|[{_BLANKS}]*{_SIGNS})")
# Possessive, and only from the beginning of a run: otherwise a long run without a sign takes quadratic time.
_LATER = re.compile(rf'(?<![{_BLANKS}";])[{_BLANKS}";]++(?={_SIGNS})')


def json_line(row: Sequence[Any]) -> str:
    """Return a row that holds `FIELDS` as a line of JSON: what `AuditEvent.model_dump(mode="json")` gives."""
    fields = list(map(_json, row))
    fields[_TIMESTAMP] = f'"{_utc(row[_TIMESTAMP])}"'
    for index in _JSON:
        fields[index] = row[index]
    return "{" + ",".join(map(add, _NAMES, fields)) + "}\n"


_NAMES = tuple(f"{_quoted(name)}:" for name in FIELDS)


def _json(value: Any) -> str:
    if value is None:
        return "null"
    return _quoted(value) if isinstance(value, str) else repr(value)


def _utc(value: Any) -> str:
    moment = datetime.fromisoformat(value).replace(tzinfo=UTC) if isinstance(value, str) else value
    return f"{moment.isoformat()[:-6]}Z"


def csv_head() -> str:
    """Return the line of names."""
    return ",".join(f'"{name}"' for name in FIELDS) + "\r\n"


def csv_line(*, raw: bool) -> Callable[[Sequence[Any]], str]:
    """Return what makes a line of CSV (RFC 4180) of a row.

    Text is in quotes; None is an empty field without.

    Args:
        raw: True keeps text as it is; False keeps it from being taken for a formula, see `defused`.
    """
    tame: Callable[[str], str] = (lambda text: text) if raw else defused

    def field(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            text = tame(value)
            return '"' + (text.replace('"', '""') if '"' in text else text) + '"'
        return repr(value)

    def line(row: Sequence[Any]) -> str:
        fields = list(map(field, row))
        fields[_TIMESTAMP] = f'"{_utc(row[_TIMESTAMP])}"'
        return ",".join(fields) + "\r\n"

    return line


def defused(text: str) -> str:
    """Return `text` with an apostrophe wherever a spreadsheet could take it for the beginning of a formula."""
    tame = text if text.isascii() and text[:1].isalnum() else _FIRST.sub("'", text)
    if ";" in text or "\n" in text or "\r" in text or "\t" in text:
        return _LATER.sub(_split, tame)
    return tame


def _split(found: re.Match[str]) -> str:
    run = found[0]
    place = max(map(run.rfind, ";\t\r\n")) + 1
    return f"{run[:place]}'{run[place:]}" if place else run
