"""Settings of the webhook notifier, from the environment."""

from __future__ import annotations

import base64
import binascii
import re
from ipaddress import ip_network
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from agent_gateway_store._text import require_visible, strip_texts
from agent_gateway_store.plugins._http.urls import AddressPolicy, Network, parse_proxy, parse_url

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


def _words(value: Any) -> Any:
    return [word for word in re.split(r"[\s,]+", value) if word] if isinstance(value, str) else value


Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(_words)]


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


class WebhookSettings(BaseSettings):
    """Settings of the webhook notifier, each from `AGENT_GATEWAY_STORE_WEBHOOK_<NAME>`. A repr shows no secret.

    Attributes:
        url: The receiver. Needs `secrets`.
        secrets: `whsec_...`, separated by blanks or commas.
        endpoints: Receivers with secrets of their own, as JSON: `{"ops": {"url": ..., "secrets": ...}}`. Each is a
            notifier `webhook-<name>`, beside `webhook` for `url`.
        allow_http: Whether `http://` is allowed.
        allow_private: Whether private networks and loopback are allowed.
        allowed_networks: Other networks that are allowed, as in `10.1.0.0/16`, separated by blanks or commas.
        timeout_seconds: Longest wait for one delivery. `PLUGIN_TIMEOUT_SECONDS` limits it, too.
        proxy: `http://[user:password@]host:port`. Proxy variables of the environment are not read.
        ca_file: Certificates to trust in place of the well-known ones.
        max_connections: Deliveries to one receiver at a time.
    """

    model_config = SettingsConfigDict(extra="ignore", env_prefix=PREFIX, hide_input_in_errors=True, frozen=True)

    url: SecretStr | None = None
    secrets: Annotated[Secrets, NoDecode] = ()
    endpoints: dict[str, WebhookEndpoint] = {}
    allow_http: bool = False
    allow_private: bool = False
    allowed_networks: Annotated[tuple[Network, ...], NoDecode, BeforeValidator(_words)] = ()
    timeout_seconds: float = Field(default=15, gt=0, allow_inf_nan=False)
    proxy: SecretStr | None = None
    ca_file: str | None = None
    max_connections: int = Field(default=20, gt=0)

    _strip = model_validator(mode="before")(strip_texts)
    _require_visible = model_validator(mode="after")(require_visible)

    @field_validator("allowed_networks", mode="before")
    @classmethod
    def _networks(cls, value: Any) -> Any:
        try:
            return [ip_network(word) if isinstance(word, str) else word for word in _words(value)]
        except ValueError:
            raise ValueError("networks are written as in 10.1.0.0/16, with no bits set beyond the prefix") from None

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.secrets and self.url is None:
            raise ValueError(f"{PREFIX}SECRETS is set, but {PREFIX}URL is not")
        policy = self.policy
        for name, endpoint in self.receivers.items():
            # The name of a notifier is a column of the outbox, and a part of URLs of dashboards and of log lines.
            if not re.fullmatch(r"webhook(-[a-z0-9][a-z0-9_-]{0,40})?", name):
                raise ValueError("the name of an endpoint is made of a-z, 0-9, - and _")
            url = parse_url(endpoint.url.get_secret_value(), allow_http=self.allow_http)
            if url.address is not None and not policy.allows(url.address):
                raise ValueError(f"the URL of {name} is an address that is not public; see ALLOWED_NETWORKS")
        if self.proxy is not None:
            parse_proxy(self.proxy.get_secret_value())
        return self

    @property
    def policy(self) -> AddressPolicy:
        """Which addresses are allowed."""
        return AddressPolicy(allow_private=self.allow_private, allowed=self.allowed_networks)

    @property
    def receivers(self) -> dict[str, WebhookEndpoint]:
        """Every receiver by the name of its notifier; empty if none is set."""
        named = {f"webhook-{name}": endpoint for name, endpoint in self.endpoints.items()}
        if self.url is None:
            return named
        return {"webhook": WebhookEndpoint(url=self.url, secrets=self.secrets), **named}
