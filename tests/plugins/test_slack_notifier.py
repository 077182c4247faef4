"""The notifier `slack` against a stand-in for Slack's API."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from notifier_helpers import decided
from slack_sdk import WebClient
from slack_sdk.models.blocks import ActionsBlock, Block, ButtonElement
from slack_server import CHANNEL, TOKEN, Slack, fault_in, slack_notifier, slack_running

from agent_gateway_store._text import CUT_CALL
from agent_gateway_store.errors import NotDeliveredError
from agent_gateway_store.models.values import ToolCall
from agent_gateway_store.plugins.slack.messages import decided_message, pending_message
from agent_gateway_store.testing import make_notice

pytestmark = pytest.mark.unit

NASTY = "<!channel> <@U1> <#C1> <https://evil.example|Approve> & `code` ```block``` *b* _i_ ~s~ > q\n# h\r\x1b[2J\u202e"
NASTY += " @here"


def texts_of(message: dict[str, Any]) -> str:
    return json.dumps(message, ensure_ascii=False)


def methods(slack: Slack) -> list[str]:
    return [method for method, _ in slack.calls]


def consequence(arguments: dict[str, Any]) -> tuple[str, str]:
    """What one confirms with these arguments, and the whole message."""
    message = pending_message(make_notice(tool_call=ToolCall(server="files", tool="delete_file", arguments=arguments)))
    return message["blocks"][-1]["elements"][0]["confirm"]["text"]["text"], texts_of(message)


class TestMessage:
    async def test_question_has_all_an_approver_needs(self) -> None:
        """The call, its arguments, the risk, the deadline in the reader's own time, and two buttons that ask back."""
        notice = make_notice(expires_at=datetime(2031, 1, 1, 12, tzinfo=UTC))
        async with slack_running() as slack:
            await slack_notifier(slack.api_url).notify_pending(notice)

        (message,) = slack.messages.values()
        shown = texts_of(message)
        told = (
            "`files` / `delete_file`",
            "`dev-agent`",
            "It deletes a file.",
            "reports/old.txt",
            "2031-01-01 12:00 UTC",
        )
        assert [text for text in told if text not in shown] == []
        assert f"<!date^{int(notice.expires_at.timestamp())}^" in shown  # type: ignore[union-attr]
        blocks = Block.parse_all(message["blocks"])
        (actions,) = [block for block in blocks if isinstance(block, ActionsBlock)]
        buttons = [element for element in actions.elements if isinstance(element, ButtonElement)]
        assert [button.action_id for button in buttons] == ["gateway_store_approve", "gateway_store_deny"]
        assert {button.value for button in buttons} == {str(notice.approval_id)}
        assert all(button.confirm is not None for button in buttons)
        assert message["metadata"]["event_payload"]["approval_id"] == str(notice.approval_id)

    def test_text_of_others_stays_text(self) -> None:
        """It mentions nobody, links nowhere, and does not get out of its code."""
        call = ToolCall(server=NASTY, tool=NASTY, arguments={NASTY: NASTY})
        names = dict.fromkeys(("caller_id", "org_id", "request_id", "risk_explanation"), NASTY)
        notice = make_notice(tool_call=call, **names)

        for message in (pending_message(notice), decided_message(decided(notice, approver_id=NASTY, note=NASTY))):
            assert fault_in(message["blocks"]) is None
            for text in re.findall(r'"text": "((?:[^"\\]|\\.)*)"', json.dumps(message["blocks"])):
                plain = json.loads(f'"{text}"')
                assert all(tag.startswith("<!date^") for tag in re.findall(r"<[^>]*", plain))
                outside = re.sub(r"```.*?```|`[^`]*`", "", plain, flags=re.DOTALL)
                assert "evil" not in outside
                assert "@here" not in outside
                assert plain.replace("\n", "").isprintable()
            assert "<" not in message["text"]
            assert all(b["text"]["verbatim"] for b in message["blocks"] if b["type"] == "section")

    @pytest.mark.parametrize("unit", ["x", "&", "\x00", "文", "`", "\U000e0001", "\ud800"])
    def test_limits_of_slack_are_kept(self, unit: str) -> None:
        long = unit * 100_000
        call = ToolCall(server=long, tool=long, arguments={"a": long, **{f"{unit}{n}": [long] * 3 for n in range(20)}})
        names = dict.fromkeys(("caller_id", "org_id", "request_id", "risk_explanation"), long)
        notice = make_notice(tool_call=call, **names)

        for message in (pending_message(notice), decided_message(decided(notice, approver_id=long, note=long))):
            assert fault_in(message["blocks"]) is None
            assert len(message["text"]) < 4000
            assert "…" in texts_of(message)

    def test_approving_what_is_not_all_shown_says_so(self) -> None:
        """Nobody approves a call as shown whose arguments were cut; a name that begins like a key is shown."""
        for shown in ({"path": "/tmp/old.log"}, {"table": "agw_prod-customers_all"}):
            text, message = consequence(shown)
            assert text == "The call runs once, as shown."
            assert str(*shown.values()) in message
            assert "(cut to fit)" not in message
        for hidden in ({"note": "x" * 5000, "path": "/"}, {"note": "&" * 2600}, {f"k{n}": "v" * 50 for n in range(99)}):
            text, message = consequence(hidden)
            assert text == "The call runs once. Not all of it is shown here!"
            assert "(cut to fit)" in message

    @pytest.mark.parametrize("secret", ["agw_0123456789ab_" + "Ab1" * 16 + "x", "A1b" + "x" * 40])
    def test_approving_what_is_masked_says_so(self, secret: str) -> None:
        """Whoever chooses the text can choose one that looks like a key."""
        text, message = consequence({"table": secret})

        assert text.endswith("Not all of it is shown here!")
        assert "`***` what looks like a key" in message
        assert secret not in message

    @pytest.mark.parametrize("hidden", [{"cmd": "[cut: 3 more entries]"}, {"n[cut: 1 more bytes]~2": 1}])
    def test_a_call_that_was_not_stored_whole_says_so(self, hidden: dict[str, Any]) -> None:
        """In the message and where one confirms; no command is said to have it whole."""
        notice = make_notice(tool_call=ToolCall(server="s", tool="t", arguments=hidden))
        message = pending_message(notice)

        assert fault_in(message["blocks"]) is None
        assert CUT_CALL in message["blocks"][-1]["elements"][0]["confirm"]["text"]["text"]
        assert any(CUT_CALL in block["text"]["text"] for block in message["blocks"] if block["type"] == "section")
        long = notice.tool_call.model_copy(update={"arguments": hidden | {"a": "x" * 5_000}})
        for each in (message, pending_message(make_notice(tool_call=long)), decided_message(decided(notice))):
            assert "whole" not in texts_of(each).replace(CUT_CALL, "")

    def test_answer_has_no_buttons(self) -> None:
        for status, approver in (("APPROVED", "ann"), ("DENIED", "ann"), ("EXPIRED", None), ("CANCELLED", None)):
            message = decided_message(decided(make_notice(), status=status, approver_id=approver))

            assert "actions" not in {block["type"] for block in message["blocks"]}
            assert status.capitalize() in texts_of(message)
            assert ("`ann`" in texts_of(message)) is (approver is not None)

    def test_approval_tokens_are_masked(self) -> None:
        token = "Abc123xyz-Abc123xyz_Abc123xyz-Abc123xyz_Abc"
        assert token not in texts_of(pending_message(make_notice(risk_explanation=token)))


