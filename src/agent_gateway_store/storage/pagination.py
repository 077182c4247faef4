"""Opaque keyset cursors: where a page ended, so that rows added since do not shift the next one.

A cursor holds a position and the fingerprint of the listing that it belongs to: its filters and its organisation. A
position reveals nothing and releases nothing, so it is not signed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import struct
from datetime import UTC, datetime, timedelta
from typing import Any

from agent_gateway_store.errors import InvalidCursorError

# Of the format; a later one can then refuse or read the cursors of this one.
_VERSION = 1
_POSITION = struct.Struct(">QQ")
_FIRST = datetime.min.replace(tzinfo=UTC)
# The resolution of times in Python and in both databases.
_TICK = timedelta(microseconds=1)
# 64 bits of SHA-256: enough against mistakes, and it protects nothing.
_SCOPE_BYTES = 8
# Chosen: the longest cursor, one of `changes`, lists the transactions that are open.
_LONGEST = 65_536


def listing_fingerprint(listing: str, org_id: str | None, filters: Any) -> bytes:
    """Return what binds a cursor to its listing, which a name, an organisation and filters make."""
    text = json.dumps([listing, org_id, filters], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).digest()[:_SCOPE_BYTES]


def encode_cursor(scope: bytes, at: datetime, row_id: int, restored: str | None) -> str:
    """Return the cursor that continues after the row with this time and id."""
    return encode_place(scope, _POSITION.pack((at - _FIRST) // _TICK, row_id), restored)


def decode_cursor(scope: bytes, cursor: str, restored: str | None) -> tuple[datetime, int]:
    """Return the time and id in `cursor`; arguments and errors as for `decode_place`."""
    ticks, row_id = _POSITION.unpack(decode_place(scope, cursor, _POSITION.size, restored))
    try:
        # Ids are signed 64-bit integers; a driver would raise for a larger one.
        if row_id < 2**63:
            return _FIRST + ticks * _TICK, row_id
    except OverflowError:
        pass
    raise invalid_cursor()


def encode_place(scope: bytes, place: bytes, restored: str | None) -> str:
    """Return the cursor that holds `place`, of equal length for each page; `restored` as of `restored_identity`."""
    return encode(scope, place + _mark(restored))


def decode_place(scope: bytes, cursor: str, size: int, restored: str | None) -> bytes:
    """Return the place in `cursor`; raise InvalidCursorError if it is of another listing, or from before a restore."""
    payload = decode(scope, cursor)
    place, mark = payload[:size], payload[size:]
    if len(place) < size or len(mark) not in (0, _SCOPE_BYTES):
        raise invalid_cursor()
    if mark != _mark(restored):
        raise InvalidCursorError(
            "This cursor is of another database, or of this one before `gateway-store db restored`: start again "
            "without one."
        )
    return place


def _mark(restored: str | None) -> bytes:
    return b"" if restored is None else hashlib.sha256(restored.encode()).digest()[:_SCOPE_BYTES]


def encode(scope: bytes, payload: bytes) -> str:
    """Return an opaque text that holds `payload` for this listing."""
    return base64.urlsafe_b64encode(bytes([_VERSION]) + scope + payload).rstrip(b"=").decode()


def decode(scope: bytes, cursor: str) -> bytes:
    """Return the payload of `cursor`; raise InvalidCursorError if it did not come from this listing."""
    start = bytes([_VERSION]) + scope
    try:
        if len(cursor) <= _LONGEST:
            data = base64.b64decode(cursor.encode() + b"=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
            payload = data[len(start) :]
            # Encoded again: Base64 reads several texts as the same bytes, and a position has one cursor.
            if data.startswith(start) and encode(scope, payload) == cursor:
                return payload
    except (ValueError, TypeError, binascii.Error, AttributeError):
        pass
    raise invalid_cursor()


def invalid_cursor() -> InvalidCursorError:
    """Return the error for a cursor that a listing did not hand out."""
    return InvalidCursorError(
        "This cursor is not of this listing with these filters: start again without one, or give the same filters."
    )
