"""A page as an HTML table, and one record as a card: every value and every name is escaped, and there is no script.

The style sheet is limited to one class, so that nothing else of the host page changes. It follows the theme of
JupyterLab, of VS Code and of the docs site, and elsewhere that of the system, on a background of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from agent_gateway_store import _text
from agent_gateway_store.results import cells

if TYPE_CHECKING:
    from pydantic import BaseModel

# Characters of JSON in a cell, where 200 rows must stay below the megabyte or so that a notebook saves, and in a card.
_JSON_CHARS = 4_000
_TEXT_CHARS = 20_000
# Risk labels are a handful; a list that is longer is no longer read word by word.
_CHIPS = 20
# An id is not broken over lines: from the 12 characters of a key id to the 36 of a UUID.
_ID_LEAST, _ID_CHARS = 12, 36
_TITLES = ("decision", "status", "execution_status")


def style() -> str:
    """Return the style element that every view carries."""
    # Without line breaks, so that Markdown of a notebook viewer does not make paragraphs of it.
    css = files(__package__).joinpath("view.css").read_text(encoding="utf-8")
    return f"<style>{' '.join(css.split())}</style>"


def table_html(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, count: int, has_more: bool) -> str:
    """Return a table, and a line that says how many rows there are.

    Args:
        columns: Their names, in order.
        rows: Those to show, as `table_rows` returns them.
        count: How many rows there are.
        has_more: Whether another page follows.
    """
    head = "".join(_th(name, [row[name] for row in rows if row.get(name) is not None]) for name in columns)
    body = "".join(f"<tr>{''.join(_td(name, row.get(name)) for name in columns)}</tr>" for row in rows)
    # What is cut inside of JSON opens at a click, and says how long it is.
    is_cut = "…</td>" in body or "…</span>" in body
    foot = cells.caption(count, is_cut=is_cut) + ("; there is more: pass next_cursor" if has_more else "")
    return (
        f'{style()}<div class="ags-view"><div class="ags-wide"><table class="ags-table"><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="ags-foot">{escape(foot)}</p></div>'
    )


def card_html(record: BaseModel) -> str:
    """Return one record: its type and status, each field that is set, and the names of the other fields."""
    fields = cells.fields_of(record)
    badges = "".join(_badge(name, fields[name]) for name in _TITLES if fields.get(name) is not None)
    rows = "".join(
        f"<tr><th>{_heading(name, isinstance(value, datetime))}</th>{_td(name, value, whole=True)}</tr>"
        for name, value in fields.items()
        if not _is_empty(value)
    )
    empty = ", ".join(name for name, value in fields.items() if _is_empty(value))
    below = f'<p class="ags-foot">empty: {escape(_text.escape(empty))}</p>' if empty else ""
    title = f"{escape(type(record).__name__)} <b>{escape(cells.cell(_subject(fields)))}</b> {badges}"
    return (
        f'{style()}<div class="ags-view ags-card"><div class="ags-title">{title}</div>'
        f'<table class="ags-table"><tbody>{rows}</tbody></table>{below}</div>'
    )


def _subject(fields: dict[str, Any]) -> str:
    if "tool_name" in fields:
        return _text.call_name(fields["mcp_server"], fields["tool_name"])
    if "tool_call" in fields:
        return _text.call_name(fields["tool_call"]["server"], fields["tool_call"]["tool"])
    return str(fields.get("caller_id") or "")


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _th(name: str, values: list[Any]) -> str:
    is_time = bool(values) and all(isinstance(value, datetime) for value in values)
    is_numeric = bool(values) and all(map(cells.is_number, values))
    return f"<th{' class=ags-num' if is_numeric else ''}>{_heading(name, is_time)}</th>"


def _heading(name: str, is_time: bool) -> str:
    return escape(cells.cell(name)) + (" <small>UTC</small>" if is_time else "")


def _td(name: str, value: Any, *, whole: bool = False) -> str:
    if value is None:
        return "<td></td>"
    if cells.tone_of(name, value):
        return f"<td>{_badge(name, value)}</td>"
    if isinstance(value, datetime):
        return f'<td class="ags-line">{escape(cells.time_text(value))}</td>'
    if cells.is_number(value):
        return f'<td class="ags-num">{escape(cells.cell(value))}</td>'
    if cells.is_call(name, value):
        call = escape(cells.cell(_text.call_name(value["server"], value["tool"])))
        warning = f"<p><b>{escape(_text.CUT_CALL)}</b></p>" if _text.is_cut(value) else ""
        return f"<td>{call}{warning}{_json(value['arguments'], whole) if value['arguments'] else ''}</td>"
    if (votes := cells.votes_text(name, value)) is not None and not whole:
        return f"<td>{escape(cells.cell(votes))}</td>"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return f"<td>{_chips(value)}</td>"
    if isinstance(value, dict | list):
        return f"<td>{_json(value, whole) if value else ''}</td>"
    if whole:
        text = _cut(_text.escape(str(value), keep="\n"), _TEXT_CHARS)
        return f'<td class="ags-text">{escape(text)}</td>'
    text = cells.cell(value)
    if len(text) > _ID_CHARS or not text or any(map(str.isspace, text)):
        return f"<td>{escape(text)}</td>"
    is_id = len(text) >= _ID_LEAST and any(map(str.isdigit, text))
    return f'<td class="{"ags-id" if is_id else "ags-line"}">{escape(text)}</td>'


def _badge(name: str, value: Any) -> str:
    return f'<span class="ags-badge ags-{cells.tone_of(name, value) or "off"}">{escape(cells.cell(value))}</span>'


def _chips(words: list[str]) -> str:
    more = f" … {len(words)} in all" if len(words) > _CHIPS else ""
    return "".join(f'<span class="ags-chip">{escape(cells.cell(word))}</span>' for word in words[:_CHIPS]) + more


def pretty_json(value: Any, *, most: int = _JSON_CHARS) -> str:
    """Return JSON over several lines, cut after `most` characters; control characters are escaped."""
    return _cut(_text.json_text(value, indent=2), most, of="of what is stored" if _text.is_cut(value) else "in all")


def _json(value: Any, whole: bool) -> str:
    pre = f"<pre>{escape(pretty_json(value, most=_TEXT_CHARS if whole else _JSON_CHARS))}</pre>"
    return pre if whole else f"<details><summary>{escape(cells.summary(value))}</summary>{pre}</details>"


def _cut(text: str, most: int, *, of: str = "in all") -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters {of})"
