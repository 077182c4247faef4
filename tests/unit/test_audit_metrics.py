"""OpenTelemetry metrics, read by the SDK's in-memory reader."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

_MEASURE = """
import asyncio
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))

from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings

def points():
    found = reader.get_metrics_data()
    return {
        (metric.name, point.attributes.get("outcome")): point.value
        for resource in (found.resource_metrics if found else [])
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
        if hasattr(point, "value")
    }

async def main():
    settings = StoreSettings(otel_enabled=True, redis_url="")
    async with GatewayStore("sqlite:///gateway.db", settings=settings) as store:
        event = AuditEvent(
            request_id="r", caller_id="c", caller_role="dev", environment="dev", mcp_server="s", tool_name="t",
            raw_args_hash="0" * 64, sanitized_args={}, risk_score=0.5, matched_policy_rule="p", decision="ALLOW",
            latency_ms=1, deterministic_rationale="x",
        )
        await store.audit.write(event)
        await store.audit.write(event)
        measured = points()
    events = "agent_gateway_store.audit.events"
    assert measured[events, "stored"] == 1, measured
    assert measured[events, "duplicate"] == 1, measured
    assert measured[events, "lost"] == 0, measured
    assert measured["agent_gateway_store.audit.queue_depth", None] == 0, measured

asyncio.run(main())
"""


def test_outcomes_are_counted_by_the_meter() -> None:
    """With OTEL_ENABLED every outcome is an observable counter; the global provider needs a process of its own."""
    ended = subprocess.run([sys.executable, "-W", "error", "-c", _MEASURE], capture_output=True, text=True)

    assert ended.returncode == 0, ended.stderr


def test_a_missing_library_is_named_with_its_extra() -> None:
    """Without the OpenTelemetry API the setting ends in a sentence that says what to install."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import asyncio\n"
        "from agent_gateway_store import GatewayStore, StoreSettings, errors\n"
        "async def main():\n"
        "    try:\n"
        "        await GatewayStore('sqlite:///g.db', settings=StoreSettings(otel_enabled=True, redis_url='')).open()\n"
        "    except errors.MissingExtraError as exc:\n"
        "        print(exc)\n"
        "asyncio.run(main())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert "agent-gateway-store[otel]" in ended.stdout, ended.stderr
