"""No URL, name or redirect leads a webhook into a network that was not allowed."""

from __future__ import annotations

import base64
import ipaddress
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from notifier_helpers import OK, serving
from pydantic import ValidationError
from webhook_helpers import SECRET, notifier_for

from agent_gateway_store.errors import NotDeliveredError
from agent_gateway_store.plugins._http import AddressPolicy, RefusedAddressError, parse_url
from agent_gateway_store.plugins.webhook import WebhookEndpoint, WebhookNotifier, WebhookSettings
from agent_gateway_store.testing import make_notice
from cases import cases

pytestmark = pytest.mark.unit


def words(text: str) -> list[str]:
    return text.split()


PUBLIC = words("""
    8.8.8.8 1.1.1.1 93.184.215.14 172.15.255.255 172.32.0.0 100.63.255.255 100.128.0.0 192.0.1.1 198.17.255.255
    198.20.0.0 223.255.255.255 2606:4700::1111 2a00:1450::1 2001:4860::8888
""")

REFUSED = words("""
    0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.1.2.3 169.254.0.1
    169.254.169.254 169.254.170.2 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1
    198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
    168.63.129.16 :: ::1 ::7f00:1 ::a00:1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:8.8.8.8 ::ffff:0:127.0.0.1
    64:ff9b::7f00:1 64:ff9b::a00:1 64:ff9b::808:808 64:ff9b:1::a00:1 100::1 2001::1 2001:0:7f00:1:: 2001:2::1
    2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: 2002:a00:1::1 2002:a9fe:a9fe::1 2002:808:808::1 3fff::1 5f00::1
    4000::1 fc00::1 fd00::1 fd00:ec2::254 fd20:ce::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1 ff0e::1
    2606:4700::5efe:7f00:1 2606:4700::200:5efe:a00:1
""")

# Spellings of 127.0.0.1, 10.0.0.1 and 169.254.169.254 that one parser or another takes, and other tricks.
ODD_HOSTS = words("""
    2130706433 0x7f000001 0x7f.1 0177.0.0.1 017700000001 127.1 127.0.1 0 0x0 00000000.0.0.0 127.0.0.01 0127.0.0.1 10.1
    167772161 2852039166 0xA9FEA9FE 0251.0376.0251.0376 169.16689662 127.0.0.1. 1.2.3.4.5 0x7f.0x0.0x0.0x1 4294967296
    256.0.0.1 127.0.0.1%00.example.com 127.0.0.1%2f.example.com example.com%2e %31%32%37.0.0.1 0x7F000001
    [fe80::1%25eth0] [::1%lo] [::1%25lo] [::ffff:127.1] [v1.127] [] [1] [:] [::1 ::1] [::1]x x[::1] [127.0.0.1] [[::1]]
    ::1 user@127.0.0.1 example.com@127.0.0.1 127.0.0.1@example.com :@127.1 example.com:80@127.0.0.1 example.com:443:443
    example.com:0 a:99999 example.com#@127.0.0.1 127.0.0.1#.example.com example.com. .example.com example..com
    -a.example a-.example . .. _.
""")
ODD_URLS = [
    *(f"https://{host}/" for host in (*ODD_HOSTS, f"{'a' * 64}.example", f"{'a.' * 130}example")),
    *words("""
    https:/127.0.0.1 https:///127.0.0.1/ https:127.0.0.1 //127.0.0.1/ 127.0.0.1 localhost https:// https://?
    https://example.com/#x http://example.com/ HTTP://127.0.0.1/ ftp://127.0.0.1/ file:///etc/passwd
    gopher://127.0.0.1:70/x unix:///var/run/docker.sock http+unix://%2Fvar%2Frun%2Fdocker.sock/ data:text/plain,x
    javascript:x dict://127.0.0.1:11211/ ldap://127.0.0.1/ jar:https://x!/ ws://127.0.0.1/ blob:https://127.0.0.1/
    """),
    *("https://127\u30020\u30020\u30021/", "https://127\uff0e0\uff0e0\uff0e1/"),
    *("https://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460/", "https://\u0661\u0662\u0667.0.0.1/"),
    *("https://example.com\\@127.0.0.1/", "https://127.0.0.1\\.example.com/", "https:\\\\127.0.0.1/", ""),
    *("https://a b/", "https://exa\tmple.com/", "https://exa\nmple.com/", "https://example.com/\r\nHost: x"),
    *("https://example.com /", "https://example.com/ x", "https://\u202eexample.com/"),
    *("https://ex\xe4mple.com/", "https://\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54/"),
    *("https://\u24dbocalhost/", "https://local\xadhost/", "https://localhost\u200b/", "https://k\uff18s/"),
    *("https://exam\x00ple.com/", "https://example.com\x00.evil/", "https://example.com/\x7f"),
    *("https://example.com/\xe9",),
]

