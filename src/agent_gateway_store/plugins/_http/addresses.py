"""Which IP addresses a notifier may connect to."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from agent_gateway_store.errors import NotDeliveredError

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
