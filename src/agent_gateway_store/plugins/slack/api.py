"""The settings for Slack, and the part of its web API that the notifier needs: https://docs.slack.dev/apis/web-api"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from agent_gateway_store._text import escape
from agent_gateway_store.errors import NotDeliveredError
from agent_gateway_store.models.values import ApproverId
from agent_gateway_store.plugins._http import ParsedUrl, parse_proxy, parse_url, retry_after_s
from agent_gateway_store.settings import EnvironmentSettings

if TYPE_CHECKING:
    from agent_gateway_store.plugins._http.transport import Answer

PREFIX = "AGENT_GATEWAY_STORE_SLACK_"
# Type of the metadata (https://docs.slack.dev/messaging/message-metadata) by which a message of ours is recognised.
EVENT_TYPE = "gateway_store_approval"
# Bytes. A page of 200 messages of a busy channel has a megabyte or two.
MAX_ANSWER = 8_000_000
# The same message would be refused again. Other errors (a revoked token, a bot that is not in the channel) can be
# corrected while the notice waits (https://docs.slack.dev/reference/methods/chat.postMessage, "Errors").
_HOPELESS = frozenset({"invalid_blocks", "invalid_blocks_format", "invalid_metadata_format", "msg_too_long", "no_text"})


class SlackSettings(EnvironmentSettings):
    """Settings for Slack, each from `AGENT_GATEWAY_STORE_SLACK_<NAME>`. A repr shows no secret.

    Attributes:
        bot_token: `xoxb-...`, with the scopes `chat:write` and, to find messages of another process again,
            `channels:history` (or `groups:history` for a private channel). Needs `channel`.
        channel: Id of the channel to post to, as in `C024BE91L`: not its name.
        signing_secret: Proves that a click comes from Slack. The callback needs it, the notifier does not.
        approvers: Who may decide, as JSON: Slack user id to approver id, `{"U024BE7LH": "alice"}`. The hook
            `gateway_store_map_approver` can name others.
        team_id: If it is set, clicks from other workspaces are refused.
        api_url: URL of Slack's API.
        timeout_seconds: Longest wait for one call of the API. `PLUGIN_TIMEOUT_SECONDS` limits the whole delivery, too.
        proxy: `http://[user:password@]host:port`. Proxy variables of the environment are not read.
        ca_file: Certificates to trust in place of the well-known ones.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    bot_token: SecretStr | None = None
    # A name would be taken by `chat.postMessage`, but not by `chat.update` and `conversations.history`.
    channel: str | None = Field(default=None, pattern=r"^[CGD][A-Z0-9]{2,30}$")
    signing_secret: SecretStr | None = None
    approvers: dict[str, ApproverId] = Field(default={})
    team_id: str | None = None
    api_url: str = "https://slack.com/api/"
    timeout_seconds: float = Field(default=10, gt=0, allow_inf_nan=False)
    proxy: SecretStr | None = None
    ca_file: str | None = None

    @field_validator("bot_token", "signing_secret")
    @classmethod
    def _has_text(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None and not (secret.get_secret_value().strip() and secret.get_secret_value().isascii()):
            raise ValueError("it must be printable ASCII, and not empty")
        return secret

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if (self.bot_token is None) != (self.channel is None):
            raise ValueError(f"{PREFIX}BOT_TOKEN and {PREFIX}CHANNEL are set together or not at all")
        self.method_url("api.test")
        if self.proxy is not None:
            parse_proxy(self.proxy.get_secret_value())
        return self

    @property
    def posts(self) -> bool:
        """True if there is a bot and a channel to post to."""
        return self.bot_token is not None

    def method_url(self, method: str) -> ParsedUrl:
        """Return the URL of a method of Slack's API."""
        return parse_url(f"{self.api_url.rstrip('/')}/{method}", allow_http=True)


class SlackRefusedError(NotDeliveredError):
    """Slack answered with an error.

    Attributes:
        code: Slack's word for it, such as `channel_not_found`.
    """

    def __init__(self, method: str, code: str) -> None:
        super().__init__(f"Slack refused {method}: {code}.", is_permanent=code in _HOPELESS)
        self.code = code


class SlackApi:
    """Calls methods as the bot. Holds the token, and sends it to nobody but Slack.

    Args:
        settings: The URL of Slack's API, and how to connect to it.
        token: Of the bot.

    Raises:
        ImportError: The extra `slack` is not installed.
    """

    def __init__(self, settings: SlackSettings, token: SecretStr) -> None:
        from agent_gateway_store.plugins._http.transport import Transport

        self._settings = settings
        self._token = token
        self._transport = Transport(None, proxy=settings.proxy, ca_file=settings.ca_file)

    async def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Call a method and return its answer.

        Args:
            method: As in `chat.postMessage`.
            arguments: Anything but text is sent as JSON; None is left out.

        Raises:
            SlackRefusedError: Slack answered with an error.
            NotDeliveredError: No answer, or one that cannot be read; with `retry_after_s` where Slack limits the rate.
        """
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
            wait_s = retry_after_s(answer.headers.get("retry-after"))
            # Slack limits a method for the whole workspace (https://docs.slack.dev/apis/web-api/rate-limits).
            self._transport.pause(wait_s)
            raise NotDeliveredError("Slack limits the rate (429).", retry_after_s=wait_s)
        return _content(method, answer)


def mrkdwn(text: str) -> str:
    """Return `text` so that Slack shows it unchanged: no mention, no link (`&`, `<`, `>` escaped, on one line)."""
    # Only these three: https://docs.slack.dev/messaging/formatting-message-text, "Escaping text".
    return escape(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


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
