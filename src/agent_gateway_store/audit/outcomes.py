"""The outcomes of writes, their counters and metrics, and the log of events that could not be stored."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from agent_gateway_store._text import describe
from agent_gateway_store.audit.record import EncodedRow, to_values
from agent_gateway_store.encoding.sanitize import Scrubber
from agent_gateway_store.errors import MissingExtraError

if TYPE_CHECKING:
    from agent_gateway_store.audit.writer import AuditWriter

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
        untold: Stored, but a plugin with `gateway_store_audit_written` was not notified; once for each plugin.
        queue_depth: Waiting for a commit now.
    """

    stored: int = 0
    duplicate: int = 0
    spooled: int = 0
    replayed: int = 0
    lost: int = 0
    withheld: int = 0
    untold: int = 0
    queue_depth: int = 0


def log_lost(row: EncodedRow | Mapping[str, Any] | None, cause: BaseException, *, request_id: str = "") -> None:
    """Log an event as one line of JSON: its encoded row or its values, else its request id. Never raises.

    What was wrong with an event that has no encoded row is logged before it.
    """
    try:
        if isinstance(row, tuple):
            values: Any = to_values(row)
        else:
            _logger.error("An audit event is not valid: %s", describe(cause))
            values = Scrubber().json("event", row or {"request_id": request_id})
        text = json.dumps(values, default=_plain, ensure_ascii=True)
        _logger.critical("LOST audit event (%s): %s", type(cause).__name__, text)
    except Exception:
        # Nothing is left to try after this, so it must not raise whatever the event holds.
        _logger.exception("LOST audit event that could not be encoded: %r", request_id)


def _plain(value: object) -> object:
    return value.model_dump() if isinstance(value, BaseModel) else str(value)


def observe(writer: AuditWriter) -> None:
    """Measure `writer` for as long as it exists, by the meter `agent_gateway_store`.

    `agent_gateway_store.audit.events` counts events by the attribute `outcome` (stored, duplicate, spooled, replayed,
    lost); `agent_gateway_store.audit.queue_depth` is how many wait for a commit.

    Raises:
        MissingExtraError: The OpenTelemetry API is not installed.
    """
    try:
        from opentelemetry import metrics
    except ImportError as exc:
        raise MissingExtraError("OTEL_ENABLED", extra="otel") from exc

    # Weak, because OpenTelemetry keeps its callbacks for ever, and a store can be opened many times.
    alive = weakref.ref(writer)

    def events(_options: Any) -> Iterable[metrics.Observation]:
        if (measured := alive()) is not None:
            for outcome, count in asdict(measured.counters).items():
                if outcome not in ("queue_depth", "withheld", "untold"):
                    yield metrics.Observation(count, {"outcome": outcome})

    def queue_depth(_options: Any) -> Iterable[metrics.Observation]:
        if (measured := alive()) is not None:
            yield metrics.Observation(measured.counters.queue_depth)

    meter = metrics.get_meter("agent_gateway_store")
    meter.create_observable_counter(
        "agent_gateway_store.audit.events", [events], unit="{event}", description="Audit events by outcome"
    )
    meter.create_observable_gauge(
        "agent_gateway_store.audit.queue_depth", [queue_depth], unit="{event}", description="Events awaiting a commit"
    )