LITERALS = [f"https://[{a}]/" if ":" in a else f"https://{a}/" for a in REFUSED if "%" not in a]

# What leads to this machine, for one parser or another.
LOOPBACK = words("""
    localhost LOCALHOST localhost. localhost.localdomain 127.0.0.1 127.1 127.0.1 0 0.0.0.0 2130706433 0x7f000001
    0x7F.0.0.1 0177.0.0.1 017700000001 127.0.0.1. 127.000.000.001 [::1] [::] [::ffff:127.0.0.1] [::ffff:7f00:1]
    [::127.0.0.1] [64:ff9b::7f00:1] [2002:7f00:1::] [0:0:0:0:0:0:0:1] user@127.0.0.1 example.com@127.0.0.1
    127.0.0.1%00.example.com 127。0。0。1 ⓛⓞocalhost
""")


class _Sockets:
    """Told by Python itself of every connection that any code of this process begins."""

    def __init__(self) -> None:
        self.seen: list[Any] | None = None
        sys.addaudithook(self._hear)  # there is no way to take it away again

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and self.seen is not None:
            self.seen.append(arguments[1])


_SOCKETS = _Sockets()


@pytest.fixture
def connects() -> Iterator[list[Any]]:
    """Every address that any socket of this process is asked to connect to."""
    _SOCKETS.seen = []
    yield _SOCKETS.seen
    _SOCKETS.seen = None


def test_there_are_200_hostile_urls() -> None:
    """And no two alike."""
    hostile = {*ODD_URLS, *LITERALS, *(f"name that leads to {address}" for address in REFUSED)}
    assert len(hostile) >= 200


def allowed_by(policy: AddressPolicy, addresses: Iterable[str]) -> list[str]:
    return [each for each in addresses if policy.allows(ipaddress.ip_address(each))]


def test_public_addresses_are_allowed() -> None:
    """The neighbours of refused networks are not refused with them."""
    assert allowed_by(AddressPolicy(), PUBLIC) == PUBLIC


def test_other_addresses_are_refused() -> None:
    assert allowed_by(AddressPolicy(), REFUSED) == []


def test_private_networks_can_be_allowed() -> None:
    """That lets in private networks and loopback, and none of the tunnels and metadata services."""
    private = words("10.0.0.1 192.168.1.1 172.16.0.1 127.0.0.1 ::1 fd12::1")
    others = words("""
        169.254.169.254 fd00:ec2::254 fd20:ce::254 100.100.100.200 fe80::1 224.0.0.1 2002:a00:1:: 64:ff9b::a00:1 0.0.0.0
        ::ffff:10.0.0.1 168.63.129.16 fd12::1%eth0 100.64.0.1
    """)
    assert allowed_by(AddressPolicy(allow_private=True), [*private, *others]) == private


def test_a_named_network_is_allowed_whatever_it_is() -> None:
    policy = AddressPolicy(allowed=(ipaddress.ip_network("169.254.169.254/32"), ipaddress.ip_network("fd00:ec2::/64")))

    assert policy.allows(ipaddress.ip_address("169.254.169.254"))
    assert policy.allows(ipaddress.ip_address("fd00:ec2::254"))
    assert not policy.allows(ipaddress.ip_address("169.254.169.253"))


@cases("url", ODD_URLS)
async def test_odd_urls_are_not_taken(url: str, connects: list[Any]) -> None:
    """Neither by the settings nor by the notifier; nothing is resolved or connected to, and the URL is not repeated."""
    with pytest.raises(ValidationError) as caught:
        WebhookSettings(url=url, secrets=[SECRET])  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        notifier_for(url)

    assert connects == []
    assert len(url) < 12 or url not in str(caught.value)


@cases("url", LITERALS)
async def test_refused_addresses_in_urls(url: str, connects: list[Any]) -> None:
    """Said when the settings are read; and a notifier that gets so far connects nowhere."""
    with pytest.raises(ValidationError, match="not public"):
        WebhookSettings(url=url, secrets=[SECRET])  # type: ignore[arg-type]
    with pytest.raises(RefusedAddressError):
        await notifier_for(url).notify_pending(make_notice())

    assert connects == []


@cases("address", REFUSED)
async def test_names_that_lead_inside(address: str, connects: list[Any]) -> None:
    """Judged after resolution: alone, and hidden behind a public address."""
    for answers in ([address], ["8.8.8.8", address], [address, "8.8.8.8"]):
        with pytest.raises(RefusedAddressError):
            await notifier_for("https://rebind.example/", answers=[answers]).notify_pending(make_notice())

    assert connects == []


