"""HTTP from the bundled plugins to the outside: settings, which addresses, for how long, and how much is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote

from pydantic import BeforeValidator, Field, SecretStr, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from agent_gateway_store.errors import NotDeliveredError
from agent_gateway_store.settings import EnvironmentSettings

if TYPE_CHECKING:
    from agent_gateway_store.plugins._http.transport import Resolve, Transport
    from agent_gateway_store.settings import StoreSettings

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# Python's `is_global` calls 6to4, NAT64 and multicast addresses global, so the lists are our own, from the IANA
# special-purpose registries (https://www.iana.org/assignments/iana-ipv4-special-registry, and -ipv6-).
_NOT_PUBLIC_V4 = tuple(
    IPv4Network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        # Azure's platform endpoint, which answers only its own machines ("What is IP address 168.63.129.16?").
        "168.63.129.16/32",
    )
)
# Of IPv6 only global unicast is public. That leaves out ::/8 (loopback, IPv4-mapped and -compatible), 64:ff9b::/96 and
# 64:ff9b:1::/48 (NAT64), fc00::/7, fe80::/10, fec0::/10 and ff00::/8.
_GLOBAL_V6 = IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    IPv6Network(text)
    for text in (
        # Protocol assignments: Teredo, ORCHID, benchmarking.
        "2001::/23",
        "2001:db8::/32",
        # 6to4: holds an IPv4 address.
        "2002::/16",
        "3fff::/20",
    )
)
# RFC 5214: an interface id that begins with one of these holds an IPv4 address.
_ISATAP = (0x00005EFE, 0x02005EFE)

_PRIVATE = tuple(
    ip_network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "::1/128", "fc00::/7")
)
# The metadata services of AWS and Google, which lie inside fc00::/7 and give out credentials.
_METADATA = (ip_network("fd00:ec2::/32"), ip_network("fd20:ce::/32"))
# A day: an outbox row that waits longer has no use for most approvals, which have expired.
MAX_RETRY_AFTER_SECONDS = 24 * 3600.0


class RefusedAddressError(NotDeliveredError):
    """The receiver's name leads to an address that the settings do not allow. No connection was made."""


class AddressPolicy:
    """Allows public addresses, and those that the settings add.

    Args:
        allow_private: True adds private networks (RFC 1918, fc00::/7) and loopback, without cloud metadata addresses
            that lie in them.
        allowed: Networks that are allowed in any case; a network of one address allows that address.
    """

    def __init__(self, *, allow_private: bool = False, allowed: tuple[Network, ...] = ()) -> None:
        self._allow_private = allow_private
        self._allowed = allowed

    def allows(self, address: Address) -> bool:
        """Return True if a connection to `address` is allowed; with a zone (`fe80::1%eth0`) it never is."""
        if isinstance(address, IPv6Address) and address.scope_id is not None:
            return False
        if _within(address, self._allowed) or _is_public(address):
            return True
        return self._allow_private and _within(address, _PRIVATE) and not _within(address, _METADATA)

    def check(self, answers: list[str]) -> list[Address]:
        """Return the addresses a name resolved to, in order, each once.

        One refused address refuses them all: a name that has both public and private addresses is not trusted.

        Raises:
            RefusedAddressError: There is none, or one is not allowed.
        """
        addresses = list(dict.fromkeys(ip_address(answer) for answer in answers))
        if not addresses:
            raise RefusedAddressError("The receiver's name leads to no address: check the URL.")
        for address in addresses:
            if not self.allows(address):
                raise RefusedAddressError(
                    f"The receiver's name leads to {address}, which is not a public address: allow its network in "
                    "ALLOWED_NETWORKS if that is meant."
                )
        return addresses


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv4Address):
        return not _within(address, _NOT_PUBLIC_V4)
    if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
        return False
    return address in _GLOBAL_V6 and not _within(address, _NOT_PUBLIC_V6)


def _within(address: Address, networks: tuple[Network, ...]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>(?:[/?][!-~]*)?)",
    re.IGNORECASE,
)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# What other parsers read as an IPv4 address: 2130706433, 0x7f000001, 0177.1, 127.1
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


