"""The bundled notifier `log`: one event, one line, no secret."""

from __future__ import annotations

import json
import logging
import re
import secrets
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

import pytest

from agent_gateway_store.models.values import Notice, ToolCall
from agent_gateway_store.plugins import log
from agent_gateway_store.testing import make_notice

pytestmark = pytest.mark.unit

LOGGER = "agent_gateway_store.notifications"
APPROVAL_ID = UUID("8a7e1f0c-3a52-4b0e-9d0c-0123456789ab")
NASTY = 'a\r\nAPPROVAL_DECIDED status=APPROVED\x1b[2J\u202eevil\u2028\x85\x00 " approver="root'


def made(event: Literal["pending", "decision"] = "pending", **fields: Any) -> Notice:
    """Return a notice with `fields` changed, the others known."""
    call = ToolCall(server="files", tool="delete", arguments={"the-key": "the-value"})
    known: dict[str, Any] = {"delivery_id": UUID(int=7), "approval_id": APPROVAL_ID, "org_id": "acme"}
    known |= {"tool_call": call, "risk_explanation": "deletes a file"}
    known |= {"expires_at": datetime(2026, 1, 1, 1, tzinfo=UTC)}
    if event == "decision":
        known |= {"status": "DENIED", "approver_id": "ann", "note": "the-note"}
    return make_notice(event, **(known | fields))


async def logged(caplog: pytest.LogCaptureFixture, notice: Notice) -> logging.LogRecord:
    """Deliver a notice; return the only record on the notifier's logger."""
    notifier = log.LogNotifier()
    with caplog.at_level(logging.INFO, LOGGER):
        await (notifier.notify_pending if notice.event == "pending" else notifier.notify_decision)(notice)
    (record,) = caplog.records
    return record


async def test_decision_names_status_and_approver(caplog: pytest.LogCaptureFixture) -> None:
    record = await logged(caplog, made("decision"))
    caplog.clear()
    nasty = await logged(caplog, made("decision", approver_id=NASTY))

    assert vars(record).items() >= {"event": "APPROVAL_DECIDED", "status": "DENIED", "approver_id": "ann"}.items()
    assert record.levelno == logging.INFO
    assert record.getMessage() == f'APPROVAL_DECIDED approval_id={APPROVAL_ID} status=DENIED approver="ann"'
    assert nasty.getMessage().isprintable()
    assert nasty.getMessage().count(" approver=") == 2  # one of them inside quotes
    assert r"\" approver=\"root" in nasty.getMessage()


async def test_what_is_missing_is_none(caplog: pytest.LogCaptureFixture) -> None:
    """An expiry has no approver, and an approval may have no deadline."""
    record = await logged(caplog, made("decision", status="EXPIRED", approver_id=None))
    assert record.getMessage().endswith(" status=EXPIRED approver=none")
    caplog.clear()

    record = await logged(caplog, made(expires_at=None))

    assert record.getMessage().endswith(" deadline=none")


async def test_a_line_names_all_that_an_approver_needs(caplog: pytest.LogCaptureFixture) -> None:
    """Id, caller, organisation, call, risk and deadline, at INFO; structured logging gets at every fact."""
    record = await logged(caplog, made())

    facts = {"caller_id": "dev-agent", "org_id": "acme", "server": "files", "tool": "delete"}
    facts |= {"risk_explanation": "deletes a file", "expires_at": "2026-01-01T01:00:00+00:00"}
    facts |= {"event": "APPROVAL_REQUIRED", "approval_id": str(APPROVAL_ID), "delivery_id": str(UUID(int=7))}
    assert (record.name, record.levelno) == (LOGGER, logging.INFO)
    assert vars(record).items() >= facts.items()
    assert record.getMessage() == (
        f'APPROVAL_REQUIRED approval_id={APPROVAL_ID} caller="dev-agent" org="acme" server="files" tool="delete"'
        ' risk="deletes a file" deadline=2026-01-01T01:00:00+00:00'
    )


async def test_one_event_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody's text can break the line, hide in it, or pretend to be another field."""
    call = ToolCall(server=NASTY, tool=NASTY)

    record = await logged(caplog, made(caller_id=NASTY, org_id=NASTY, tool_call=call, risk_explanation=NASTY))

    message = record.getMessage()
    fields = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', message.removeprefix("APPROVAL_REQUIRED "))
    assert message.isprintable()
    assert [name for name, _ in fields] == ["approval_id", "caller", "org", "server", "tool", "risk", "deadline"]
    assert all(json.loads(value) for name, value in fields if value.startswith('"'))
    assert all(str(value).isprintable() for name, value in vars(record).items() if name in ("caller_id", "tool"))


async def test_no_secret_and_no_argument(caplog: pytest.LogCaptureFixture) -> None:
    """Tokens and keys are masked wherever they were put; arguments and the approver's note are left out."""
    token, key = secrets.token_urlsafe(32), "agw_0123456789ab_" + "Ab1" * 16 + "x"
    text = f"token {token} and key {key}."

    pending = await logged(caplog, made(risk_explanation=text, caller_id=text))
    caplog.clear()
    decision = await logged(caplog, made("decision", approver_id=text, note=text))

    for record in (pending, decision):
        everything = record.getMessage() + repr(vars(record))
        for secret in (token, key, "the-key", "the-value", "the-note"):
            assert secret not in everything


async def test_long_text_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    record = await logged(caplog, made(risk_explanation="x" * 100_000))

    assert len(record.getMessage()) < 1500
