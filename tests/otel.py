"""OpenTelemetry's real SDK for one test: the spans and metrics of what the store does meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agent_gateway_store import telemetry


class Recorded:
    """What was recorded.

    Attributes:
        tracer: Opens spans of the caller's.
    """

    def __init__(self, *readers: MetricReader) -> None:
        self._exporter, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.traces, self.meters = TracerProvider(), MeterProvider([self._reader, *readers])
        self.traces.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.traces.get_tracer("caller")

    @property
    def spans(self) -> list[ReadableSpan]:
        """The spans of the store and its integrations that have ended, in this order."""
        return [span for span in self._exporter.get_finished_spans() if span.instrumentation_scope.name != "caller"]

    def span(self, name: str) -> ReadableSpan:
        """Return the only span of this name."""
        (found,) = (span for span in self.spans if span.name == name)
        return found

    def deliveries(self, notifier: str) -> list[ReadableSpan]:
        """Return the spans of this notifier's deliveries that have ended, in this order."""
        sent = (span for span in self.spans if span.name == "notice.deliver")
        return [span for span in sent if (span.attributes or {})[f"{telemetry.SCOPE}.notifier"] == notifier]

    def metrics(self) -> dict[tuple[str, ...], Any]:
        """Return what each metric says now: its short name and the values of its attributes to its value or count."""
        return {
            (name, *map(str, point.attributes.values())): point.count if hasattr(point, "count") else point.value
            for name, point in self._points()
        }

    def longest(self, name: str) -> float:
        """Return the largest value that a histogram has recorded."""
        return max(float(point.max) for found, point in self._points() if found == name)

    def _points(self) -> Iterator[tuple[str, Any]]:
        data = self._reader.get_metrics_data()
        for resource in data.resource_metrics if data else []:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.data.data_points:
                        yield metric.name.removeprefix(f"{telemetry.SCOPE}."), point


@contextmanager
def recorded(*readers: MetricReader) -> Iterator[Recorded]:
    """Record what stores with OTEL_ENABLED do in the body. A process has only one global provider, so not by that."""
    found = Recorded(*readers)
    telemetry.disable()
    with (
        patch.object(trace, "get_tracer", found.traces.get_tracer),
        patch.object(metrics, "get_meter", found.meters.get_meter),
    ):
        try:
            yield found
        finally:
            telemetry.disable()
            found.meters.shutdown()
