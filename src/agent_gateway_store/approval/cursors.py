"""Opaque keyset cursors: where a page ended, so that rows added since do not shift the next one."""

from __future__ import annotations

import base64
import binascii
from datetime import UTC, datetime

from agent_gateway_store.errors import InvalidCursorError

__all__ = ["decode_cursor", "encode_cursor"]


def encode_cursor(at: datetime, row_id: int) -> str:
    """Return the cursor behind the row with this time and id."""
    return base64.urlsafe_b64encode(f"{at.isoformat()}|{row_id}".encode()).decode()


def decode_cursor(cursor: str) -> tuple[datetime, int]:
    """Return the time and id that `cursor` stands for.

    Raises:
        InvalidCursorError: It is not one of ours.
    """
    try:
        stamp, row_id = base64.b64decode(cursor.encode(), altchars=b"-_", validate=True).decode().split("|")
        at, number = datetime.fromisoformat(stamp), int(row_id)
        if at.tzinfo is not None and 0 <= number < 2**63:
            return at.astimezone(UTC), number
    except (ValueError, OverflowError, binascii.Error, AttributeError):
        pass
    raise InvalidCursorError("This cursor is not of this listing: start again without one.")
