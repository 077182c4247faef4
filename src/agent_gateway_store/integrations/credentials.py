"""Which API key a request carries."""

from __future__ import annotations

from typing import Protocol

from agent_gateway_store.errors import InvalidApiKeyError

__all__ = ["Headers", "key_in"]

_SCHEME = "bearer"


class Headers(Protocol):
    """Headers as Starlette gives them: names in any case, each value of its own."""

    def getlist(self, key: str, /) -> list[str]:
        """Return all values of one header."""
        ...


def key_in(headers: Headers) -> str:
    """Return the API key of `Authorization: Bearer` or `X-API-Key`, unchecked.

    Raises:
        InvalidApiKeyError: There is none, or more than one: which of them another proxy has looked at is not known.
    """
    credentials = (value.partition(" ") for value in headers.getlist("authorization"))
    keys = [key.strip() for scheme, _, key in credentials if scheme.lower() == _SCHEME]
    keys += headers.getlist("x-api-key")
    if len(keys) != 1:
        raise InvalidApiKeyError
    return keys[0]
