"""`gateway-store demo --events N` has the same things to find, whatever hour of whatever day its history ends."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from statistics import median

import pytest

from agent_gateway_store import AuditEvent
from agent_gateway_store.demo.history import history
from agent_gateway_store.demo.world import LEAKED, PROBED, SLOW, STOLEN, THIEF_ADDRESS, TROUBLEMAKER, Incident

pytestmark = pytest.mark.unit

MONDAY = datetime(2026, 5, 18, tzinfo=UTC)
HOUR, DAY, WEEK = timedelta(hours=1), timedelta(days=1), timedelta(days=7)
# A morning, an evening and a weekend.
ENDS = [MONDAY + number * (2 * DAY + 9 * HOUR) for number in range(3)]


def hour_of(event: AuditEvent) -> datetime:
    return event.timestamp.replace(minute=0, second=0, microsecond=0)


@pytest.mark.parametrize("end", ENDS, ids=lambda end: f"{end:%a-%H}")
def test_what_is_to_be_found_is_there(end: datetime) -> None:
    """The hour of the denials, the slow queries, a key that leaked, calls that are asked for again after a denial."""
    calls = list(history(3_000, seed=7, end=end, keys={}))
    week = [call.event for call in calls if call.event.timestamp >= end - WEEK]

    [(worst, most), (_, second)] = Counter(hour_of(each) for each in week if each.decision == "DENY").most_common(2)
    assert (worst, most > 5 * second) == (PROBED.start(end), True)
    around = [each for each in week if each.caller_id == TROUBLEMAKER and worst <= each.timestamp < worst + 2 * HOUR]
    assert sum(each.decision != "DENY" for each in around) >= 3
    queries = defaultdict(list)
    for each in week:
        if each.tool_name == "run_query" and each.execution_status is not None:
            queries[hour_of(each)].append(each.latency_ms)
    latencies = {hour: median(found) for hour, found in queries.items() if len(found) >= 5}
    slowest = max(latencies, key=lambda hour: latencies[hour])
    assert slowest - SLOW.start(end) in (timedelta(), HOUR)

    stolen = [call.event for call in calls if call.event.extra["client"] == THIEF_ADDRESS]
    clients = {(call.event.caller_id, call.event.extra["client"]) for call in calls}
    [(leaked, places), (_, one)] = Counter(caller for caller, _ in clients).most_common(2)
    assert (leaked, places, one) == (LEAKED, 2, 1)
    assert {(each.caller_id, hour_of(each)) for each in stolen} == {(LEAKED, STOLEN.start(end))}
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