@cases("host", LOOPBACK)
async def test_a_listener_on_this_machine_sees_nothing(host: str, connects: list[Any]) -> None:
    """By none of its names and spellings, with the machine's own resolver."""
    async with serving(OK) as server:
        endpoint = WebhookEndpoint(url=f"http://{host}:{server.port}/", secrets=(SECRET,))  # type: ignore[arg-type]
        with suppress(ValueError):
            notifier = WebhookNotifier(endpoint, WebhookSettings(allow_http=True))
            with pytest.raises(NotDeliveredError):
                await notifier.notify_pending(make_notice())

    assert (server.connections, connects) == (0, [])


async def test_rebinding_has_no_second_lookup(connects: list[Any]) -> None:
    """The address that was checked is the one connected to: a name that turns at the second look-up gains nothing."""
    async with serving(OK) as trap:
        answers = [["192.0.2.1"], ["127.0.0.1"]]  # checked first, then the trap
        url = f"http://rebind.example:{trap.port}/"
        allowed = {"allow_http": True, "allowed_networks": "192.0.2.0/24", "timeout_seconds": 0.3}
        with pytest.raises(NotDeliveredError):
            await notifier_for(url, answers=answers, **allowed).notify_pending(make_notice())

        assert answers == [["127.0.0.1"]]  # one look-up
        with pytest.raises(RefusedAddressError):
            await notifier_for(url, answers=answers, **allowed).notify_pending(make_notice())
    assert trap.connections == 0
    assert {address[0] for address in connects} <= {"192.0.2.1"}


async def test_the_checked_address_is_connected_to(connects: list[Any]) -> None:
    async with serving(OK) as server:
        url = f"http://hooks.example:{server.port}/x"
        await notifier_for(
            url, answers=[["127.0.0.1"]], allow_http=True, allowed_networks="127.0.0.0/8"
        ).notify_pending(make_notice())

    assert [address[0] for address in connects] == ["127.0.0.1"]
    assert server.requests[0].headers["host"] == f"hooks.example:{server.port}"


async def test_next_address_is_tried() -> None:
    """A name with a dead address and a living one is reached."""
    async with serving(OK) as server:
        url = f"http://hooks.example:{server.port}/x"
        notifier = notifier_for(url, answers=[["127.0.0.2", "127.0.0.1"]], allow_http=True, allow_private=True)
        await notifier.notify_pending(make_notice())

    assert len(server.requests) == 1


async def test_proxy_variables_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment would resolve names for itself, and sees nothing."""
    async with serving(OK) as proxy, serving(OK) as server:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            monkeypatch.setenv(name.lower(), f"http://127.0.0.1:{proxy.port}")
        await notifier_for(server).notify_pending(make_notice())

    assert (proxy.connections, len(server.requests)) == (0, 1)


async def test_a_given_proxy_is_used(connects: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    """It resolves and connects; credentials go to it alone, and into no log."""
    async with serving(OK) as proxy:
        caplog.set_level(logging.DEBUG)
        given = f"http://user:p%40ss@127.0.0.1:{proxy.port}"
        await notifier_for("http://hooks.example/x", allow_http=True, proxy=given).notify_pending(make_notice())

    (request,) = proxy.requests
    assert request.line == "POST http://hooks.example:80/x HTTP/1.1"
    assert base64.b64decode(request.headers["proxy-authorization"].removeprefix("Basic ")) == b"user:p@ss"
    assert {address[1] for address in connects} == {proxy.port}
    assert not any(secret in caplog.text for secret in ("p@ss", "p%40ss", "dXNlcjpwQHNz"))


async def test_addresses_are_checked_before_a_proxy(connects: list[Any]) -> None:
    """An address in the URL is refused though the proxy would connect."""
    async with serving(OK) as proxy:
        notifier = notifier_for("https://169.254.169.254/", proxy=f"http://127.0.0.1:{proxy.port}")
        with pytest.raises(RefusedAddressError):
            await notifier.notify_pending(make_notice())

    assert (proxy.connections, connects) == (0, [])


@pytest.mark.parametrize(
    ("url", "authority", "path"),
    [
        ("https://Example.COM", "example.com", "/"),
        ("https://example.com:443/a?b=c%20d", "example.com", "/a?b=c%20d"),
        ("https://example.com:8443?x", "example.com:8443", "/?x"),
        ("https://xn--exmple-cua.com/", "xn--exmple-cua.com", "/"),
        ("https://my_service.internal/", "my_service.internal", "/"),
        ("https://8.8.8.8/", "8.8.8.8", "/"),
        ("https://[2606:4700::1111]:444/", "[2606:4700::1111]:444", "/"),
    ],
)
def test_ordinary_urls_are_taken(url: str, authority: str, path: str) -> None:
    """Names, ports, queries, addresses in their usual form."""
    parsed = parse_url(url)

    assert (parsed.authority, parsed.path) == (authority, path)
    assert "b=c" not in repr(parsed)
