"""Which API key a request carries."""

from __future__ import annotations

from typing import Protocol

from agent_gateway_store.errors import InvalidApiKeyError

# RFC 6750, 2.1; schemes are case-insensitive (RFC 9110, 11.1).
_SCHEME = "bearer"


class Headers(Protocol):
    """Headers as Starlette has them: names in upper or lower case, every value apart."""

    def getlist(self, key: str, /) -> list[str]:
        """Return all values of one header."""
        ...


def key_in(headers: Headers) -> str:
    """Return the API key of `Authorization: Bearer` or `X-API-Key`, unchecked.

    Raises:
        InvalidApiKeyError: There is none, or more than one, of which a proxy before us may have checked the other.
    """
    credentials = (value.partition(" ") for value in headers.getlist("authorization"))
    keys = [key.strip() for scheme, _, key in credentials if scheme.lower() == _SCHEME]
    keys += headers.getlist("x-api-key")
    if len(keys) != 1:
        raise InvalidApiKeyError
    return keys[0]
