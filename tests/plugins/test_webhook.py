"""The notifier `webhook` against real sockets: what is sent, and how it works as a plugin."""

from __future__ import annotations

import json
from typing import Any

import pytest
from notifier_helpers import OK, serving
from standardwebhooks import Webhook, WebhookVerificationError
from webhook_helpers import OLD_SECRET, SECRET, notifier_for

from agent_gateway_store._text import CUT_CALL
from agent_gateway_store.hooks.manager import Plugins
from agent_gateway_store.models.values import ToolCall
from agent_gateway_store.plugins import webhook
from agent_gateway_store.plugins.webhook import MAX_BYTES, body_of
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.testing import make_notice

pytestmark = pytest.mark.unit


class TestWhatIsSent:
    async def test_official_library_verifies_it(self) -> None:
        """Signature, id and time are those of Standard Webhooks; the raw bytes are signed."""
        notice = make_notice(risk_explanation="Löscht 文件 ✂ & <b>")
        async with serving(OK) as server:
            await notifier_for(server).notify_pending(notice)

        (request,) = server.requests
        content = Webhook(SECRET).verify(request.body, request.headers)
        assert request.line == "POST /hook?key=in-the-url HTTP/1.1"
        assert request.headers["webhook-id"] == str(notice.delivery_id)
        assert request.headers["content-type"] == "application/json"
        assert request.headers["host"] == f"127.0.0.1:{server.port}"
        assert content["type"] == "approval.requested"
        assert content["data"]["risk_explanation"] == "Löscht 文件 ✂ & <b>"
        assert content["data"]["tool_call"]["arguments"] == {"path": "reports/old.txt"}
        with pytest.raises(WebhookVerificationError):
            Webhook(OLD_SECRET).verify(request.body, request.headers)

    async def test_either_secret_verifies_during_rotation(self) -> None:
        """One signature for each secret, so that a receiver may have the old one or the new."""
        async with serving(OK) as server:
            await notifier_for(server, SECRET, OLD_SECRET).notify_pending(make_notice())

        (request,) = server.requests
        assert len(request.headers["webhook-signature"].split(" ")) == 2
        for secret in (SECRET, OLD_SECRET):
            Webhook(secret).verify(request.body, request.headers)

    async def test_connection_is_used_again(self) -> None:
        async with serving(OK) as server:
            notifier = notifier_for(server)
            for _ in range(5):
                await notifier.notify_pending(make_notice())

        assert (len(server.requests), server.connections) == (5, 1)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"text": "x" * 1_000_000},
            {"text": "\x01文" * 100_000},
            {f"key-{number}": ["v" * 50] * 50 for number in range(1000)},
            {"list": list(range(100_000))},
            {"number": 10**5000, "nan": float("nan"), "surrogate": "\ud800"},
            {"deep": json.loads("[" * 500 + "]" * 500)},
        ],
        ids=["long", "escapes", "wide", "list", "odd", "deep"],
    )
    def test_stays_below_20_kb_and_says_what_was_cut(self, arguments: dict[str, Any]) -> None:
        """Whatever the arguments and texts are, the body is short JSON, and what is missing can be seen."""
        long = "\x01é" * 100_000
        notice = make_notice(
            tool_call=ToolCall(server=long, tool=long, arguments=arguments),
            **dict.fromkeys(("org_id", "caller_id", "request_id", "risk_explanation", "note", "approver_id"), long),
        )

        body = body_of(notice)

        assert len(body) <= MAX_BYTES
        content = json.loads(body)["data"]
        assert content["arguments_cut"] is True
        assert content["caller_id"].endswith("…")

    def test_short_arguments_are_untouched(self) -> None:
        """Nothing is cut that fits; of a call that was not stored whole a sentence says so."""
        arguments = {"a": [1, 2.5, None, True, {"b": "c"}], "text": "x" * 3000}
        content = json.loads(body_of(make_notice(tool_call=ToolCall(server="s", tool="t", arguments=arguments))))
        cut = ToolCall(server="s", tool="t", arguments={"[cut]": "[cut: 1 more entries]"})

        assert content["data"]["tool_call"]["arguments"] == arguments
        assert (content["data"]["arguments_cut"], content["data"]["warning"]) == (False, "")
        assert json.loads(body_of(make_notice(tool_call=cut)))["data"]["warning"] == CUT_CALL


def test_a_notifier_for_each_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    """`webhook` for the one URL, `webhook-<name>` for each endpoint."""
    endpoints = {"ops": {"url": "https://ops.example/x", "secrets": [SECRET]}}
    monkeypatch.setenv("AGENT_GATEWAY_STORE_WEBHOOK_URL", "https://example.com/hook")
    monkeypatch.setenv("AGENT_GATEWAY_STORE_WEBHOOK_SECRETS", f"{SECRET}, {OLD_SECRET}")
    monkeypatch.setenv("AGENT_GATEWAY_STORE_WEBHOOK_ENDPOINTS", json.dumps(endpoints))
    plugins = Plugins([webhook], environ={"AGENT_GATEWAY_STORE_LOAD_PLUGINS": ""})

    assert set(plugins.notifiers(StoreSettings())) == {"webhook", "webhook-ops"}
