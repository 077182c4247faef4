"""The notifier `webhook` against real sockets: what is sent, and how it works as a plugin."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from notifier_helpers import OK, decided, serving, status
from standardwebhooks import Webhook, WebhookVerificationError
from webhook_helpers import OLD_SECRET, SECRET, notifier_for

from agent_gateway_store.errors import NotDeliveredError
from agent_gateway_store.hooks.dispatch import Dispatcher
from agent_gateway_store.hooks.manager import Plugins
from agent_gateway_store.models.values import ToolCall
from agent_gateway_store.plugins import webhook
from agent_gateway_store.plugins.webhook import WebhookEndpoint, WebhookSettings
from agent_gateway_store.plugins.webhook.notifier import MAX_BYTES, body_of
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

    async def test_signature_by_hand(self) -> None:
        """HMAC-SHA-256 of `id.timestamp.body` under the decoded secret, as the specification has it."""
        async with serving(OK) as server:
            await notifier_for(server).notify_pending(make_notice())

        (request,) = server.requests
        sent = f"{request.headers['webhook-id']}.{request.headers['webhook-timestamp']}.".encode() + request.body
        key = base64.b64decode(SECRET.removeprefix("whsec_"))
        signature = base64.b64encode(hmac.new(key, sent, hashlib.sha256).digest()).decode()
        assert request.headers["webhook-signature"] == f"v1,{signature}"
        assert abs(int(request.headers["webhook-timestamp"]) - time.time()) < 60

    async def test_either_secret_verifies_during_rotation(self) -> None:
        """One signature for each secret, so that a receiver may have the old one or the new."""
        async with serving(OK) as server:
            await notifier_for(server, SECRET, OLD_SECRET).notify_pending(make_notice())

        (request,) = server.requests
        assert len(request.headers["webhook-signature"].split(" ")) == 2
        for secret in (SECRET, OLD_SECRET):
            Webhook(secret).verify(request.body, request.headers)

    async def test_retry_keeps_id_and_body_and_renews_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Receivers drop by id what they have seen, and refuse what is old."""
        notice = make_notice()
        async with serving(status("500 Oops"), OK) as server:
            notifier = notifier_for(server)
            with pytest.raises(NotDeliveredError):
                await notifier.notify_pending(notice)
            _move_clock(monkeypatch, seconds=3)
            await notifier.notify_pending(notice)

        first, second = server.requests
        assert first.headers["webhook-id"] == second.headers["webhook-id"]
        assert first.body == second.body
        assert int(second.headers["webhook-timestamp"]) - int(first.headers["webhook-timestamp"]) in (3, 4)

    async def test_decision(self) -> None:
        """It has a type of its own, and says who decided."""
        async with serving(OK) as server:
            await notifier_for(server).notify_decision(decided(make_notice()))

        content = server.requests[0].json
        assert content["type"] == "approval.decided"
        assert (content["data"]["status"], content["data"]["approver_id"]) == ("DENIED", "ann")

    async def test_connection_is_used_again(self) -> None:
        """Many notices cost one connection."""
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
        """Nothing is cut that fits."""
        arguments = {"a": [1, 2.5, None, True, {"b": "c"}], "text": "x" * 3000}
        content = json.loads(body_of(make_notice(tool_call=ToolCall(server="s", tool="t", arguments=arguments))))

        assert content["data"]["tool_call"]["arguments"] == arguments
        assert content["data"]["arguments_cut"] is False


