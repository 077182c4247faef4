"""The compose files say what the test ladder and the example gateway rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import servers

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return content


def test_test_servers_are_those_of_the_ladder() -> None:
    services = load("docker-compose.test.yml")["services"]
    command = " ".join(services["redis"]["command"])

    assert services["postgres"]["ports"] == [f"127.0.0.1:{servers.COMPOSE_POSTGRES_PORT}:5432"]
    assert services["redis"]["ports"] == [f"127.0.0.1:{servers.COMPOSE_REDIS_PORT}:6379"]
    assert (servers.COMPOSE_POSTGRES_PORT, servers.COMPOSE_REDIS_PORT) == (55432, 56379)
    names = ("POSTGRES_DB", "POSTGRES_USER", "POSTGRES_PASSWORD")
    assert services["postgres"]["environment"] == dict.fromkeys(names, "gateway_test")
    assert services["postgres"]["tmpfs"] == ["/var/lib/postgresql/data"]
    assert command.startswith("redis-server ")
    assert "--user gateway_test on >gateway_test ~* &* +@all" in command
    assert "--user default off" in command


def test_example_collector_takes_otlp_and_logs_it() -> None:
    service = load("docker-compose.yml")["services"]["otel-collector"]
    source, target, _ = service["volumes"][0].split(":")
    config = load(source)

    assert service["image"].startswith("otel/opentelemetry-collector-contrib:")
    assert (service["ports"], service["command"]) == (["127.0.0.1:4317:4317"], [f"--config={target}"])
    assert config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"] == "0.0.0.0:4317"
    assert set(config["service"]["pipelines"]) == {"traces", "metrics", "logs"}
    for pipeline in config["service"]["pipelines"].values():
        assert (pipeline["receivers"], pipeline["exporters"]) == (["otlp"], ["debug"])


def test_example_gateway_talks_to_the_other_services() -> None:
    """Built from this checkout, it gets the URLs of the services beside it, whose data lies in a named volume."""
    content = load("docker-compose.yml")
    service, postgres = content["services"]["gateway"], content["services"]["postgres"]
    database, (volume, _, path) = postgres["environment"], postgres["volumes"][0].partition(":")
    login = f"{database['POSTGRES_USER']}:{database['POSTGRES_PASSWORD']}"

    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert {
        "DATABASE_URL": f"postgresql+asyncpg://{login}@postgres:5432/{database['POSTGRES_DB']}",
        "REDIS_URL": "redis://redis:6379/0",
        "ENVIRONMENT": "dev",
        "OTEL_ENABLED": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://otel-collector:4317",
    }.items() <= service["environment"].items()
    assert service["depends_on"]["postgres"] == {"condition": "service_healthy"}
    assert service["depends_on"]["redis"] == {"condition": "service_healthy"}
    assert service["build"] == {"context": ".", "dockerfile": "examples/fastapi_gateway/Dockerfile"}
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert (path, volume in content["volumes"]) == ("/var/lib/postgresql/data", True)
    for each in (content, load("docker-compose.test.yml")):
        for name, image in (("postgres", "postgres:17-alpine"), ("redis", "redis:7-alpine")):
            assert each["services"][name]["image"] == image
            assert each["services"][name]["healthcheck"]["test"]
