"""The dashboard, the alerts and the files around them name only what a store really exports."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from prometheus_client import REGISTRY

from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings
from agent_gateway_store.errors import NotDeliveredError
from agent_gateway_store.store import parts_of
from agent_gateway_store.telemetry import METRICS
from agent_gateway_store.testing import RecordingNotifier
from builders import make_event, make_request
from otel import recorded

FOLDER = Path(__file__).parents[2] / "examples" / "otel"
NAME = re.compile(r"agent_gateway_store_\w+")
BY = re.compile(r"by \(([\w, ]+)\)")


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def rules() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = load("alerts.yaml")["groups"][0]["rules"]
    return found


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    for panel in json.loads((FOLDER / "grafana/dashboard.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))


class Refusing:
    name = "siem"

    async def send(self, events: Sequence[AuditEvent]) -> None:
        raise NotDeliveredError("refused", is_permanent=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> dict[str, set[str]]:
    """Each name that Prometheus gets from a store which has done everything once, with its labels."""

    async def use(folder: Path) -> None:
        settings = StoreSettings(otel_enabled=True, redis_url=redis_url, audit_spool_path=folder / "spool.db")
        notifier = RecordingNotifier()
        async with GatewayStore(f"sqlite:///{folder}/g.db", settings=settings, plugins=[notifier]) as store:
            await store.audit.write(make_event())
            await store.approvals.approve(await store.approvals.issue_token(make_request()), "alice")
            key = await store.keys.issue("agent", role="dev")
            await store.keys.verify(key.plaintext)
            while len(notifier.notices) < 2:
                await asyncio.sleep(0.01)
            await store.notifications.run(once=True)
            await store.audit.ship(Refusing(), once=True)
            await parts_of(store).figures.refresh()
            for family in REGISTRY.collect():
                for sample in family.samples:
                    found.setdefault(sample.name, set()).update(sample.labels)

    found: dict[str, set[str]] = {}
    reader = PrometheusMetricReader()
    with recorded(reader):
        asyncio.run(use(tmp_path_factory.mktemp("exported")))
    return {name: labels for name, labels in found.items() if name.startswith("agent_gateway_store_")}


def test_every_metric_is_exported_and_shown(exported: dict[str, set[str]]) -> None:
    shown = " ".join(expressions())

    for name in METRICS:
        prometheus = f"agent_gateway_store_{name.replace('.', '_')}"
        assert any(each.startswith(prometheus) for each in exported), name
        assert prometheus in shown, name


def test_an_expression_names_what_is_exported(exported: dict[str, set[str]]) -> None:
    for expression in expressions():
        names = NAME.findall(expression)
        known = set().union(*(exported.get(name, set()) for name in names)) | {"job", "instance"}
        labels = ", ".join([*BY.findall(expression), *re.findall(r"\{(\w+)=", expression)])
        assert names, expression
        assert set(names) <= exported.keys(), expression
        assert not labels or set(labels.split(", ")) <= known, expression


def test_every_alert_wakes_somebody() -> None:
    assert len({rule["alert"] for rule in rules()}) == 12
    for rule in rules():
        assert rule["labels"] == {"severity": "page"}
        assert rule["annotations"]["summary"].endswith(".")


def test_the_pages_explain_every_alert_and_list_every_metric() -> None:
    docs = FOLDER.parents[1] / "docs"
    page = (docs / "how-to/opentelemetry.md").read_text()
    table = (docs / "reference/telemetry.md").read_text()
    runbook = re.findall(r"^## (\w+)$", (docs / "how-to/runbook.md").read_text(), re.MULTILINE)

    assert runbook == [rule["alert"] for rule in rules()]
    for rule in rules():
        assert f"`{rule['alert']}`" in page
    for name, metric in METRICS.items():
        assert f"| `{name}` | {metric.kind.replace('_', ' ')} | `{metric.unit}` | {metric.description} |" in table


def test_the_services_find_their_files() -> None:
    services = load("compose.yaml")["services"]
    config = load("collector-prometheus.yaml")

    for service in services.values():
        assert all((FOLDER / volume.split(":")[0]).is_file() for volume in service["volumes"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert config["service"]["pipelines"]["metrics"]["exporters"] == ["prometheus"]
    (job,) = load("prometheus.yaml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["collector:8889"]}]
    assert load("grafana/datasources.yaml")["datasources"][0]["url"] == "http://prometheus:9090"
