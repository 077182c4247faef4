"""`gateway-store demo --events N`: a history that is the same for the same seed, and that is worth looking at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from agent_gateway_store import AuditEvent, SyncGatewayStore
from agent_gateway_store.demo.history import DAYS, Call, history
from agent_gateway_store.demo.world import SLOW, TROUBLEMAKER
from commands import gateway_store

END = datetime(2026, 5, 20, 17, tzinfo=UTC)
KEYS = {"coding-agent": "k-1"}


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    """A history that is large enough to see its habits."""
    return list(history(8_000, seed=7, end=END, keys=KEYS))


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[tuple[SyncGatewayStore, dict[str, Any]]]:
    """A store that the command filled, and what it said."""
    said = gateway_store("demo", "--events", "1500", "--until", "2026-05-20T17:00:00", "--json").json
    with SyncGatewayStore(f"sqlite:///{tmp_path}/gateway-demo.db") as store:
        yield store, said


def dumped(calls: list[Call]) -> list[Any]:
    """Everything that was made, but for the tokens, which are nobody's."""
    approvals = [call.approval for call in calls if call.approval]
    return [
        [call.event.model_dump() for call in calls],
        [each.request.model_dump(exclude={"token"}) for each in approvals],
        [each.vote and each.vote.model_dump() for each in approvals],
    ]


def hour_of(event: AuditEvent) -> datetime:
    """The hour in which it was."""
    return event.timestamp.replace(minute=0, second=0, microsecond=0)


def test_the_same_seed_gives_the_same_history() -> None:
    """To the last digit; another seed, number or end gives another, with ids of its own."""
    first, again = (list(history(400, seed=1, end=END, keys=KEYS)) for _ in range(2))

    assert dumped(first) == dumped(again)
    for other in (
        history(400, seed=2, end=END, keys=KEYS),
        history(401, seed=1, end=END, keys=KEYS),
        history(400, seed=1, end=END + timedelta(hours=1), keys=KEYS),
    ):
        ids = {call.event.request_id for call in other}
        assert not ids & {call.event.request_id for call in first}


def test_the_history_is_complete_and_in_order(calls: list[Call]) -> None:
    """So many calls, oldest first, in the two weeks before the end, each with an id of its own."""
    times = [call.event.timestamp for call in calls]

    assert len(calls) == len({call.event.request_id for call in calls}) == 8_000
    assert times == sorted(times)
    assert END - timedelta(days=DAYS) <= times[0] <= times[-1] <= END


def test_there_is_something_to_find(calls: list[Call]) -> None:
    """Office hours, nights that are busy, a burst of denials of one caller, a slow database, a policy that changed."""
    events = [call.event for call in calls]
    hours = Counter(event.timestamp.hour for event in events if event.caller_id == "coding-agent")
    assert hours[10] > 10 * hours[3]
    nights = Counter(event.timestamp.hour for event in events if event.caller_id == "reporting-agent")
    assert nights[2] > 5 * nights[12]

    denied = [event for event in events if event.decision == "DENY"]
    [(worst, most), (_, second)] = Counter(map(hour_of, denied)).most_common(2)
    assert most > 5 * second
    probing = [event for event in denied if hour_of(event) == worst]
    assert sum(event.caller_id == TROUBLEMAKER for event in probing) > 0.9 * len(probing)

    queries = [e for e in events if e.tool_name == "run_query" and e.execution_status == "SUCCESS"]
    slow_from = SLOW.start(END)
    slow = [e.latency_ms for e in queries if slow_from <= e.timestamp < slow_from + SLOW.length]
    assert median(slow) > 4 * median(e.latency_ms for e in queries)

    exports = [e for e in events if e.tool_name == "export_contacts" and "PROBING" not in e.risk_labels]
    asked = [event.timestamp for event in exports if event.decision == "APPROVAL_REQUIRED"]
    assert asked
    assert min(asked) >= END - timedelta(days=7)


def test_approvals_tell_the_same_as_their_events(calls: list[Call]) -> None:
    """A call ran only if it was approved, by whom the vote says; nobody decides after the end or the deadline."""
    approvals = [(call.event, call.approval) for call in calls if call.approval]

    assert {str(approval.request.status) for _, approval in approvals} == {"USED", "DENIED", "EXPIRED"}
    for event, approval in approvals:
        request, vote = approval.request, approval.vote
        assert event.decision == "APPROVAL_REQUIRED"
        assert (event.execution_status is not None) == (request.status == "USED")
        assert event.execution_status == request.outcome
        assert event.approver_id == request.approver_id == (vote.approver_id if vote else None)
        assert (vote is None) == (request.status == "EXPIRED")
        if vote is not None:
            assert request.created_at <= vote.voted_at <= min(END, request.expires_at or END)
            assert vote.decision == ("DENIED" if request.status == "DENIED" else "APPROVED")


