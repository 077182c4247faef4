"""The outcomes of writes, their counters, and the log of events that could not be stored."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel

from agent_gateway_store._text import describe
from agent_gateway_store.audit.document import COLUMNS
from agent_gateway_store.audit.record import EncodedRow, to_values
from agent_gateway_store.encoding.sanitize import Scrubber
from agent_gateway_store.models.audit import AuditEvent

_logger = logging.getLogger("agent_gateway_store.audit.lost")


class WriteOutcome(StrEnum):
    """The outcome of a write.

    STORED: committed. DUPLICATE: the same event was there already. SPOOLED: on disk in the local spool, until the
    database is back. LOST: neither was possible; the event was logged at CRITICAL.
    """

    STORED = "STORED"
    DUPLICATE = "DUPLICATE"
    SPOOLED = "SPOOLED"
    LOST = "LOST"


@dataclass(slots=True)
class AuditCounters:
    """How many events this store has seen since it was opened, in this process.

    Attributes:
        stored: Committed to the database at the first try.
        duplicate: Already there.
        spooled: Kept in the local spool.
        replayed: Written from the spool to the database.
        lost: Logged at CRITICAL and stored nowhere.
        withheld: Stored without arguments and texts, because a plugin failed before the write.
        unnotified: Stored, but a plugin with `gateway_store_audit_written` was not notified; once for each plugin.
        queue_depth: Waiting for a commit now.
    """

    stored: int = 0
    duplicate: int = 0
    spooled: int = 0
    replayed: int = 0
    lost: int = 0
    withheld: int = 0
    unnotified: int = 0
    queue_depth: int = 0


def log_lost(row: EncodedRow | AuditEvent | None, cause: BaseException, *, request_id: str = "") -> None:
    """Log an event as one line of JSON: its encoded row or what it holds, else its request id. Never raises.

    What was wrong with an event that has no encoded row is logged before it.
    """
    try:
        if isinstance(row, tuple):
            values: Any = to_values(row)
        else:
            _logger.error("An audit event is not valid: %s", describe(cause))
            held = {"request_id": request_id} if row is None else {name: getattr(row, name) for name in COLUMNS}
            values = Scrubber().json("event", held)
        text = json.dumps(values, default=_plain, ensure_ascii=True)
        _logger.critical("LOST audit event (%s): %s", type(cause).__name__, text)
    except Exception:
        # Nothing is left to try after this, so it must not raise whatever the event holds.
        _logger.exception("LOST audit event that could not be encoded: %r", request_id)


def _plain(value: object) -> object:
    return value.model_dump() if isinstance(value, BaseModel) else str(value)
