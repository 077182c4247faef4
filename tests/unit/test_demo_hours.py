"""`gateway-store demo --events N` has the same things to find, whatever hour of whatever day its history ends."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from functools import cache
from statistics import median

import pytest

from agent_gateway_store import AuditEvent
from agent_gateway_store.demo.history import Call, history
from agent_gateway_store.demo.world import LEAKED, PROBED, SLOW, STOLEN, THIEF_ADDRESS, TROUBLEMAKER, Incident

pytestmark = pytest.mark.unit

MONDAY = datetime(2026, 5, 18, tzinfo=UTC)
HOUR, DAY, WEEK = timedelta(hours=1), timedelta(days=1), timedelta(days=7)
# A morning, an evening and a weekend.
ENDS = [MONDAY + number * (2 * DAY + 9 * HOUR) for number in range(3)]


@cache
def calls_until(end: datetime) -> list[Call]:
    return list(history(3_000, seed=7, end=end, keys={}))


def hour_of(event: AuditEvent) -> datetime:
    return event.timestamp.replace(minute=0, second=0, microsecond=0)


@pytest.mark.parametrize("end", ENDS, ids=lambda end: f"{end:%a-%H}")
def test_the_incident_review_finds_its_incidents(end: datetime) -> None:
    """In the week before the end: the hour of the denials, calls of the same caller that ran, and the slow queries."""
    week = [call.event for call in calls_until(end) if call.event.timestamp >= end - WEEK]

    [(worst, most), (_, second)] = Counter(hour_of(each) for each in week if each.decision == "DENY").most_common(2)
    assert worst == PROBED.start(end)
    assert most > 5 * second
    around = [each for each in week if each.caller_id == TROUBLEMAKER and worst <= each.timestamp < worst + 2 * HOUR]
    assert sum(each.decision != "DENY" for each in around) >= 3
    queries = defaultdict(list)
    for each in week:
        if each.tool_name == "run_query" and each.execution_status is not None:
            queries[hour_of(each)].append(each.latency_ms)
    latencies = {hour: median(found) for hour, found in queries.items() if len(found) >= 5}
    slowest = max(latencies, key=lambda hour: latencies[hour])
    assert slowest - SLOW.start(end) in (timedelta(), HOUR)


@pytest.mark.parametrize("end", ENDS, ids=lambda end: f"{end:%a-%H}")
def test_a_leaked_key_and_retries_can_be_found(end: datetime) -> None:
    """One caller comes from two addresses, by night from the foreign one; some ask again what was denied them."""
    calls = calls_until(end)

    places = defaultdict(set)
    for call in calls:
        places[call.event.caller_id].add(call.event.extra["client"])
    [leaked] = [caller for caller, found in places.items() if len(found) > 1]
    stolen = [call.event for call in calls if call.event.extra["client"] == THIEF_ADDRESS]
    assert {each.caller_id for each in stolen} == {leaked} == {LEAKED}
    assert {hour_of(each) for each in stolen} == {STOLEN.start(end)}
    assert len(stolen) > 10
    denied: dict[tuple[str, str], datetime] = {}
    again = 0
    for call in calls:
        event, asked = call.event, call.approval and call.approval.request
        same = (event.caller_id, event.raw_args_hash)
        again += timedelta() <= event.timestamp - denied.get(same, end) < HOUR
        if asked and asked.status == "DENIED":
            denied[same] = asked.decision_at or end
    assert again >= 2


@pytest.mark.parametrize("incident", [PROBED, SLOW, STOLEN], ids=["probed", "slow", "stolen"])
def test_an_incident_begins_at_its_hour(incident: Incident) -> None:
    for number in range(7 * 24):
        for end in (MONDAY + number * HOUR, MONDAY + number * HOUR - timedelta(microseconds=1)):
            start = incident.start(end)

            assert (start.hour, start.minute, start.second, start.microsecond) == (incident.hour, 0, 0, 0)
            assert incident.age <= end - start < incident.age + DAY
            assert start + incident.length < end
