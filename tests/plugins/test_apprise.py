"""The notifier `apprise`: one adapter, its secrets kept."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import pytest
from notifier_helpers import OK, PASSWORD, apprise_notifier, decided, serving, status

from agent_gateway_store._text import CUT_CALL
from agent_gateway_store.errors import NotDeliveredError
from agent_gateway_store.models.values import ToolCall
from agent_gateway_store.plugins.apprise import AppriseNotifier, AppriseSettings
from agent_gateway_store.testing import make_notice

# Apprise loads PGPy, which loads a module that Python is about to remove.
pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore:.imghdr. is deprecated:DeprecationWarning")]
NASTY = "a\nTo: all\r\n\x1b[2J\u202e <b>bold</b> \\n :smile: @everyone"


async def test_tells_of_question_and_answer() -> None:
    notice = make_notice(expires_at=datetime(2031, 1, 1, 12, tzinfo=UTC))
    async with serving(OK) as server:
        notifier = apprise_notifier(server.port)
        await notifier.notify_pending(notice)
        await notifier.notify_decision(decided(notice))

    asked, answered = (request.json for request in server.requests)
    assert asked["title"] == "Approval needed: delete_file"
    told = ("dev-agent", "files / delete_file", "It deletes a file.", "2031-01-01 12:00 UTC", str(notice.approval_id))
    assert [text for text in told if text not in asked["message"]] == []
    assert "old.txt" not in str(asked)  # who reads along is not known
    assert answered["title"] == "Approval denied: delete_file"
    assert "By: ann" in answered["message"]


async def test_texts_stay_one_line_and_plain() -> None:
    async with serving(OK) as server:
        await apprise_notifier(server.port).notify_pending(make_notice(caller_id=NASTY, risk_explanation=NASTY))

    message = server.requests[0].json["message"]
    assert len(message.splitlines()) == 5
    assert message.replace("\n", "").isprintable()
    assert "<b>bold</b>" in message
    assert ":smile:" in message


async def test_a_cut_text_says_so_and_how_to_see_the_rest() -> None:
    """It ends in an ellipsis, and the last line is the command that shows all of it."""
    notice = make_notice(risk_explanation="why " * 2_000)
    async with serving(OK) as server:
        await apprise_notifier(server.port).notify_pending(notice)

    *_, why, _deadline, rest = server.requests[0].json["message"].splitlines()
    assert why.endswith("\N{HORIZONTAL ELLIPSIS}")
    assert len(why) < 2_000
    assert rest == f"All of it: gateway-store approvals show {notice.approval_id}"


async def test_a_call_that_was_not_stored_whole_says_so() -> None:
    notice = make_notice(tool_call=ToolCall(server="s", tool="t", arguments={"a": ["[cut: 1 more items]"]}))
    async with serving(OK, OK) as server:
        await apprise_notifier(server.port).notify_pending(notice)

    *_, warning, rest = server.requests[0].json["message"].splitlines()
    assert warning == CUT_CALL
    assert rest == f"What is stored: gateway-store approvals show {notice.approval_id}"


async def test_one_failure_is_not_delivered() -> None:
    """Apprise tells of all services at once: the notice comes again."""
    async with serving(OK) as good, serving(status("500 Oops")) as bad:
        with pytest.raises(NotDeliveredError):
            await apprise_notifier(good.port, bad.port).notify_pending(make_notice())

    assert len(good.requests) == 1


@pytest.mark.parametrize("url", [f"nosuch://{PASSWORD}@host", f"json://:{PASSWORD}@", f"{PASSWORD}"])
async def test_unknown_urls_are_told_by_number(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Apprise itself logs such a URL with all that is in it; that is kept back."""
    settings = AppriseSettings(urls=["json://127.0.0.1", url])  # type: ignore[list-item]
    with caplog.at_level(logging.DEBUG), pytest.raises(ValueError, match="URL number 2") as caught:
        AppriseNotifier(settings)

    assert PASSWORD not in str(caught.value) + caplog.text + repr(settings)
