"""A load for dashboards: the demo's calls at a given rate for a given time, with its figures sent by OTLP."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent_gateway_store.demo.gateway import Approver, Gateway, Toolbox
from agent_gateway_store.errors import InvalidApiKeyError
from agent_gateway_store.models.keys import IssuedKey
from agent_gateway_store.store import GatewayStore

INSTALL = (
    "No figures leave this process: run `pip install 'agent-gateway-store[otel]' opentelemetry-sdk "
    "opentelemetry-exporter-otlp-proto-http`, and set OTEL_EXPORTER_OTLP_ENDPOINT where the collector is not on this "
    "machine."
)
# Chosen: of a store that cannot keep up calls are left out rather than heaped up.
_MOST_UNDER_WAY = 50
# Chosen: a dashboard shows the first figures within seconds.
_EXPORT_MS = 5_000
_READING = (
    {"tool": "list_files"},
    {"tool": "read_file", "name": "notes.txt"},
    {"tool": "hash_file", "name": "notes.txt"},
)


def export_figures() -> Callable[[], None] | None:
    """Send spans and metrics as the SDK's variables (OTEL_EXPORTER_OTLP_ENDPOINT, ...) say.

    Returns:
        What sends the last of them; None: the SDK or its exporter is not installed.
    """
    try:
        from opentelemetry import metrics, trace
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        return None
    traces = TracerProvider()
    traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    meters = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter(), export_interval_millis=_EXPORT_MS)])
    trace.set_tracer_provider(traces)
    metrics.set_meter_provider(meters)

    def end() -> None:
        meters.shutdown()
        traces.shutdown()

    return end


async def load(store: GatewayStore, issued: IssuedKey, *, seconds: float, rate: float) -> dict[str, Any]:
    """Make `rate` calls a second for `seconds` seconds; return how many were made, failed, and were left out."""
    caller = await store.keys.verify(issued.plaintext)
    under_way: set[asyncio.Task[None]] = set()
    counts = {"calls": 0, "failed": 0, "left_out": 0}
    loop = asyncio.get_running_loop()

    def end(task: asyncio.Task[None]) -> None:
        under_way.discard(task)
        counts["failed"] += not task.cancelled() and task.exception() is not None

    with tempfile.TemporaryDirectory(prefix="gateway-load-") as folder:
        gateway = Gateway(store, caller, Toolbox(Path(folder)))
        approving = loop.create_task(Approver(store, gateway.session_id).work())
        begun_at = loop.time()
        for number in range(round(seconds * rate)):
            await asyncio.sleep(begun_at + number / rate - loop.time())
            if loop.time() - begun_at >= seconds:
                break
            if len(under_way) >= _MOST_UNDER_WAY:
                counts["left_out"] += 1
                continue
            counts["calls"] += 1
            task = loop.create_task(_call(gateway, issued, number, Path(folder)))
            under_way.add(task)
            task.add_done_callback(end)
        if under_way:
            await asyncio.wait(under_way)
        # The callbacks of the last ones.
        await asyncio.sleep(0)
        approving.cancel()
        with suppress(asyncio.CancelledError):
            await approving
    return {**counts, "seconds": round(loop.time() - begun_at, 3)}


async def _call(gateway: Gateway, issued: IssuedKey, number: int, folder: Path) -> None:
    """Make one call: in twenty one that is approved, one that is denied, and one with a wrong key."""
    await gateway.store.keys.verify(issued.plaintext)
    match number % 20:
        case 5:
            name = f"old-{number}.csv"
            (folder / name).touch()
            await gateway.call("delete_file", name=name)
        case 10:
            await gateway.call("delete_file", name="customers.csv")
        case 15:
            with suppress(InvalidApiKeyError):
                await gateway.store.keys.verify("agw_wrong")
        case _:
            await gateway.call(**_READING[number % len(_READING)])
