"""Settings of the Slack notifier and its callback, from the environment."""

from __future__ import annotations

from typing import Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from agent_gateway_store.models.values import ApproverId
from agent_gateway_store.plugins._http import ParsedUrl, parse_proxy, parse_url
from agent_gateway_store.settings import EnvironmentSettings

PREFIX = "AGENT_GATEWAY_STORE_SLACK_"


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