class TestUpdate:
    async def test_question_becomes_the_answer(self) -> None:
        """One message from first to last; one that was deleted meanwhile is posted anew."""
        notice, other = make_notice(), make_notice()
        async with slack_running() as slack:
            notifier = slack_notifier(slack.api_url)
            await notifier.notify_pending(notice)
            await notifier.notify_decision(decided(notice))
            (message,) = slack.messages.values()
            await notifier.notify_pending(other)
            slack.messages.clear()
            await notifier.notify_decision(decided(other))

        assert "Denied by `ann`" in texts_of(message)
        assert "gateway_store_approve" not in texts_of(message)
        assert methods(slack)[:2] == ["chat.postMessage", "chat.update"]
        assert len(slack.messages) == 1

    async def test_message_of_another_process_is_found(self) -> None:
        """By its metadata, among many others, over several pages."""
        notice = make_notice()
        async with slack_running() as slack:
            await slack_notifier(slack.api_url).notify_pending(notice)
            for number in range(450):
                other = f"{datetime.now(UTC).timestamp() + number:.6f}"
                slack.messages[other] = {"type": "message", "ts": other, "text": "chat"}
            await slack_notifier(slack.api_url).notify_decision(decided(notice))

        assert methods(slack) == ["chat.postMessage", *["conversations.history"] * 3, "chat.update"]
        assert sum("Denied by" in texts_of(message) for message in slack.messages.values()) == 1

    async def test_without_the_right_to_read_the_answer_is_its_own_message(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with slack_running() as slack:
            slack.scopes = {"chat:write"}
            notifier = slack_notifier(slack.api_url)
            for _ in range(2):
                await notifier.notify_decision(decided(make_notice()))

        assert len(slack.messages) == 2
        assert caplog.text.count("channels:history") == 1

    async def test_trouble_with_the_history_is_tried_again(self) -> None:
        notice = make_notice()
        async with slack_running() as slack:
            await slack_notifier(slack.api_url).notify_pending(notice)
            slack.answers = [(200, {}, b'{"ok": false, "error": "internal_error"}')]
            other = slack_notifier(slack.api_url)
            with pytest.raises(NotDeliveredError):
                await other.notify_decision(decided(notice))
            await other.notify_decision(decided(notice))

        assert len(slack.messages) == 1


class TestRepeats:
    async def test_repeated_delivery_posts_once(self) -> None:
        """Also where Slack took it and the line broke: the next try looks first."""
        notice = make_notice()
        async with slack_running() as slack:
            slack.lose_answers = 1
            notifier = slack_notifier(slack.api_url)
            with pytest.raises(NotDeliveredError):
                await notifier.notify_pending(notice)
            for _ in range(3):
                await notifier.notify_pending(notice)

        assert len(slack.messages) == 1

    async def test_process_that_died(self) -> None:
        """An old notice may have been posted by another: it is looked for first."""
        notice = make_notice(created_at=datetime.now(UTC) - timedelta(seconds=21))
        async with slack_running() as slack:
            await slack_notifier(slack.api_url).notify_pending(notice)
            await slack_notifier(slack.api_url).notify_pending(notice)
            await slack_notifier(slack.api_url).notify_decision(decided(notice))

        assert len(slack.messages) == 1
        assert methods(slack).count("chat.postMessage") == 1


class TestFailures:
    async def test_rate_limit(self) -> None:
        """429 with Retry-After is passed on, and nothing is sent meanwhile."""
        async with slack_running() as slack:
            slack.answers = [(429, {"Retry-After": "30"}, b"")]
            notifier = slack_notifier(slack.api_url)
            with pytest.raises(NotDeliveredError) as caught:
                await notifier.notify_pending(make_notice())
            with pytest.raises(NotDeliveredError, match="asked for a pause") as later:
                await notifier.notify_pending(make_notice())

        assert len(slack.requests) == 1
        assert 29 < (later.value.retry_after_s or 0) <= 30
        assert (caught.value.retry_after_s, caught.value.is_permanent) == (30, False)

    @pytest.mark.parametrize(
        ("answer", "is_permanent"),
        [
            ((500, {}, b"oops"), False),
            ((302, {"Location": "http://127.0.0.1:1/"}, b""), False),
            ((200, {}, b"<html>"), False),
            ((200, {}, b"[]"), False),
            ((200, {}, b"[" * 100_000), False),
            ((200, {}, b'{"ok": "yes"}'), False),
            ((200, {}, b'{"ok": false, "error": "invalid_auth"}'), False),
            ((200, {}, b'{"ok": false, "error": "invalid_blocks"}'), True),
            ((200, {}, b'{"ok": false, "error": {"a": "\\n"}}'), False),
        ],
    )
    async def test_refusals(self, answer: Any, is_permanent: bool) -> None:
        """Tried again, unless the same message can never be taken."""
        async with slack_running() as slack:
            slack.answers = [answer]
            with pytest.raises(NotDeliveredError) as caught:
                await slack_notifier(slack.api_url).notify_pending(make_notice())

        assert caught.value.is_permanent is is_permanent
        assert str(caught.value).isprintable()

    async def test_gigabyte(self) -> None:
        sent = 0

        async def flood(writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n")
            for _ in range(16_384):
                writer.write(b"x" * 65_536)
                await writer.drain()
                sent += 65_536

        async with slack_running() as slack:
            slack.answers = [flood]
            with pytest.raises(NotDeliveredError, match="longer"):
                await slack_notifier(slack.api_url).notify_pending(make_notice())

        assert sent < 100_000_000


async def test_the_stand_in_is_slack_to_slack_sdk() -> None:
    """Slack's own client posts, reads and updates there; what we post, it reads as its own models."""
    notice = make_notice(approval_id=uuid4())
    async with slack_running() as slack:
        client = WebClient(token=TOKEN, base_url=slack.api_url, proxy=None)
        await slack_notifier(slack.api_url).notify_pending(notice)
        page = await asyncio.to_thread(client.conversations_history, channel=CHANNEL, include_all_metadata=True)
        (message,) = page["messages"]
        posted = await asyncio.to_thread(
            client.chat_postMessage, channel=CHANNEL, text="x", blocks=message["blocks"], metadata=message["metadata"]
        )
        await asyncio.to_thread(
            client.chat_update, channel=CHANNEL, ts=posted["ts"], text="y", blocks=message["blocks"]
        )

    assert message["metadata"]["event_payload"]["approval_id"] == str(notice.approval_id)
    assert [block.type for block in Block.parse_all(message["blocks"])][-1] == "actions"
    assert slack.messages[posted["ts"]]["text"] == "y"
