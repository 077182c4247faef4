"""Hours and days of a place: right where the clock changes, and the same on both databases."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from contract_helpers import POSTGRES

from agent_gateway_store import GatewayStore
from builders import make_event
from cases import cases

ZONES = ("Europe/Berlin", "Asia/Kolkata", "Australia/Lord_Howe", "America/Sao_Paulo")
# Every 20 minutes around the changes of spring and autumn, also in 2018 when Sao Paulo had them at midnight.
STARTS = ("2018-11-03T12:00", "2026-03-28T12:00", "2026-10-24T12:00", "2026-04-04T06:00", "2026-11-01T00:00")
TIMES = [
    datetime.fromisoformat(start).replace(tzinfo=UTC) + timedelta(minutes=20 * step, microseconds=999_999)
    for start in STARTS
    for step in range(108)
]


@pytest.fixture
async def filled(store: GatewayStore) -> GatewayStore:
    await store.audit.write_many(make_event(request_id=f"z-{i}", timestamp=at) for i, at in enumerate(TIMES))
    return store


async def counted(store: GatewayStore, by: Any = None, **options: Any) -> list[tuple[Any, ...]]:
    found = await store.audit.stats(by, **options)
    names = [name for name in (found.columns or ()) if name in ("bucket", "hour_of_day", "weekday", "calls")]
    return [tuple(row[name] for name in names) for row in found]


@cases("name", ZONES)
async def test_hours_and_days_are_those_of_the_zone(filled: GatewayStore, name: str) -> None:
    """A day is one bucket, however many hours it has; an hour that the clock shows twice is two."""
    zone = ZoneInfo(name)
    local = [at.astimezone(zone) for at in TIMES]

    hours = sorted(Counter(each.hour for each in local).items())
    assert await counted(filled, "hour_of_day", time_zone=name) == hours
    week = sorted(Counter((each.isoweekday(), each.hour) for each in local).items())
    assert await counted(filled, ("weekday", "hour_of_day"), time_zone=name) == [(*key, n) for key, n in week]

    def day_of(at: datetime) -> datetime:
        midnight = at.astimezone(zone).replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
        return midnight.astimezone(UTC)

    days = await counted(filled, bucket="1d", time_zone=name)
    assert [(at.astimezone(UTC), calls) for at, calls in days] == sorted(Counter(map(day_of, TIMES)).items())
    assert all(at.tzinfo is zone for at, _ in days)
    if name != "Australia/Lord_Howe":  # whose clock moves by half an hour
        offset = timedelta(minutes=30) if name == "Asia/Kolkata" else timedelta()
        whole = [(at - offset).replace(minute=0, second=0, microsecond=0) + offset for at in TIMES]
        hours = await counted(filled, bucket="1h", time_zone=name)
        assert [(at.astimezone(UTC), calls) for at, calls in hours] == sorted(Counter(whole).items())
    quarters = await counted(filled, bucket="6h", time_zone=name)
    assert {at.hour for at, _ in quarters} <= {0, 6, 12, 18, 1}


async def test_an_hour_that_the_clock_shows_twice_is_two_buckets(store: GatewayStore) -> None:
    """02:30 in Berlin, in summer time and an hour later, and the day that holds both."""
    for number, at in enumerate(("2026-10-25T00:30", "2026-10-25T01:30")):
        await store.audit.write(make_event(request_id=f"z-{number}", timestamp=datetime.fromisoformat(at + "+00:00")))

    hours = await store.audit.stats(bucket="1h", time_zone="Europe/Berlin")
    assert [row["bucket"].isoformat() for row in hours] == ["2026-10-25T02:00:00+02:00", "2026-10-25T02:00:00+01:00"]
    assert await counted(store, "hour_of_day", time_zone="Europe/Berlin") == [(2, 2)]
    (day,) = await store.audit.stats(bucket="1d", time_zone="Europe/Berlin")
    assert (day["bucket"].isoformat(), day["calls"]) == ("2026-10-25T00:00:00+02:00", 2)


@POSTGRES
@cases("name", ["Europe/Atlantis", "", "../etc/passwd", "/etc/passwd", "Europe", "\0", "x" * 5000])
async def test_an_unknown_zone_is_refused(store: GatewayStore, name: str) -> None:
    with pytest.raises(ValueError, match="time_zone must be the name of a zone"):
        await store.audit.stats(time_zone=name)
    with pytest.raises(TypeError, match="time_zone must be text"):
        await store.audit.stats(time_zone=1)  # type: ignore[arg-type]


async def test_events_of_any_year_have_an_hour(store: GatewayStore) -> None:
    for number, at in enumerate((datetime.min, datetime.max)):
        await store.audit.write(make_event(request_id=f"z-{number}", timestamp=at.replace(tzinfo=UTC)))

    assert await counted(store, "hour_of_day") == [(0, 1), (23, 1)]
    assert sum(row["calls"] for row in await store.audit.stats("weekday", time_zone="America/New_York")) == 2
