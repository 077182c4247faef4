"""OpenTelemetry metrics of the audit writer (setting OTEL_ENABLED, extra `otel`)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from agent_gateway_store.errors import MissingExtraError

if TYPE_CHECKING:
    from agent_gateway_store.audit.writer import AuditWriter


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
