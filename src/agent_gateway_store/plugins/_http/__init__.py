"""HTTP from the bundled plugins to the outside: settings, which addresses, for how long, and how much is read."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_network
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from agent_gateway_store._text import require_visible, strip_texts
from agent_gateway_store.plugins._http.urls import AddressPolicy, Network, parse_proxy, parse_url

if TYPE_CHECKING:
    from agent_gateway_store.settings import StoreSettings

# A day: an outbox row that waits longer has no use for most approvals, which have expired.
MAX_RETRY_AFTER_SECONDS = 24 * 3600.0


def words(value: Any) -> Any:
    """Return the words of a text, which blanks or commas separate; anything else unchanged."""
    return [word for word in re.split(r"[\s,]+", value) if word] if isinstance(value, str) else value


class ReceiverSettings(BaseSettings):
    """What a plugin needs besides the URL and its secrets. A repr shows no secret.

    Attributes:
        allow_http: Whether `http://` is allowed.
        allow_private: Whether private networks and loopback are allowed.
        allowed_networks: Other networks that are allowed, as in `10.1.0.0/16`, separated by blanks or commas.
        timeout_seconds: Longest wait for one delivery. `PLUGIN_TIMEOUT_SECONDS` limits it, too.
        proxy: `http://[user:password@]host:port`. Proxy variables of the environment are not read.
        ca_file: Certificates to trust in place of the well-known ones.
    """

    model_config = SettingsConfigDict(extra="ignore", hide_input_in_errors=True, frozen=True)

    allow_http: bool = False
    allow_private: bool = False
    allowed_networks: Annotated[tuple[Network, ...], NoDecode, BeforeValidator(words)] = ()
    timeout_seconds: float = Field(default=15, gt=0, allow_inf_nan=False)
    proxy: SecretStr | None = None
    ca_file: str | None = None

    _strip = model_validator(mode="before")(strip_texts)
    _require_visible = model_validator(mode="after")(require_visible)

    @field_validator("allowed_networks", mode="before")
    @classmethod
    def _networks(cls, value: Any) -> Any:
        try:
            return [ip_network(word) if isinstance(word, str) else word for word in words(value)]
        except ValueError:
            raise ValueError("networks are written as in 10.1.0.0/16, with no bits set beyond the prefix") from None

    @field_validator("proxy")
    @classmethod
    def _proxy(cls, proxy: SecretStr | None) -> SecretStr | None:
        if proxy is not None:
            parse_proxy(proxy.get_secret_value())
        return proxy

    @property
    def policy(self) -> AddressPolicy:
        """Which addresses are allowed."""
        return AddressPolicy(allow_private=self.allow_private, allowed=self.allowed_networks)

    def check_url(self, url: SecretStr, name: str) -> None:
        """Raise ValueError if nothing can be posted to `url`, the receiver `name`."""
        parsed = parse_url(url.get_secret_value(), allow_http=self.allow_http)
        if parsed.address is not None and not self.policy.allows(parsed.address):
            raise ValueError(f"the URL of {name} is an address that is not public; see ALLOWED_NETWORKS")


def time_limit_s(settings: StoreSettings) -> float:
    """Return the seconds for one delivery: a little less than the plugin has, so that our own error says why."""
    # Half a second is left for rendering the notice and for its thread, which take milliseconds on an idle machine.
    return max(settings.plugin_timeout_seconds - 0.5, settings.plugin_timeout_seconds / 2)


def retry_after_s(header: str | None) -> float | None:
    """Return the seconds that a `Retry-After` header asks for (RFC 9110, 10.2.3), at most a day; None if none.

    Args:
        header: A number of seconds, or a date.
    """
    if header is None:
        return None
    header = header.strip()
    # Nine digits are 31 years: more than is kept of it, and a number that `float` reads in any case.
    if header.isascii() and header.isdecimal():
        return min(float(header[:9]), MAX_RETRY_AFTER_SECONDS)
    try:
        moment = parsedate_to_datetime(header)
    except (TypeError, ValueError, OverflowError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return min(max((moment - datetime.now(UTC)).total_seconds(), 0.0), MAX_RETRY_AFTER_SECONDS)
