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


@pytest.fixture
def for_tests() -> dict[str, Any]:
    """The services of `docker-compose.test.yml`."""
    services: dict[str, Any] = load("docker-compose.test.yml")["services"]
    return services


@pytest.fixture
def example() -> dict[str, Any]:
    """The services of `docker-compose.yml`."""
    services: dict[str, Any] = load("docker-compose.yml")["services"]
    return services


@pytest.mark.parametrize("name", ["docker-compose.test.yml", "docker-compose.yml"])
def test_images_are_the_supported_servers(name: str) -> None:
    """Both files run the same PostgreSQL and Redis, each with a health check."""
    services = load(name)["services"]

    assert services["postgres"]["image"] == "postgres:17-alpine"
    assert services["redis"]["image"] == "redis:7-alpine"
    assert services["postgres"]["healthcheck"]["test"]
    assert services["redis"]["healthcheck"]["test"]


def test_test_servers_listen_on_the_ports_of_the_ladder(for_tests: dict[str, Any]) -> None:
    """The test servers stay off the default ports and off the network."""
    assert for_tests["postgres"]["ports"] == [f"127.0.0.1:{servers.COMPOSE_POSTGRES_PORT}:5432"]
    assert for_tests["redis"]["ports"] == [f"127.0.0.1:{servers.COMPOSE_REDIS_PORT}:6379"]
    assert servers.COMPOSE_POSTGRES_PORT == 55432
    assert servers.COMPOSE_REDIS_PORT == 56379


def test_test_postgres_has_the_credentials_of_the_ladder(for_tests: dict[str, Any]) -> None:
    """Role, database and password are gateway_test, and the data stays in memory."""
    assert for_tests["postgres"]["environment"] == {
        "POSTGRES_DB": "gateway_test",
        "POSTGRES_USER": "gateway_test",
        "POSTGRES_PASSWORD": "gateway_test",
    }
    assert for_tests["postgres"]["tmpfs"] == ["/var/lib/postgresql/data"]


def test_test_redis_lets_only_the_named_user_in(for_tests: dict[str, Any]) -> None:
    """Redis knows the user gateway_test, and the default user is off."""
    command = " ".join(for_tests["redis"]["command"])

    assert command.startswith("redis-server ")
    assert "--user gateway_test on >gateway_test ~* &* +@all" in command
    assert "--user default off" in command


def test_example_postgres_keeps_its_data(example: dict[str, Any]) -> None:
    """The data lies in a named volume."""
    volume, _, path = example["postgres"]["volumes"][0].partition(":")

    assert path == "/var/lib/postgresql/data"
    assert volume in load("docker-compose.yml")["volumes"]


def test_example_collector_takes_otlp_and_logs_it(example: dict[str, Any]) -> None:
    """The collector listens on 4317 with a config file that exists and that logs every signal."""
    service = example["otel-collector"]
    source, target, _ = service["volumes"][0].split(":")
    config = load(source)

    assert service["image"].startswith("otel/opentelemetry-collector-contrib:")
    assert service["ports"] == ["127.0.0.1:4317:4317"]
    assert service["command"] == [f"--config={target}"]
    assert config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"] == "0.0.0.0:4317"
    assert set(config["service"]["pipelines"]) == {"traces", "metrics", "logs"}
    for pipeline in config["service"]["pipelines"].values():
        assert pipeline["receivers"] == ["otlp"]
        assert pipeline["exporters"] == ["debug"]


def test_example_gateway_talks_to_the_other_services(example: dict[str, Any]) -> None:
    """The gateway gets the URLs of the services beside it and waits until they are healthy."""
    service, database = example["gateway"], example["postgres"]["environment"]
    login = f"{database['POSTGRES_USER']}:{database['POSTGRES_PASSWORD']}"

    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["environment"]["DATABASE_URL"] == (
        f"postgresql+asyncpg://{login}@postgres:5432/{database['POSTGRES_DB']}"
    )
    assert service["environment"]["REDIS_URL"] == "redis://redis:6379/0"
    assert service["environment"]["ENVIRONMENT"] == "dev"
    assert service["environment"]["OTEL_ENABLED"] == "true"
    assert service["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://otel-collector:4317"
    assert service["depends_on"]["postgres"] == {"condition": "service_healthy"}
    assert service["depends_on"]["redis"] == {"condition": "service_healthy"}


def test_example_gateway_is_built_from_this_checkout(example: dict[str, Any]) -> None:
    """The build context is the checkout, and the Dockerfile is in it."""
    build = example["gateway"]["build"]

    assert build["context"] == "."
    assert build["dockerfile"] == "examples/fastapi_gateway/Dockerfile"
    assert (ROOT / build["dockerfile"]).is_file()
