"""The values by which callers narrow a listing: checked, and turned into what a column holds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, TypeAlias
from uuid import UUID

from agent_gateway_store._text import code_text
from agent_gateway_store.clock import utc_now
from agent_gateway_store.encoding.sanitize import Scrubber, storable_key
from agent_gateway_store.models.columns import UTC_MAX, UTC_MIN, as_utc
from agent_gateway_store.storage.pagination import listing_fingerprint

OneOrMore: TypeAlias = str | Sequence[str] | set[str] | frozenset[str]
"""A value, or several of which any may match."""

Moment: TypeAlias = datetime | timedelta | str
"""A time; a timedelta or "24h" is so long ago; other text is an ISO 8601 time (UTC unless it names a zone)."""

Shape: TypeAlias = tuple[tuple[str, bool], ...]
"""The filters in use, and whether each has several values."""

# Chosen: far more than a person types, and a LIKE over a table that still ends.
_LONGEST_TEXT = 1_000
# Chosen: nine digits of weeks are 19 million years, which ends in an OverflowError below.
_PERIOD_DIGITS = 9
# The largest that an INTEGER of PostgreSQL holds; nobody asks for that many rows.
_LARGEST_INTEGER = 2**31 - 1
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_PERIOD = re.compile(rf"\s*(\d{{1,{_PERIOD_DIGITS}}})\s*([smhdw])\s*", re.ASCII)


@dataclass(frozen=True)
class Criteria:
    """Checked filters."""

    # The filters in use, which determine the SELECT.
    shape: Shape
    # Its parameters: `p_<filter>`, and `p_bound`, the organisation that the store is bound to.
    values: Mapping[str, Any]
    # Binds a cursor to the listing, these filters and the organisation.
    scope: bytes


def check_filters(
    filters: Mapping[str, Any],
    checks: Mapping[str, Callable[[str, Any], Any]],
    *,
    org_id: str | None,
    listing: str,
    now: datetime | None = None,
) -> Criteria:
    """Check filters, of which None does not narrow; raise TypeError for an unknown one, and whatever `checks` raise.

    Args:
        org_id: The organisation that the store is bound to; it narrows in addition to every filter.
        listing: Name of the listing to which its cursors belong.
        now: What periods count back from; by default this process's now.
    """
    shape: list[tuple[str, bool]] = []
    values: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    if org_id is not None:
        shape.append(("bound", False))
        values["p_bound"] = org_id
    for name, given in filters.items():
        if name not in checks:
            raise TypeError(f"There is no filter {code_text(name)}: use one of {', '.join(checks)}.")
        if given is not None:
            check = checks[name]
            value = values[f"p_{name}"] = instant(name, given, now=now) if check is instant else check(name, given)
            shape.append((name, isinstance(value, list)))
            # A time as given: "24h" is another instant at the next page, and the cursor must still fit.
            texts[name] = str(given) if name in ("since", "until") else value
    return Criteria(tuple(sorted(shape)), values, listing_fingerprint(listing, org_id, texts))


def require_all(org_id: str | None) -> None:
    """Raise ValueError in a store that is bound to one organisation: the log is that of all of them."""
    if org_id is not None:
        raise ValueError(
            "The log is that of all organisations: use a store that is not bound to one (`for_org`, --org)."
        )


def instant(name: str, given: Any, *, now: datetime | None = None) -> datetime:
    """Return the time that a caller means, in UTC; a period counts back from `now`, by default this process's."""
    if isinstance(given, datetime):
        return as_utc(given)
    if isinstance(given, str) and not _PERIOD.fullmatch(given.lower()):
        try:
            return as_utc(datetime.fromisoformat(given.strip()))
        except ValueError:
            raise ValueError(
                f'{name} must be a time such as "2026-05-01T12:00Z" or a period such as "24h" or "7d", '
                f"not {code_text(given)}."
            ) from None
    if not isinstance(given, str | timedelta):
        raise TypeError(f'{name} must be a datetime, a timedelta or text such as "24h", not {type(given).__name__}.')
    ago = duration(name, given)
    try:
        return (now or utc_now()) - ago
    except OverflowError:
        # Before the year 1 or after 9999: every event is on one side of it.
        return UTC_MIN if ago > timedelta() else UTC_MAX


