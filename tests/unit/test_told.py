"""News of a decision are believed only where they are about this token, and young enough by the database's clock."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agent_gateway_store import ApprovalRequest, ToolCall, clock
from agent_gateway_store.approval.told import Look, believed, news_of
from agent_gateway_store.models.approval import ApprovalResult
from agent_gateway_store.models.columns import token_digest
from agent_gateway_store.models.values import ApprovalStatus

pytestmark = pytest.mark.unit

TRUST_S = 2.0
NOW = datetime(2031, 5, 1, 12, tzinfo=UTC)
"""What the database's clock says; the clock of this process says something else."""


def decided(status: str = "APPROVED", **fields: Any) -> ApprovalRequest:
    defaults: dict[str, Any] = {
        "request_id": "r-1",
        "caller_id": "dev-agent",
        "tool_call": ToolCall(server="files", tool="delete_file"),
        "risk_explanation": "deletes",
        "status": ApprovalStatus(status),
        "expires_at": NOW + timedelta(hours=1),
        "approver_id": "alice",
        "approver_note": "ok",
        "decision_at": NOW,
    }
    return ApprovalRequest(**(defaults | fields))


def look(request: ApprovalRequest) -> Look:
    """What a waiter saw who asked SQL just now."""
    result = ApprovalResult(approval_id=request.approval_id, token=request.token, status=ApprovalStatus.PENDING)
    return Look.at(result, read_at=NOW, asked_at=time.monotonic())


def news(request: ApprovalRequest, *, age_s: float = 0.5, **changes: Any) -> str:
    digest = token_digest(request.token or "")
    text = news_of(request, token_sha256=digest, read_at=NOW - timedelta(seconds=age_s))
    return json.dumps(json.loads(text) | changes)


def told(request: ApprovalRequest, text: str, token: str | None = None) -> ApprovalResult | None:
    return believed(text, token or request.token or "", look(request), trust_s=TRUST_S)


@pytest.mark.parametrize("status", ["APPROVED", "DENIED", "CANCELLED", "EXPIRED", "USED"])
def test_news_of_a_decision_say_all_of_it(status: str) -> None:
    """The answer is the one that a read of SQL would give."""
    request = decided(status, approver_note="because \u20ac \u2028 \n")
    result = told(request, news(request))

    assert result == ApprovalResult(
        approval_id=request.approval_id,
        token=request.token,
        status=ApprovalStatus(status),
        approver_id="alice",
        note="because \u20ac \u2028 \n",
        decided_at=NOW,
        expires_at=NOW + timedelta(hours=1),
    )


GARBLED = [
    "",
    "{",
    "null",
    "[]",
    '"APPROVED"',
    "[" * 100_000,
    '{"status":"APPROVED"}',
    "\x00",
    "\ufffd\ufffd",
]


@pytest.mark.parametrize("text", GARBLED, ids=range(len(GARBLED)))
def test_garbled_news_are_not_believed(text: str) -> None:
    """They are a signal to look, no more."""
    assert told(decided(), text) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"approval_id": "11111111-1111-4111-8111-111111111111"},
        {"approval_id": None},
        {"token_sha256": "0" * 64},
        {"token_sha256": None},
        {"status": "PENDING"},
        {"status": "approved"},
        {"status": ["APPROVED"]},
        {"scope": "EVERYTHING"},
        {"org_id": 7},
        {"approver_id": 7},
        {"expires_at": None},
        {"expires_at": "2999-01-01T00:00:00"},
        {"read_at": "never"},
        {"read_at": 10**400},
    ],
    ids=str,
)
def test_news_of_something_else_are_not_believed(changes: dict[str, Any]) -> None:
    """Neither about another approval or token, nor with a field that is not what it should be."""
    request = decided()

    assert told(request, news(request, **changes)) is None
    assert told(request, news(request)) is not None


def test_news_to_a_token_that_was_replaced_are_not_believed() -> None:
    """Who waits by the old token of an approval that was asked for again must be told that it is gone."""
    request = decided()

    assert told(request, news(request), token="the-token-before") is None


@pytest.mark.parametrize("age_s", [TRUST_S, 10 * TRUST_S, -1.0, -3600.0])
def test_late_news_of_what_can_still_change_are_not_believed(age_s: float) -> None:
    """Redis may hang and deliver an APPROVED that was cancelled since; what is final stays true."""
    assert told(decided(), news(decided(), age_s=age_s)) is None
    for status in ("DENIED", "CANCELLED", "USED"):
        request = decided(status)
        assert told(request, news(request, age_s=age_s)) is not None


@pytest.mark.parametrize("hours", [-30, 0, 30])
def test_the_clock_of_the_process_does_not_matter(hours: int) -> None:
    """The age of news is told by the database's clock, whatever this machine believes the time to be."""
    clock.move(timedelta(hours=hours))
    request = decided()

    assert told(request, news(request, age_s=TRUST_S * 0.9)) is not None
    assert told(request, news(request, age_s=TRUST_S)) is None


def test_time_goes_on_between_the_look_and_the_news() -> None:
    """A waiter that looked long ago knows how late it is by now."""
    request = decided()
    result = look(request).result
    long_ago = Look.at(result, read_at=NOW - timedelta(hours=1), asked_at=time.monotonic() - 3600)

    assert believed(news(request), request.token or "", long_ago, trust_s=TRUST_S) is not None
    assert believed(news(request, age_s=TRUST_S), request.token or "", long_ago, trust_s=TRUST_S) is None


@pytest.mark.parametrize("use_before", [None, NOW + timedelta(hours=2)])
def test_news_of_a_permission_that_has_ended_are_not_believed(use_before: datetime | None) -> None:
    """From the deadline on the database decides: it reads as EXPIRED."""
    over = decided(expires_at=NOW - timedelta(seconds=1), use_before=use_before)

    assert (told(over, news(over)) is None) is (use_before is None)


def test_news_are_short() -> None:
    """A decision with a long note goes without news, and whoever waits reads it in SQL."""
    request = decided(approver_note="x" * 10_000)

    assert news_of(request, token_sha256="0" * 64, read_at=NOW) == ""
    assert 0 < len(news_of(decided(), token_sha256="0" * 64, read_at=NOW)) < 1_000
