"""Time zones by the machine's rules, given to SQL as plain offsets: both databases then count the same hours."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from agent_gateway_store._text import code_text

# The first zones were written down after 1840, and a rule of today says nothing of times after these.
_FIRST_YEAR, _LAST_YEAR = 1840, 2200
_DAY, _SECOND = timedelta(days=1), timedelta(seconds=1)


def zone_of(name: str | None) -> ZoneInfo | None:
    """Return the time zone of a name such as "Europe/Berlin"; None: UTC, without a zone.

    Raises:
        TypeError: It is not text.
        ValueError: There is no such zone on this machine.
    """
    if name is None:
        return None
    if not isinstance(name, str):
        raise TypeError(f"time_zone must be text, not {type(name).__name__}.")
    try:
        return ZoneInfo(name)
    # A name may be a path that leads out of the folder of zones, to a folder, or to a file of another kind.
    except (KeyError, ValueError, OSError):
        raise ValueError(
            f'time_zone must be the name of a zone such as "Europe/Berlin" or "UTC", not {code_text(name)}.'
        ) from None


@lru_cache(maxsize=64)
def offsets(zone: ZoneInfo, first_year: int, last_year: int) -> tuple[tuple[datetime, int], ...]:
    """Return since when (UTC) which offset in seconds holds, in the order of time; the first holds before, too."""
    years = range(max(first_year - 1, _FIRST_YEAR), min(last_year + 1, _LAST_YEAR) + 1)
    start = datetime(min(max(first_year - 1, _FIRST_YEAR), _LAST_YEAR), 1, 1, tzinfo=UTC)
    found = [(start, _offset(zone, start))]
    for year in years:
        day = datetime(year, 1, 1, tzinfo=UTC)
        while day.year == year:
            if _offset(zone, day + _DAY) != found[-1][1]:
                change = _change(zone, day, found[-1][1])
                found.append((change, _offset(zone, change)))
            day += _DAY
    return tuple(found)


def _offset(zone: ZoneInfo, at: datetime) -> int:
    return (at.astimezone(zone).utcoffset() or timedelta()) // _SECOND


def _change(zone: ZoneInfo, day: datetime, before: int) -> datetime:
    """Return the first second of a day with another offset than `before`."""
    low, high = 0, _DAY // _SECOND
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _offset(zone, day + middle * _SECOND) != before else (middle, high)
    return day + high * _SECOND