def duration(name: str, given: Any) -> timedelta:
    """Return a length of time: a timedelta, or text such as "90s", "15m", "24h", "7d", "2w"."""
    if isinstance(given, timedelta):
        return given
    if not isinstance(given, str):
        raise TypeError(f'{name} must be a timedelta or text such as "1h", not {type(given).__name__}.')
    found = _PERIOD.fullmatch(given.lower())
    if found is None:
        raise ValueError(
            f'{name} must be a number with a unit, such as "90s", "15m", "24h" or "7d", not {code_text(given)}.'
        )
    try:
        return timedelta(**{_UNITS[found[2]]: int(found[1])})
    except OverflowError:
        return timedelta.max


def one_or_many(check: Callable[[str, Any], Any], name: str, given: Any) -> Any:
    """Check one value or each of many; return many sorted, without repetitions."""
    if isinstance(given, str) or not isinstance(given, Sequence | set | frozenset):
        return check(name, given)
    found = sorted({check(name, each) for each in given})
    return found[0] if len(found) == 1 else found


def identifier(name: str, given: Any) -> str:
    """Return text as an indexed column holds it; TypeError for anything else."""
    return storable_key(_text(name, given))


def uuid_of(name: str, given: Any) -> UUID:
    """Return a UUID, given as one or as text; TypeError for anything else, ValueError for other text."""
    try:
        return given if isinstance(given, UUID) else UUID(_text(name, given))
    except ValueError:
        raise ValueError(f"{name} must be a UUID, not {code_text(given)}.") from None


def uuid_digits(name: str, given: Any) -> str:
    """Return the 32 hex digits of a UUID, as SQLite holds them; errors as of `uuid_of`."""
    return uuid_of(name, given).hex


def word(kind: type[StrEnum], name: str, given: Any) -> StrEnum:
    """Return a member of `kind`. TypeError if `given` is not text; ValueError, which names them, if there is none."""
    try:
        return kind(_text(name, given))
    except ValueError:
        raise ValueError(f"{name} must be one of {', '.join(kind)}, not {code_text(given)}.") from None


def label(name: str, given: Any) -> str:
    """Return text as JSON columns hold it; TypeError for anything else."""
    return Scrubber().text(name, _text(name, given))


def _text(name: str, given: Any) -> str:
    if not isinstance(given, str):
        raise TypeError(f"{name} must be text, not {type(given).__name__}.")
    return given


def number(name: str, given: Any) -> float:
    """Return a float; TypeError for what is not a number, ValueError for NaN."""
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise TypeError(f"{name} must be a number, not {type(given).__name__}.")
    try:
        found = float(given)
    except OverflowError:
        found = math.inf if given > 0 else -math.inf
    if math.isnan(found):
        raise ValueError(f"{name} must be a number, not NaN.")
    return found


def searched_text(name: str, given: Any) -> str:
    """Return a text that is looked for inside others, as columns hold it; ValueError if it is empty or long."""
    text = label(name, given)
    if not 0 < len(text) <= _LONGEST_TEXT:
        raise ValueError(f"{name} must have 1 to {_LONGEST_TEXT:,} characters, not {len(text):,}.")
    return text


def pattern(name: str, given: Any) -> str:
    """Return the LIKE pattern that finds a text anywhere; errors as of `searched_text`."""
    return like(searched_text(name, given))


def like(text: str) -> str:
    """Return the LIKE pattern of a checked text, escaped by a backslash."""
    for special in ("\\", "%", "_"):
        text = text.replace(special, f"\\{special}")
    return f"%{text}%"


def require_between(name: str, value: int, least: int, most: int = _LARGEST_INTEGER, *, hint: str) -> None:
    """Raise ValueError unless `value` is from `least` to `most`; its text ends with `hint`, what to do instead."""
    if not least <= value <= most:
        raise ValueError(f"{name} must be {least:,} to {most:,}: {hint}.")
