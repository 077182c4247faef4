"""Slack's web API, as far as it is needed: https://docs.slack.dev/apis/web-api"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from pydantic import SecretStr

from agent_gateway_store._text import escape
from agent_gateway_store.errors import NotDeliveredError
from agent_gateway_store.plugins._http.pause import Pause
from agent_gateway_store.plugins.slack.settings import SlackSettings

if TYPE_CHECKING:
    from agent_gateway_store.plugins._http.transport import Answer

__all__ = ["EVENT_TYPE", "SlackApi", "SlackRefusedError", "mrkdwn"]

EVENT_TYPE = "gateway_store_approval"
"""Type of the metadata by which a message of ours is known."""

MAX_ANSWER = 8_000_000
"""Bytes; 200 messages of a busy channel are below a megabyte or two."""


# The same message again would be refused again. Other errors (a revoked token, a bot that is not in the channel) can
# be put right while the notice waits.
_HOPELESS = frozenset({"invalid_blocks", "invalid_blocks_format", "invalid_metadata_format", "msg_too_long", "no_text"})


class SlackRefusedError(NotDeliveredError):
    """Slack answered, and said no.

    Attributes:
        code: Slack's word for it, as in `channel_not_found`.
    """

    def __init__(self, method: str, code: str) -> None:
        super().__init__(f"Slack refused {method}: {code}.", is_permanent=code in _HOPELESS)
        self.code = code


class SlackApi:
    """Calls methods as the bot. Holds the token, and sends it to nobody but Slack.

    Args:
        settings: Where Slack is, and how to get there.
        token: Of the bot.

    Raises:
        ImportError: The extra `slack` is not installed.
    """

    def __init__(self, settings: SlackSettings, token: SecretStr) -> None:
        from agent_gateway_store.plugins._http.transport import Transport

        self._settings = settings
        self._token = token
        self._pause = Pause()
        self._transport = Transport(
            None,
            proxy=settings.proxy.get_secret_value() if settings.proxy else None,
            ca_file=settings.ca_file,
        )

    async def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Call a method and return its answer.

        Args:
            method: As in `chat.postMessage`.
            arguments: What is not text is sent as JSON; None is left out.

        Raises:
            SlackRefusedError: Slack said no.
            NotDeliveredError: No answer, or none that makes sense; with `retry_after_s` where Slack limits the rate.
        """
        self._pause.require_over()
        fields = {name: _text(value) for name, value in arguments.items() if value is not None}
        answer = await self._transport.post(
            self._settings.method_url(method),
            body=urlencode(fields).encode(),
            headers={
                "Content-Type": "application/x-www-form-urlencoded",
                "Authorization": f"Bearer {self._token.get_secret_value()}",
            },
            timeout_s=self._settings.timeout_seconds,
            max_body=MAX_ANSWER,
        )
        if answer.status == 429:
            wait_s = _seconds(answer.headers.get("retry-after", ""))
            self._pause.begin(wait_s)
            raise NotDeliveredError("Slack limits the rate (429).", retry_after_s=wait_s)
        return _content(method, answer)


def mrkdwn(text: str) -> str:
    """Return `text` so that Slack shows it as it is: no mention, no link (`&`, `<`, `>` escaped, on one line)."""
    return escape(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _seconds(header: str) -> float | None:
    return float(header) if header.isascii() and header.isdecimal() and len(header) < 6 else None


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode()


def _content(method: str, answer: Answer) -> dict[str, Any]:
    if answer.status != 200:
        raise NotDeliveredError(f"Slack answered {answer.status} to {method}.")
    try:
        content = json.loads(answer.body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise NotDeliveredError(f"Slack's answer to {method} cannot be read.")
    if content.get("ok") is not True:
        raise SlackRefusedError(method, escape(str(content.get("error")))[:100])
    return content
