"""URLs in settings: one form only, so that no two programs disagree about the host."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import unquote

from agent_gateway_store.plugins._http.addresses import Address

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