class TestAsPlugin:
    def test_contributes_nothing_unconfigured(self) -> None:
        """It is installed with the package, and silent."""
        plugins = Plugins([webhook], environ={"AGENT_GATEWAY_STORE_LOAD_PLUGINS": ""})

        assert plugins.notifiers(StoreSettings()) == {}
        assert plugins.records[0].state == "active"

    def test_a_notifier_for_each_receiver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`webhook` for the one URL, `webhook-<name>` for each endpoint."""
        endpoints = {"ops": {"url": "https://ops.example/x", "secrets": [SECRET]}}
        monkeypatch.setenv("AGENT_GATEWAY_STORE_WEBHOOK_URL", "https://example.com/hook")
        monkeypatch.setenv("AGENT_GATEWAY_STORE_WEBHOOK_SECRETS", f"{SECRET}, {OLD_SECRET}")
        monkeypatch.setenv("AGENT_GATEWAY_STORE_WEBHOOK_ENDPOINTS", json.dumps(endpoints))
        plugins = Plugins([webhook], environ={"AGENT_GATEWAY_STORE_LOAD_PLUGINS": ""})

        assert set(plugins.notifiers(StoreSettings())) == {"webhook", "webhook-ops"}

    @pytest.mark.parametrize(
        "values",
        [
            {"SECRETS": SECRET},
            {"URL": "https://example.com/planted-path"},
            {"URL": "https://example.com/planted-path", "SECRETS": "whsec_planted"},
            {"URL": "https://example.com/planted-path", "SECRETS": "planted-secret-without-prefix"},
            {"URL": "http://example.com/planted-path", "SECRETS": SECRET},
            {"URL": "https://user:planted@example.com/", "SECRETS": SECRET},
            {"URL": "https://127.0.0.1/planted-path", "SECRETS": SECRET},
            {"URL": "https://example.com/planted-path", "SECRETS": SECRET, "ALLOWED_NETWORKS": "planted"},
            {"URL": "https://example.com/planted-path", "SECRETS": SECRET, "PROXY": "socks5://planted:1"},
            {"ENDPOINTS": '{"Bad Name": {"url": "https://example.com/planted", "secrets": "' + SECRET + '"}}'},
        ],
    )
    def test_wrong_settings_are_told_without_their_values(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, values: dict[str, str]
    ) -> None:
        """The plugin is broken, and neither its record nor the log repeats what was set."""
        for name, value in values.items():
            monkeypatch.setenv(f"AGENT_GATEWAY_STORE_WEBHOOK_{name}", value)
        plugins = Plugins([webhook], environ={"AGENT_GATEWAY_STORE_LOAD_PLUGINS": ""})

        assert plugins.notifiers(StoreSettings()) == {}
        record = plugins.records[0]
        assert record.state == "broken"
        for text in (record.error or "", caplog.text):
            assert "planted" not in text
            assert SECRET not in text

    async def test_delivers_by_the_dispatcher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In its own thread and event loop; nothing is left open when that ends."""
        async with serving(OK) as server:
            monkeypatch.setenv("AGENT_GATEWAY_STORE_WEBHOOK_URL", server.url)
            monkeypatch.setenv("AGENT_GATEWAY_STORE_WEBHOOK_SECRETS", SECRET)
            monkeypatch.setenv("AGENT_GATEWAY_STORE_WEBHOOK_ALLOW_HTTP", "true")
            monkeypatch.setenv("AGENT_GATEWAY_STORE_WEBHOOK_ALLOWED_NETWORKS", "127.0.0.0/8")
            plugins = Plugins([webhook], environ={"AGENT_GATEWAY_STORE_LOAD_PLUGINS": ""})
            dispatcher = Dispatcher(plugins, StoreSettings())
            reports = await dispatcher.deliver_all(make_notice())
            await dispatcher.aclose(5)

        assert [(report.notifier, report.ok) for report in reports] == [("webhook", True)]
        assert len(server.requests) == 1

    async def test_one_event_loop_after_another(self) -> None:
        """A notifier outlives the loop it was first used in: a stuck one is replaced."""
        async with serving(OK) as server:
            notifier = notifier_for(server)
            for _ in range(3):
                await asyncio.to_thread(lambda: asyncio.run(notifier.notify_pending(make_notice())))

        assert len(server.requests) == 3

    async def test_no_secret_in_any_log(self, caplog: pytest.LogCaptureFixture) -> None:
        """Also at DEBUG, and in no repr and no error: neither the secret nor the URL, which is one, too."""
        said = []
        answers = (OK, status("500 Oops"), status("410 Gone"))
        async with serving(*answers) as server:
            with caplog.at_level(logging.DEBUG):
                notifier = notifier_for(server)
                for _ in answers:
                    try:
                        await notifier.notify_pending(make_notice())
                    except NotDeliveredError as exc:
                        said.append(f"{exc!r}{exc}{exc.__cause__!r}")
        endpoint = WebhookEndpoint(url=server.url, secrets=(SECRET,))  # type: ignore[arg-type]
        settings = WebhookSettings(url=server.url, secrets=[SECRET], allow_http=True, allow_private=True)  # type: ignore
        said += [repr(endpoint), repr(settings), repr(notifier), repr(vars(notifier)), str(settings)]

        for text in (caplog.text, *said, *(repr(vars(record)) for record in caplog.records)):
            assert SECRET not in text
            assert SECRET.removeprefix("whsec_") not in text
            assert "in-the-url" not in text


def test_uses_only_what_a_stranger_could_use() -> None:
    """Of this package, outside `plugins`: models, hooks, errors and `_text`; `settings` for annotations only."""
    folder = Path(webhook.__file__).parents[1]
    for file in folder.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        ours = set(re.findall(r"from agent_gateway_store\.(\w+)", text))
        assert ours <= {"_text", "models", "hooks", "errors", "plugins", "settings"}, file.name
        outside = re.sub(r"if TYPE_CHECKING:\n((?:    .*\n|\n)+)", "", text)
        assert "from agent_gateway_store.settings" not in outside, file.name


def _move_clock(monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Later:
            return super().now(tz) + timedelta(seconds=seconds)  # type: ignore[return-value]

    monkeypatch.setattr("agent_gateway_store.plugins.webhook.notifier.datetime", Later)
