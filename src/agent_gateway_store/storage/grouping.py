"""Counts and percentiles of groups of rows, aggregated in SQL: by columns, by time, by the hour and day of a place."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias
from zoneinfo import ZoneInfo

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    FromClause,
    Integer,
    Interval,
    Select,
    Text,
    and_,
    bindparam,
    case,
    cast,
    extract,
    func,
    literal_column,
    or_,
    select,
    type_coerce,
)

from agent_gateway_store._text import code_text
from agent_gateway_store.results import Stats
from agent_gateway_store.results.cells import Column
from agent_gateway_store.storage.filters import duration
from agent_gateway_store.storage.statements import literal_number as _number

# The first zones were written down after 1840, and a rule of today says nothing of times after these.
_FIRST_YEAR, _LAST_YEAR = 1840, 2200
_DAY, _SECOND = timedelta(days=1), timedelta(seconds=1)


def zone_of(name: str | None) -> ZoneInfo | None:
    """Return the time zone of a name such as "Europe/Berlin"; None: UTC. ValueError: this machine has no such zone."""
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
    day = datetime(max(first_year - 1, _FIRST_YEAR), 1, 1, tzinfo=UTC)
    found = [(day, _offset(zone, day))]
    while day.year <= min(last_year + 1, _LAST_YEAR):
        if _offset(zone, day + _DAY) != found[-1][1]:
            change = _change(zone, day, found[-1][1])
            found.append((change, _offset(zone, change)))
        day += _DAY
    return tuple(found)


def _offset(zone: ZoneInfo, at: datetime) -> int:
    return (at.astimezone(zone).utcoffset() or timedelta()) // _SECOND


def _change(zone: ZoneInfo, day: datetime, before: int) -> datetime:
    """Return the first second of a day with another offset than `before`."""
    seconds = range(_DAY // _SECOND)
    return day + _SECOND * bisect(seconds, False, key=lambda second: _offset(zone, day + second * _SECOND) != before)


TIMES = ("hour_of_day", "weekday")
"""By what rows are grouped beside their columns: the hour, 0 to 23, and the day, 1 (Monday) to 7, of the time zone."""

Offsets: TypeAlias = tuple[tuple[datetime, int], ...]
"""As `Grouping.offsets` gives them; empty: UTC."""

# A Monday, so that buckets of a week begin on Mondays; those of hours and days begin with the hour and day.
_ORIGIN = datetime(1, 1, 1, tzinfo=UTC)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# From there to 1970, which is where both databases count seconds from.
_ORIGIN_SECONDS = (_EPOCH - _ORIGIN) // _SECOND
_HOUR_S, _DAY_S = 3600, 24 * 3600
# Chosen: about a thousand years.
_LONGEST_BUCKET = timedelta(days=365_000)


@dataclass(frozen=True)
class Metrics:
    """What is counted of each group.

    Attributes:
        counts: Name to the SQL condition over the columns of the rows; the first, "TRUE", counts all.
        value: The column of which percentiles are taken; None does not count.
        percentiles: Name of each to its share.
        scale: By which a percentile is divided; None: it is left as it is.
    """

    counts: Mapping[str, str]
    value: str
    percentiles: Mapping[str, float]
    scale: int | None = None


class Grouping(NamedTuple):
    """A checked grouping: columns and words of `TIMES`, the length of buckets, and whose hours and days are meant."""

    by: tuple[str, ...]
    bucket: timedelta | None
    zone: ZoneInfo | None

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of `by` that are columns of the rows."""
        return tuple(name for name in self.by if name not in TIMES)

    @property
    def values(self) -> dict[str, Any]:
        """The parameters of its statement."""
        return {} if self.bucket is None else {"p_bucket": self.bucket, "p_bucket_s": self.bucket // _SECOND}

    def offsets(self, first: Any, last: Any) -> Offsets:
        """Return the offsets of the zone from the first to the last time of all rows, as the driver gives them."""
        if self.zone is None or first is None:
            return ()
        # SQLite gives text, which begins with the year.
        years = [int(at[:4]) if isinstance(at, str) else at.year for at in (first, last)]
        return offsets(self.zone, *years)


def grouping(
    by: str | Iterable[str] | None,
    bucket: timedelta | str | None,
    time_zone: str | None,
    groups: Sequence[str],
) -> Grouping:
    """Check what rows are to be grouped by, with TypeError and ValueError; `groups` names their columns."""
    names = () if by is None else (by,) if isinstance(by, str) else tuple(by)
    for name in names:
        if name not in (*groups, *TIMES):
            raise ValueError(f"by must name one or more of {', '.join((*groups, *TIMES))}, not {name!r}.")
    if len(set(names)) < len(names):
        raise ValueError("by must name each column once.")
    return Grouping(names, _bucket_of(bucket), zone_of(time_zone))


def _bucket_of(bucket: timedelta | str | None) -> timedelta | None:
    if bucket is None:
        return None
    found = duration("bucket", bucket)
    if found % _SECOND or not _SECOND <= found <= _LONGEST_BUCKET:
        raise ValueError(f"bucket must be whole seconds, one or more, and at most 365,000 days, not {bucket!r}.")
    return found


def aggregate(
    dialect: str, base: FromClause, by: tuple[str, ...], zone: Offsets, metrics: Metrics, *, in_buckets: bool
) -> Select[Any]:
    """Return the SELECT of the groups: their columns, the bucket if there is one, counts, percentiles.

    `base` has the rows, with `at`, `g_<name>` for each column of `by`, and what `metrics` names.
    """
    times = [_time_of(dialect, base.c.at, name, zone).label(f"g_{name}") for name in by if name in TIMES]
    if in_buckets:
        times.append(_bucket(dialect, base.c.at, zone).label("bucket"))
    rows = select(base, *times).subquery("timed") if times else base
    groups = [rows.c[f"g_{name}"] for name in by] + ([rows.c.bucket] if in_buckets else [])
    return (_by_percentile_disc if dialect == "postgresql" else _by_rank)(rows, groups, metrics)


def stats_of(rows: Iterable[Sequence[Any]], found: Grouping, metrics: Metrics, columns: tuple[Column, ...]) -> Stats:
    """Return the groups: by time, then the largest first, then by name."""
    named = [_row(tuple(row), found, metrics) for row in rows]
    size = next(iter(metrics.counts))
    named.sort(key=lambda row: _place(row, found, size))
    return Stats(named, by=found.by, bucket=found.bucket, metrics=columns)


def _row(row: tuple[Any, ...], found: Grouping, metrics: Metrics) -> dict[str, Any]:
    at = len(found.by)
    named: dict[str, Any] = {}
    if found.bucket is not None:
        named["bucket"] = _start(row[at], found.bucket, found.zone)
        at += 1
    named |= dict(zip(found.by, row, strict=False))
    counts, shares = row[at : at + len(metrics.counts)], row[at + len(metrics.counts) :]
    # PostgreSQL gives the percentiles as one array.
    if len(shares) == 1:
        shares = tuple(shares[0] or (None,) * len(metrics.percentiles))
    if metrics.scale is not None:
        shares = tuple(None if share is None else share / metrics.scale for share in shares)
    return named | dict(zip((*metrics.counts, *metrics.percentiles), (*counts, *shares), strict=True))


def _start(key: Any, bucket: timedelta, zone: ZoneInfo | None) -> datetime:
    if isinstance(key, datetime):
        return key
    number = int(key)
    if zone is None:
        return _ORIGIN + number * bucket
    local = _ORIGIN.replace(tzinfo=None) + number // 2 * bucket
    # By way of UTC, so that a day whose midnight is left out begins with its first hour.
    return local.replace(tzinfo=zone, fold=number % 2).astimezone(UTC).astimezone(zone)


def _place(row: Mapping[str, Any], found: Grouping, size: str) -> tuple[Any, ...]:
    times = tuple(row[name] for name in found.by if name in TIMES)
    names = ((row[name] is None, row[name] or "") for name in found.columns)
    # In UTC: two times of one zone compare by the clock on the wall, which shows an hour twice.
    return (row.get("bucket", _ORIGIN).astimezone(UTC), *times, -row[size], *names)


def _seconds(dialect: str, at: ColumnElement[Any]) -> ColumnElement[Any]:
    if dialect == "postgresql":
        return cast(func.floor(extract("epoch", at)), BigInteger)
    # Without the fraction, which SQLite would round to the next second.
    return cast(func.strftime("%s", func.substr(type_coerce(at, Text()), 1, 19)), Integer)


def _moment(dialect: str, at: datetime) -> ColumnElement[Any]:
    if dialect == "postgresql":
        return literal_column(f"TIMESTAMPTZ '{at.isoformat()}'")
    # As SQLite holds times, which it compares as text.
    return literal_column(f"'{at:%Y-%m-%d %H:%M:%S.%f}'")


def _local(dialect: str, at: ColumnElement[Any], zone: Offsets) -> ColumnElement[Any]:
    """Seconds on the clock of the zone since `_ORIGIN`."""
    seconds = _seconds(dialect, at) + _number(_ORIGIN_SECONDS)
    if not zone:
        return seconds
    # The newest first: that is where most rows are.
    later = [(at >= _moment(dialect, since), _number(offset)) for since, offset in reversed(zone[1:])]
    first = _number(zone[0][1])
    return seconds + (case(*later, else_=first) if later else first)


def _time_of(dialect: str, at: ColumnElement[Any], name: str, zone: Offsets) -> ColumnElement[Any]:
    # A week more, so that the first hours of the year 1 stay above zero west of Greenwich.
    local = _local(dialect, at, zone) + _number(7 * _DAY_S)
    if name == "hour_of_day":
        return local % _number(_DAY_S) // _number(_HOUR_S)
    return local // _number(_DAY_S) % _number(7) + _number(1)


def _bucket(dialect: str, at: ColumnElement[Any], zone: Offsets) -> ColumnElement[Any]:
    """The start of the bucket in UTC; on SQLite its number; in a zone twice its number, plus its fold."""
    if not zone and dialect == "postgresql":
        whole = bindparam("p_bucket", type_=Interval())
        return func.date_bin(whole, at, literal_column("TIMESTAMPTZ '0001-01-01 00:00:00+00'"))
    length = bindparam("p_bucket_s", type_=BigInteger())
    number = _local(dialect, at, zone) // length
    if not zone:
        return number
    start = number * length
    # Where the clock is set back, what it shows twice is two buckets if both begin in that time: the fold tells them
    # apart. A bucket that began before goes on.
    folds = [
        and_(at >= _moment(dialect, since), start >= _number(_wall(since, offset)), start < _number(_wall(since, old)))
        for (_, old), (since, offset) in pairwise(zone)
        if offset < old
    ]
    return number * _number(2) + (case((or_(*folds), _number(1)), else_=_number(0)) if folds else _number(0))


def _wall(at: datetime, offset: int) -> int:
    return (at - _ORIGIN) // _SECOND + offset


def _counts(metrics: Metrics) -> list[Any]:
    return [
        (func.count().filter(literal_column(f"({condition})")) if condition != "TRUE" else func.count()).label(name)
        for name, condition in metrics.counts.items()
    ]


def _by_percentile_disc(rows: FromClause, groups: list[Any], metrics: Metrics) -> Select[Any]:
    wanted: Any = literal_column(f"ARRAY[{', '.join(map(repr, metrics.percentiles.values()))}]::float8[]")
    shares = func.percentile_disc(wanted).within_group(rows.c[metrics.value]).label("shares")
    return select(*groups, *_counts(metrics), shares).select_from(rows).group_by(*groups)


def _by_rank(rows: FromClause, groups: list[Any], metrics: Metrics) -> Select[Any]:
    """The definition of `percentile_disc`, written out: the first value whose rank is at least that share of all."""
    value = rows.c[metrics.value]
    order = (value.is_(None), value)
    rank = func.row_number().over(partition_by=groups or None, order_by=order).label("value_rank")
    of = func.count(value).over(partition_by=groups or None).label("value_count")
    ranked = select(rows, rank, of).subquery("ranked")
    shares = [
        func.min(
            case((ranked.c.value_rank >= literal_column(repr(part)) * ranked.c.value_count, ranked.c[metrics.value]))
        ).label(name)
        for name, part in metrics.percentiles.items()
    ]
    names = [ranked.c[group.name] for group in groups]
    return select(*names, *_counts(metrics), *shares).select_from(ranked).group_by(*names)