@dataclass(frozen=True, slots=True, repr=False)
class ParsedUrl:
    """A URL that was checked. Its repr shows scheme and host only: a path is often a password.

    Attributes:
        scheme: `http` or `https`.
        host: Lower-case name, or an address (without brackets).
        port: TCP port.
        path: Path and query, at least `/`.
        address: The host as an address, if it is one.
    """

    scheme: str
    host: str
    port: int
    path: str
    address: Address | None

    @property
    def authority(self) -> str:
        """Host and, unless it is the scheme's own, port: the `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _default_port(self.scheme) else f"{host}:{self.port}"

    def __repr__(self) -> str:
        return f"ParsedUrl({self.scheme}://{self.authority}/***)"


def parse_url(url: str, *, allow_http: bool = False) -> ParsedUrl:
    """Read a URL. Nothing is resolved.

    Args:
        url: `https://host[:port][/path][?query]`, printable ASCII. A host in another script is written as `xn--...`, an
            address in its usual form.
        allow_http: True takes `http://` as well.

    Raises:
        ValueError: It has another form. The text does not repeat the URL.
    """
    if (found := _URL.fullmatch(url)) is None or "\\" in url or "#" in url:
        raise ValueError(
            "the URL must look like https://host[:port]/path, in printable ASCII, without user, password and fragment"
        )
    scheme, host = found["scheme"].lower(), found["host"].lower()
    if scheme == "http" and not allow_http:
        raise ValueError("the URL must begin with https:// (or set ALLOW_HTTP)")
    port = int(found["port"] or _default_port(scheme))
    if not 0 < port < 65536:
        raise ValueError("the URL has a port that does not exist")
    address = _address(host)
    if address is None and not all(_LABEL.fullmatch(label) for label in host.split(".")):
        raise ValueError("the URL's host is not a host name")
    path = found["path"]
    return ParsedUrl(scheme, host.strip("[]"), port, path if path.startswith("/") else f"/{path}", address)


def parse_proxy(url: str) -> tuple[ParsedUrl, tuple[str, str] | None]:
    """Read the URL of a proxy: return where it is, and user and password if it has them.

    Args:
        url: `http://[user:password@]host[:port]`; what is reserved in user and password is percent-encoded.

    Raises:
        ValueError: It has another form. The text does not repeat the URL.
    """
    scheme, _, rest = url.partition("://")
    credentials, at, place = rest.rpartition("@")
    user, _, password = (unquote(part) for part in credentials.partition(":"))
    return parse_url(f"{scheme}://{place}", allow_http=True), (user, password) if at else None


def _address(host: str) -> Address | None:
    is_bracketed = host.startswith("[")
    if not is_bracketed and not _NUMBER.fullmatch(host.rpartition(".")[2]):
        return None
    try:
        return IPv6Address(host.strip("[]")) if is_bracketed else IPv4Address(host)
    except ValueError:
        raise ValueError("the URL's host is not an address in its usual form") from None


def _default_port(scheme: str) -> int:
    return 443 if scheme == "https" else 80


def words(value: Any) -> Any:
    """Return the words of a text, which blanks or commas separate; anything else unchanged."""
    return [word for word in re.split(r"[\s,]+", value) if word] if isinstance(value, str) else value


class ReceiverSettings(EnvironmentSettings):
    """What a plugin needs besides the URL and its secrets. A repr shows no secret.

    Attributes:
        allow_http: Whether `http://` is allowed.
        allow_private: Whether private networks and loopback are allowed.
        allowed_networks: Other networks that are allowed, as in `10.1.0.0/16`, separated by blanks or commas.
        timeout_seconds: Longest wait for one delivery. `PLUGIN_TIMEOUT_SECONDS` limits it, too.
        proxy: `http://[user:password@]host:port`. Proxy variables of the environment are not read.
        ca_file: Certificates to trust in place of the well-known ones.
    """

    model_config = SettingsConfigDict(frozen=True)

    allow_http: bool = False
    allow_private: bool = False
    allowed_networks: Annotated[tuple[Network, ...], NoDecode, BeforeValidator(words)] = ()
    timeout_seconds: float = Field(default=15, gt=0, allow_inf_nan=False)
    proxy: SecretStr | None = None
    ca_file: str | None = None

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

    def transport(self, resolver: Resolve | None, *, max_connections: int) -> Transport:
        """Return what posts to a receiver; without the extra `webhook` it raises ImportError.

        Args:
            resolver: How host names are resolved; None: by the machine's resolver.
        """
        from agent_gateway_store.plugins._http.transport import Transport, resolve

        return Transport(
            self.policy,
            proxy=self.proxy,
            ca_file=self.ca_file,
            resolver=resolver or resolve,
            max_connections=max_connections,
        )

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
