"""Settings of the webhook notifier, from the environment."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from agent_gateway_store.plugins._http.settings import ReceiverSettings, words

PREFIX = "AGENT_GATEWAY_STORE_WEBHOOK_"
# Standard Webhooks, "Signature scheme": between 24 bytes (192 bits) and 64 bytes (512 bits).
MIN_KEY_BYTES, MAX_KEY_BYTES = 24, 64


def key_of(secret: str) -> bytes:
    """Return the key in `whsec_<base64>`.

    Raises:
        ValueError: It has another form, or is not 24 to 64 bytes long (as Standard Webhooks asks).
    """
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith("whsec_") or not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise ValueError("a secret is whsec_ and the base64 of 24 to 64 random bytes")
    return key


Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(words)]


class WebhookEndpoint(BaseModel):
    """One receiver.

    Attributes:
        url: Where to post. Kept secret: anybody who knows it can post there.
        secrets: Keys to sign with. Each adds a signature; give the old and the new one while the receiver changes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    url: SecretStr
    secrets: Secrets = Field(min_length=1)

    @field_validator("secrets")
    @classmethod
    def _keys(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for secret in secrets:
            key_of(secret.get_secret_value())
        return secrets


class WebhookSettings(ReceiverSettings):
    """Settings of the webhook notifier, each from `AGENT_GATEWAY_STORE_WEBHOOK_<NAME>`, besides `ReceiverSettings`.

    Attributes:
        url: The receiver. Needs `secrets`.
        secrets: `whsec_...`, separated by blanks or commas.
        endpoints: Receivers with secrets of their own, as JSON: `{"ops": {"url": ..., "secrets": ...}}`. Each is a
            notifier `webhook-<name>`, beside `webhook` for `url`.
        max_connections: Deliveries to one receiver at a time.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX)

    url: SecretStr | None = None
    secrets: Annotated[Secrets, NoDecode] = ()
    endpoints: dict[str, WebhookEndpoint] = Field(default={})
    max_connections: int = Field(default=20, gt=0)

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.secrets and self.url is None:
            raise ValueError(f"{PREFIX}SECRETS is set, but {PREFIX}URL is not")
        for name, endpoint in self.receivers.items():
            # The name of a notifier is a column of the outbox, and a part of URLs of dashboards and of log lines.
            if not re.fullmatch(r"webhook(-[a-z0-9][a-z0-9_-]{0,40})?", name):
                raise ValueError("the name of an endpoint is made of a-z, 0-9, - and _")
            self.check_url(endpoint.url, name)
        return self

    @property
    def receivers(self) -> dict[str, WebhookEndpoint]:
        """Every receiver by the name of its notifier; empty if none is set."""
        named = {f"webhook-{name}": endpoint for name, endpoint in self.endpoints.items()}
        if self.url is None:
            return named
        return {"webhook": WebhookEndpoint(url=self.url, secrets=self.secrets), **named}
