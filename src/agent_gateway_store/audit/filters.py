"""The filters of the audit log: what a caller gives, checked, and what the database is asked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Any, TypeAlias, TypedDict

from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.audit import Decision, ExecutionStatus, OutputDecision
from agent_gateway_store.models.columns import UTC_MAX, UTC_MIN, as_utc
from agent_gateway_store.models.scrub import Scrubber, storable_key
from agent_gateway_store.storage.keyset import scope_of

__all__ = ["Criteria", "Filters", "Moment", "OneOrMore", "criteria", "moment", "period"]

OneOrMore: TypeAlias = str | Sequence[str] | set[str] | frozenset[str]
"""A value, or several of which any may match."""

Moment: TypeAlias = datetime | timedelta | str
"""A time; a timedelta or "24h" is so long ago; other text is an ISO 8601 time (UTC unless it names a zone)."""


class Filters(TypedDict, total=False):
    """What `search`, `stream`, `stats`, `export`, `follow` and the bulk reads can be narrowed by; None does not narrow.

    Several filters must all match. Where a filter takes several values, any of them may match.

    Attributes:
        risk_label: Events that carry this label.
        min_risk_score: This score or a higher one.
        since: From this time on.
        until: Before this time.
        text: Stands in the tool name or the rationale, in upper or lower case (letters beyond ASCII match as the
            database's locale folds them; SQLite folds none).
    """

    request_id: OneOrMore | None
    org_id: OneOrMore | None
    trace_id: OneOrMore | None
    session_id: OneOrMore | None
    parent_request_id: OneOrMore | None
    caller_id: OneOrMore | None
    key_id: OneOrMore | None
    environment: OneOrMore | None
    mcp_server: OneOrMore | None
    tool_name: OneOrMore | None
    approver_id: OneOrMore | None
    decision: OneOrMore | None
    output_decision: OneOrMore | None
    execution_status: OneOrMore | None
    risk_label: OneOrMore | None
    min_risk_score: float | None
    since: Moment | None
    until: Moment | None
    text: str | None


@dataclass(frozen=True)
class Criteria:
    """Checked filters.

    Attributes:
        shape: The filters in use and whether each has several values: which SELECT is asked.
        values: Its parameters.
        scope: Binds a cursor to the listing, these filters and the organisation.
    """

    shape: tuple[tuple[str, bool], ...]
    values: Mapping[str, Any]
    scope: bytes


_LONGEST_TEXT = 1_000
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_PERIOD = re.compile(r"\s*(\d{1,9})\s*([smhdw])\s*", re.ASCII)


def criteria(filters: Mapping[str, Any], *, org_id: str | None, listing: str = "audit") -> Criteria:
    """Check `filters`.

    Args:
        filters: As the caller gave them.
        org_id: The organisation that the store is bound to; it narrows beside any filter.
        listing: Name of the listing whose cursors they are for.

    Raises:
        TypeError: There is no such filter, or its value has the wrong type.
        ValueError: There is no such value.
    """
    shape: list[tuple[str, bool]] = []
    values: dict[str, Any] = {}
    spelt: dict[str, Any] = {}
    if org_id is not None:
        shape.append(("bound", False))
        values["p_bound"] = org_id
    for name, given in filters.items():
        if name not in _CHECKS:
            raise TypeError(f"There is no filter {name!r}: use one of {', '.join(_CHECKS)}.")
        if given is None:
            continue
        value = _CHECKS[name](name, given)
        several = isinstance(value, list)
        shape.append((name, several))
        values[f"p_{name}"] = value
        spelt[name] = str(given) if name in ("since", "until") else value
    return Criteria(tuple(sorted(shape)), values, scope_of(listing, org_id, spelt))


def moment(name: str, given: Any) -> datetime:
    """Return the time that a caller means, in UTC.

    Raises:
        TypeError: `given` is neither a datetime, nor a timedelta, nor text.
        ValueError: The text is no time.
    """
    if isinstance(given, datetime):
        return as_utc(given)
    if isinstance(given, str) and not _PERIOD.fullmatch(given.lower()):
        try:
            return as_utc(datetime.fromisoformat(given.strip()))
        except ValueError:
            raise ValueError(
                f'{name} must be a time such as "2026-05-01T12:00Z" or a period such as "24h" or "7d", not {given!r}.'
            ) from None
    if not isinstance(given, str | timedelta):
        raise TypeError(f'{name} must be a datetime, a timedelta or text such as "24h", not {type(given).__name__}.')
    ago = period(name, given)
    try:
        return utc_now() - ago
    except OverflowError:
        return UTC_MIN if ago > timedelta() else UTC_MAX


def period(name: str, given: Any) -> timedelta:
    """Return a length of time: a timedelta, or text such as "90s", "15m", "24h", "7d", "2w".

    Raises:
        TypeError: `given` is neither.
        ValueError: The text is no period.
    """
    if isinstance(given, timedelta):
        return given
    if not isinstance(given, str):
        raise TypeError(f'{name} must be a timedelta or text such as "1h", not {type(given).__name__}.')
    found = _PERIOD.fullmatch(given.lower())
    if found is None:
        raise ValueError(f'{name} must be a number with a unit, such as "90s", "15m", "24h" or "7d", not {given!r}.')
    try:
        return timedelta(**{_UNITS[found[2]]: int(found[1])})
    except OverflowError:
        return timedelta.max


def _several(check: Callable[[str, Any], Any], name: str, given: Any) -> Any:
    """Check a value, or each of several; several come sorted and once."""
    if isinstance(given, str) or not isinstance(given, Sequence | set | frozenset):
        return check(name, given)
    found = sorted({check(name, each) for each in given})
    return found[0] if len(found) == 1 else found


def _key(name: str, given: Any) -> str:
    return storable_key(_text(name, given))


def _word(kind: type[StrEnum], name: str, given: Any) -> StrEnum:
    try:
        return kind(_text(name, given))
    except ValueError:
        raise ValueError(f"{name} must be one of {', '.join(kind)}, not {given!r}.") from None


def _label(name: str, given: Any) -> str:
    return Scrubber().text(name, _text(name, given))


def _text(name: str, given: Any) -> str:
    if not isinstance(given, str):
        raise TypeError(f"{name} must be text, not {type(given).__name__}.")
    return given


def _score(name: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise TypeError(f"{name} must be a number, not {type(given).__name__}.")
    try:
        score = float(given)
    except OverflowError:
        score = math.copysign(math.inf, given)
    if math.isnan(score):
        raise ValueError(f"{name} must be a number, not NaN.")
    return score


def _pattern(name: str, given: Any) -> str:
    text = Scrubber().text(name, _text(name, given))
    if not 0 < len(text) <= _LONGEST_TEXT:
        raise ValueError(f"{name} must have 1 to {_LONGEST_TEXT:,} characters, not {len(text):,}.")
    for special in ("\\", "%", "_"):
        text = text.replace(special, f"\\{special}")
    return f"%{text}%"


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **{
        name: partial(_several, _key)
        for name in (
            "caller_id",
            "tool_name",
            "mcp_server",
            "org_id",
            "environment",
            "session_id",
            "key_id",
            "approver_id",
            "request_id",
            "trace_id",
            "parent_request_id",
        )
    },
    "decision": partial(_several, partial(_word, Decision)),
    "execution_status": partial(_several, partial(_word, ExecutionStatus)),
    "output_decision": partial(_several, partial(_word, OutputDecision)),
    "risk_label": partial(_several, _label),
    "min_risk_score": _score,
    "since": moment,
    "until": moment,
    "text": _pattern,
}
