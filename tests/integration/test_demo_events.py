"""`gateway-store demo --events N`: a history that is the same for the same seed, and that is worth looking at."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from agent_gateway_store import SyncGatewayStore
from agent_gateway_store.demo.history import DAYS, Call, history
from commands import gateway_store

END = datetime(2026, 5, 20, 17, tzinfo=UTC)
KEYS = {"coding-agent": "k-1"}


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    """A history that is large enough to see its habits."""
    return list(history(8_000, seed=7, end=END, keys=KEYS))


def dumped(calls: list[Call]) -> list[Any]:
    """Everything that was made, but for the tokens, which are nobody's."""
    approvals = [call.approval for call in calls if call.approval]
    return [
        [call.event.model_dump() for call in calls],
        [each.request.model_dump(exclude={"token"}) for each in approvals],
        [each.vote and each.vote.model_dump() for each in approvals],
    ]


def test_the_same_seed_gives_the_same_history() -> None:
    first, again = (list(history(400, seed=1, end=END, keys=KEYS)) for _ in range(2))

    assert dumped(first) == dumped(again)
    for other in (
        history(400, seed=2, end=END, keys=KEYS),
        history(401, seed=1, end=END, keys=KEYS),
        history(400, seed=1, end=END + timedelta(hours=1), keys=KEYS),
    ):
        ids = {call.event.request_id for call in other}
        assert not ids & {call.event.request_id for call in first}


def test_there_is_something_to_find(calls: list[Call]) -> None:
    """Office hours, nights that are busy, a policy that changed; calls in order, each with an id of its own."""
    events = [call.event for call in calls]
    times = [event.timestamp for event in events]
    assert len(events) == len({event.request_id for event in events}) == 8_000
    assert times == sorted(times)
    assert END - timedelta(days=DAYS) <= times[0] <= times[-1] <= END
    hours = Counter(event.timestamp.hour for event in events if event.caller_id == "coding-agent")
    assert hours[10] > 10 * hours[3]
    nights = Counter(event.timestamp.hour for event in events if event.caller_id == "reporting-agent")
    assert nights[2] > 5 * nights[12]
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


def test_the_command_fills_a_store(tmp_path: Path) -> None:
    """Events as its summary says, approvals that pages show, keys, and four approvals that can be decided now; once."""
    fill = ("demo", "--events", "1500", "--until", "2026-05-20T17:00:00", "--json")
    said = gateway_store(*fill).json

    with SyncGatewayStore(f"sqlite:///{tmp_path}/gateway-demo.db") as store:
        assert said["events"] == {"STORED": 1500}
        assert (said["until"], said["since"]) == ("2026-05-20T17:00:00+00:00", "2026-05-06T17:00:00+00:00")
        assert gateway_store(*fill).json["events"] == {"DUPLICATE": 1500}
        events = store.audit.list_recent(2_000)
        assert len(events) == 1500
        assert all(later.timestamp >= sooner.timestamp for later, sooner in pairwise(events))
        asked = {event.request_id for event in events if event.decision == "APPROVAL_REQUIRED"}
        history = [each for each in store.approvals.list_requests(limit=500) if each.status != "PENDING"]
        assert {each.request_id for each in history} == asked
        assert len(history) == len(asked) == said["approvals"]
        waiting = store.approvals.list_requests("PENDING")
        assert len(waiting) == said["pending"] == 4
        assert store.approvals.approve(approval_id=waiting[0].approval_id, approver_id="alice").status == "APPROVED"
        assert {key.caller_id for key in store.keys.list()} == {event.caller_id for event in events}


def test_it_tells_people_what_to_do_next() -> None:
    """What was written, and the lines to paste into a notebook; nothing on standard error where it is no terminal."""
    outcome = gateway_store("--org", "acme", "demo", "--events", "60", "--seed", "3")

    assert (outcome.code, outcome.err) == (0, "")
    assert "60 STORED" in outcome.out
    assert 'SyncGatewayStore("sqlite:///gateway-demo.db")' in outcome.out
    with SyncGatewayStore("sqlite:///gateway-demo.db") as store:
        assert {event.org_id for event in store.audit.list_recent()} == {"acme"}
        assert {each.org_id for each in store.approvals.list_requests()} == {"acme"}


def test_the_end_may_be_a_time_or_so_long_ago() -> None:
    def end(*options: str) -> datetime:
        return datetime.fromisoformat(gateway_store("demo", "--events", "10", "--json", *options).json["until"])

    now, hour = datetime.now(UTC), timedelta(hours=1)
    assert end("--until", "2026-03-02T18:00+02:00") == datetime(2026, 3, 2, 16, tzinfo=UTC)
    assert end("--until", "2026-03-02") == datetime(2026, 3, 2, tzinfo=UTC)
    assert now <= end("--until", "2d") + timedelta(days=2) <= datetime.now(UTC)
    last = end()
    assert (last.minute, last.second, last.microsecond) == (0, 0, 0)
    assert now - hour < last <= datetime.now(UTC)


def test_a_wrong_end_is_refused() -> None:
    for options, words in (
        (("--events", "0"), ("--events",)),
        (("--events", "10", "--until", "soon"), ("--until", "2026-05-01T12:00Z", "24h")),
        (("--events", "10", "--until", "0001-01-10"), ("--until", "1970 to 9998")),
        (("--until", "24h"), ("--until", "--events")),
    ):
        outcome = gateway_store("demo", *options)

        assert outcome.code == 2
        assert [word for word in words if word not in outcome.err] == []
    assert not Path("gateway-demo.db").exists()
