"""How an API key looks, `agw_<key id>_<secret><crc32>`, and where a request carries it.

By the prefix and the checksum a scanner, and this package, recognise a key without a database (as with GitHub's
tokens). All parts are base62, so that a double click selects the whole key.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import zlib
from typing import Protocol

from agent_gateway_store.errors import InvalidApiKeyError
from agent_gateway_store.models.keys import BASE62, KEY_ID_CHARS
from agent_gateway_store.models.keys import random_base62 as _random

# 62^43 is the first power of 62 above 2^256, and 62^6 above 2^32 (CRC-32).
_SECRET_CHARS, _CHECKSUM_CHARS = 43, 6

KEY_PATTERN = rf"\bagw_[0-9A-Za-z]{{{KEY_ID_CHARS}}}_[0-9A-Za-z]{{{_SECRET_CHARS + _CHECKSUM_CHARS}}}\b"
"""Regular expression for secret scanners."""

_KEY = re.compile(
    rf"agw_([0-9A-Za-z]{{{KEY_ID_CHARS}}})_[0-9A-Za-z]{{{_SECRET_CHARS}}}([0-9A-Za-z]{{{_CHECKSUM_CHARS}}})", re.ASCII
)

# RFC 6750, 2.1; schemes are case-insensitive (RFC 9110, 11.1).
_SCHEME = "bearer"


class Headers(Protocol):
    """Headers as Starlette has them: names in upper or lower case, every value apart."""

    def getlist(self, key: str, /) -> list[str]:
        """Return all values of one header."""
        ...


def new_key_id() -> str:
    """Return a fresh public id."""
    return _random(KEY_ID_CHARS)


def new_key(key_id: str) -> str:
    """Return a fresh key for `key_id`; its plaintext exists nowhere else."""
    body = f"agw_{key_id}_{_random(_SECRET_CHARS)}"
    return body + _checksum(body)


def parse_key_id(plaintext: str) -> str | None:
    """Return the key id of a well-formed key, or None. Costs no lookup and no bcrypt."""
    if not isinstance(plaintext, str) or (found := _KEY.fullmatch(plaintext)) is None:
        return None
    return found[1] if secrets.compare_digest(found[2], _checksum(plaintext[:-_CHECKSUM_CHARS])) else None


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


def digest(plaintext: str) -> bytes:
    """Return what bcrypt hashes: always 44 bytes, since bcrypt ignores what follows byte 72."""
    # Base64, because bcrypt ends at the first NUL byte.
    return base64.b64encode(hashlib.sha256(plaintext.encode()).digest())


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    digits = ""
    for _ in range(_CHECKSUM_CHARS):
        number, rest = divmod(number, len(BASE62))
        digits = BASE62[rest] + digits
    return digits
