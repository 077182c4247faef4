"""A stand-in for Slack: the few methods of its API that are used, and the clicks it sends.

What it checks and answers follows https://docs.slack.dev/reference/methods; `slack_sdk` works with it, too.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlencode

from notifier_helpers import Request, Respond, Server, running
from slack_sdk.models.blocks import Block
from slack_sdk.signature import SignatureVerifier

from agent_gateway_store.plugins.slack import SlackNotifier, SlackSettings

TOKEN = "xoxb-planted-bot-token"
SIGNING_SECRET = "planted-signing-secret"
CHANNEL = "C024BE91L"


@dataclass
class Slack(Server):
    """One channel.

    Attributes:
        messages: By `ts`, as `conversations.history` shows them.
        calls: Methods in the order they were called, with their arguments.
        said: What was posted to response URLs.
        answers: Used for a call before the ordinary answer; None is the ordinary one.
        scopes: What the bot may do.
        lose_answers: How many posts are taken and then not answered.
    """

    answers: list[Any] = field(default_factory=list)
    messages: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    said: list[dict[str, Any]] = field(default_factory=list)
    scopes: set[str] = field(default_factory=lambda: {"chat:write", "channels:history"})
    lose_answers: int = 0

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api/"

    @property
    def response_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/actions/planted-response-url"

    async def respond(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        answer = self._answer(request)
        if callable(answer):
            await answer(writer)
            return True
        if self.lose_answers and "chat.postMessage" in request.line:
            self.lose_answers -= 1
            return False
        code, headers, body = answer
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {code} X\r\n{fields}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        return True

    def _answer(self, request: Request) -> tuple[int, dict[str, str], bytes] | Respond:
        path = request.line.split(" ")[1]
        if path.startswith("/actions/"):
            self.said.append(request.json)
            return 200, {}, b"ok"
        planned = self.answers.pop(0) if self.answers else None
        if planned is not None:
            return planned  # type: ignore[no-any-return]
        method = path.removeprefix("/api/")
        arguments = _arguments(request)
        self.calls.append((method, arguments))
        content = self._call(method, arguments, request.headers.get("authorization"))
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()

    def _call(self, method: str, given: dict[str, Any], authorization: str | None) -> dict[str, Any]:
        token = (authorization or f"Bearer {given.get('token')}").removeprefix("Bearer ")
        if token != TOKEN:
            return {"ok": False, "error": "invalid_auth"}
        if given.get("channel") != CHANNEL:
            return {"ok": False, "error": "channel_not_found"}
        if method == "conversations.history":
            return self._history(given)
        if "blocks" in given and (error := fault_in(given["blocks"])):
            return {"ok": False, "error": "invalid_blocks", "response_metadata": {"messages": [error]}}
        message = {"text": given.get("text"), "blocks": given.get("blocks"), "metadata": given.get("metadata")}
        if method == "chat.postMessage":
            timestamp = f"{time.time():.6f}"
            while timestamp in self.messages:
                timestamp = f"{float(timestamp) + 0.000001:.6f}"
        elif method == "chat.update":
            timestamp = given["ts"]
            if timestamp not in self.messages:
                return {"ok": False, "error": "message_not_found"}
        else:
            return {"ok": False, "error": "unknown_method"}
        self.messages[timestamp] = {"type": "message", "ts": timestamp} | message
        return {"ok": True, "channel": CHANNEL, "ts": timestamp, "message": message}

    def _history(self, given: dict[str, Any]) -> dict[str, Any]:
        if "channels:history" not in self.scopes:
            return {"ok": False, "error": "missing_scope", "needed": "channels:history"}
        oldest, limit, start = float(given.get("oldest", 0)), int(given.get("limit", 100)), int(given.get("cursor", 0))
        shown = [m for m in sorted(self.messages.values(), key=lambda m: -float(m["ts"])) if float(m["ts"]) > oldest]
        page = [
            m if given.get("include_all_metadata") else m | {"metadata": None} for m in shown[start : start + limit]
        ]
        more = start + limit < len(shown)
        cursor = str(start + limit) if more else ""
        return {"ok": True, "messages": page, "has_more": more, "response_metadata": {"next_cursor": cursor}}


def _arguments(request: Request) -> dict[str, Any]:
    if "json" in request.headers.get("content-type", ""):
        return dict(request.json)
    fields = {name: values[0] for name, values in parse_qs(request.body.decode(), strict_parsing=True).items()}
    return {name: json.loads(v) if name in ("blocks", "metadata") else v for name, v in fields.items()}


def fault_in(blocks: list[dict[str, Any]]) -> str | None:
    """What Slack would refuse: by the SDK's own models, and by the limits its documentation names."""
    for block in Block.parse_all(blocks):
        block.validate_json()
    if len(blocks) > 50:
        return "more than 50 blocks"
    for block in blocks:
        text = (block.get("text") or {}).get("text", "x")
        limit = 150 if block["type"] == "header" else 3000
        if not 0 < len(text) <= limit:
            return f"{block['type']}: text of {len(text)}"
        for element in block.get("elements", []):
            if element["type"] == "button" and len(element["value"]) > 2000:
                return "a button's value is too long"
    return None


def slack_notifier(url: str, **fields: Any) -> SlackNotifier:
    """A notifier of a process of its own, for all that it knows."""
    values: dict[str, Any] = {"bot_token": TOKEN, "channel": CHANNEL, "api_url": url, "timeout_seconds": 5} | fields
    return SlackNotifier(SlackSettings(**values))


def slack_running() -> AbstractAsyncContextManager[Slack]:
    """Run the stand-in."""
    return running(Slack([]))


def click(
    slack: Slack | None,
    approval_id: object,
    action: str = "gateway_store_approve",
    *,
    user: str = "U024BE7LH",
    **changes: Any,
) -> bytes:
    """The body Slack sends for a click: the shape of https://docs.slack.dev/reference/interaction-payloads."""
    message = next(iter(slack.messages.values()), {}) if slack else {}
    payload = {
        "type": "block_actions",
        "user": {"id": user, "username": "ann", "name": "ann", "team_id": "T9TK3CUKW"},
        "api_app_id": "A02",
        "token": "Shh_its_a_seekrit",
        "container": {"type": "message", "message_ts": "1548261231.000200", "channel_id": CHANNEL},
        "trigger_id": "12466734323.1395872398",
        "team": {"id": "T9TK3CUKW", "domain": "example"},
        "enterprise": None,
        "is_enterprise_install": False,
        "channel": {"id": CHANNEL, "name": "approvals"},
        "message": {"bot_id": "BAH5CA16Z", "type": "message", "user": "UAJ2RU415", **message},
        "response_url": slack.response_url if slack else "https://hooks.slack.com/actions/T/1/x",
        "actions": [
            {
                "action_id": action,
                "block_id": f"gateway_store_{approval_id}",
                "text": {"type": "plain_text", "text": "Approve", "emoji": True},
                "value": str(approval_id),
                "style": "primary",
                "type": "button",
                "action_ts": "1548426417.840180",
            }
        ],
    }
    return urlencode({"payload": json.dumps(payload | changes)}).encode()


def signed(body: bytes, *, secret: str = SIGNING_SECRET, age_s: float = 0) -> dict[str, str]:
    """The headers Slack sends, signed by `slack_sdk`."""
    timestamp = str(int(time.time() - age_s))
    signature = SignatureVerifier(secret).generate_signature(timestamp=timestamp, body=body)
    assert signature is not None
    return {
        "Content-Type": "application/x-www-form-urlencoded",
        "X-Slack-Request-Timestamp": timestamp,
        "X-Slack-Signature": signature,
    }