def test_the_command_fills_a_store(filled: tuple[SyncGatewayStore, dict[str, Any]]) -> None:
    """Events as its summary says, approvals that pages show, keys, and four approvals that can be decided now."""
    store, said = filled

    assert said["events"] == {"STORED": 1500}
    assert (said["until"], said["since"]) == ("2026-05-20T17:00:00+00:00", "2026-05-06T17:00:00+00:00")
    events = store.audit.list_recent(2_000)
    assert len(events) == 1500
    assert all(later.timestamp >= sooner.timestamp for later, sooner in pairwise(events))
    asked = {event.request_id for event in events if event.decision == "APPROVAL_REQUIRED"}
    history = [each for each in store.approvals.list_requests(limit=500) if each.status != "PENDING"]
    assert {each.request_id for each in history} == asked
    assert len(asked) == said["approvals"]
    waiting = store.approvals.list_requests("PENDING")
    assert len(waiting) == said["pending"] == 4
    assert store.approvals.approve(approval_id=waiting[0].approval_id, approver_id="alice").status == "APPROVED"
    assert {key.caller_id for key in store.keys.list()} == {event.caller_id for event in events}


def test_filling_twice_doubles_nothing(filled: tuple[SyncGatewayStore, dict[str, Any]]) -> None:
    """The same history is known; no event and no approval is written a second time."""
    store, _ = filled
    before = (len(store.audit.list_recent(5_000)), len(store.approvals.list_requests(limit=500)))

    again = gateway_store("demo", "--events", "1500", "--until", "2026-05-20T17:00:00", "--json").json

    assert again["events"] == {"DUPLICATE": 1500}
    assert (len(store.audit.list_recent(5_000)), len(store.approvals.list_requests(limit=500))) == before


def test_it_tells_people_what_to_do_next() -> None:
    """What was written, and the lines to paste into a notebook; nothing on standard error where it is no terminal."""
    outcome = gateway_store("--org", "acme", "demo", "--events", "60", "--seed", "3")

    assert (outcome.code, outcome.err) == (0, "")
    assert "60 STORED" in outcome.out
    assert 'SyncGatewayStore("sqlite:///gateway-demo.db")' in outcome.out
    with SyncGatewayStore("sqlite:///gateway-demo.db") as store:
        assert {event.org_id for event in store.audit.list_recent()} == {"acme"}
        assert {each.org_id for each in store.approvals.list_requests()} == {"acme"}


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_a_wrong_number_is_refused(number: str) -> None:
    """As every wrong option."""
    assert gateway_store("demo", "--events", number).code == 2


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ("2026-03-02T18:00Z", "2026-03-02T18:00:00+00:00"),
        ("2026-03-02T18:00+02:00", "2026-03-02T16:00:00+00:00"),
        ("2026-03-02", "2026-03-02T00:00:00+00:00"),
    ],
)
def test_the_end_may_be_a_time(given: str, end: str) -> None:
    """Of any zone; UTC if it names none."""
    assert gateway_store("demo", "--events", "10", "--until", given, "--json").json["until"] == end


def test_the_end_may_be_so_long_ago() -> None:
    """As `since` and `until` are everywhere."""
    before = datetime.now(UTC)

    said = gateway_store("demo", "--events", "10", "--until", "2d", "--json").json

    assert before <= datetime.fromisoformat(said["until"]) + timedelta(days=2) <= datetime.now(UTC)


def test_the_history_ends_with_the_last_full_hour() -> None:
    """If nobody says when."""
    before = datetime.now(UTC)

    end = datetime.fromisoformat(gateway_store("demo", "--events", "10", "--json").json["until"])

    assert (end.minute, end.second, end.microsecond) == (0, 0, 0)
    assert before - timedelta(hours=1) < end <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--events", "10", "--until", "soon"), ("--until", "2026-05-01T12:00Z", "24h")),
        (("--events", "10", "--until", "0001-01-01"), ("--until", "1970")),
        (("--events", "10", "--until", "99999999w"), ("--until", "1970")),
        (("--events", "10", "--until", "9999-12-31T23:59"), ("--until", "9998")),
        (("--until", "24h"), ("--until", "--events")),
    ],
)
def test_a_wrong_end_is_refused(options: tuple[str, ...], words: tuple[str, ...]) -> None:
    """With what to give instead; nothing is written."""
    outcome = gateway_store("demo", *options)

    assert outcome.code == 2
    assert [word for word in words if word not in outcome.err] == []
    assert not Path("gateway-demo.db").exists()
