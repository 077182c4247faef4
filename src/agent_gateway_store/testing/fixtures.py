"""The pytest plugin `agent_gateway_store`. Importing it loads neither SQLModel nor an event loop."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from agent_gateway_store import GatewayStore, StoreSettings, SyncGatewayStore
    from agent_gateway_store.testing import MovableClock, RecordingNotifier


def pytest_configure(config: pytest.Config) -> None:
    """Add the fixtures of pytest-asyncio, if it is installed."""
    if config.pluginmanager.hasplugin("asyncio"):
        config.pluginmanager.import_plugin("agent_gateway_store.testing.asyncio_fixtures")


@pytest.fixture
def gateway_store(request: pytest.FixtureRequest) -> GatewayStore:
    """An open store on a SQLite file of the test's own, with no installed plugin and no setting of the machine.

    Its plugins are those of `gateway_store_plugins`. For async tests, by pytest-asyncio (whatever their loop scope) or
    by anyio on asyncio.
    """
    plugins = request.config.pluginmanager
    if "anyio_backend" in request.fixturenames and plugins.hasplugin("anyio"):
        name = "_gateway_store_of_anyio"
    elif plugins.hasplugin("asyncio"):
        marker = request.node.get_closest_marker("asyncio")
        scope = marker and marker.kwargs.get("loop_scope")
        name = f"_gateway_store_of_{scope or request.config.getini('asyncio_default_test_loop_scope') or 'function'}"
    else:
        pytest.fail("gateway_store needs pytest-asyncio, or a test marked with `anyio`; or take sync_gateway_store.")
    found: GatewayStore = request.getfixturevalue(name)
    return found


@pytest.fixture(name="_gateway_store_of_anyio")
async def _opened_by_anyio(
    anyio_backend: object,
    gateway_store_settings: StoreSettings,
    gateway_store_plugins: Iterable[object],
    _gateway_store_alone: None,
) -> AsyncIterator[GatewayStore]:
    from agent_gateway_store import GatewayStore

    async with GatewayStore(settings=gateway_store_settings, plugins=gateway_store_plugins) as store:
        yield store


@pytest.fixture
def sync_gateway_store(
    gateway_store_settings: StoreSettings, gateway_store_plugins: Iterable[object], _gateway_store_alone: None
) -> Iterator[SyncGatewayStore]:
    """An open blocking store, for tests that are not async."""
    from agent_gateway_store import SyncGatewayStore

    with SyncGatewayStore(settings=gateway_store_settings, plugins=gateway_store_plugins) as store:
        yield store


@pytest.fixture
def gateway_store_plugins(recorded_notifications: RecordingNotifier) -> Sequence[object]:
    """The plugins of `gateway_store`; override it to return your own. Default: `recorded_notifications` alone."""
    return [recorded_notifications]


@pytest.fixture
def gateway_store_settings(tmp_path: Path, _gateway_store_template: Path, _gateway_store_alone: None) -> StoreSettings:
    """The settings of `gateway_store`; override it to change some: `gateway_store_settings.model_copy(update=...)`."""
    from agent_gateway_store import StoreSettings

    folder = tmp_path / "gateway-store"
    folder.mkdir()
    shutil.copy(_gateway_store_template, folder / "gateway.db")
    return StoreSettings(
        database_url=f"sqlite:///{folder / 'gateway.db'}",
        redis_url="",
        audit_spool_path=folder / "spool.db",
        # The fewest that bcrypt allows: a key of a test needs no strength, and each round more doubles its time.
        bcrypt_rounds=4,
    )


@pytest.fixture
def recorded_notifications() -> RecordingNotifier:
    """A notifier that keeps the notices it receives."""
    from agent_gateway_store.testing import RecordingNotifier

    return RecordingNotifier()


@pytest.fixture
def gateway_clock() -> Iterator[MovableClock]:
    """The clock of the package, to be moved; put back after the test."""
    from agent_gateway_store.testing import MovableClock

    clock = MovableClock()
    clock.reset()
    yield clock
    clock.reset()


@pytest.fixture
def _gateway_store_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the settings of the machine and the installed plugins."""
    from agent_gateway_store.settings import PREFIX, StoreSettings

    for field in StoreSettings.model_fields:
        for name in (field.upper(), f"{PREFIX}{field.upper()}"):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(f"{PREFIX}LOAD_PLUGINS", "")
    monkeypatch.delenv(f"{PREFIX}BLOCK_PLUGINS", raising=False)


@pytest.fixture(scope="session")
def _gateway_store_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty SQLite file to copy: migrating one for each test would cost more than the test."""
    from agent_gateway_store.storage import migrate
    from agent_gateway_store.storage.database import create_engine

    path = tmp_path_factory.mktemp("gateway-store") / "template.db"

    async def make() -> None:
        engine = create_engine(f"sqlite:///{path}")
        try:
            await migrate.upgrade(engine)
        finally:
            await engine.dispose()

    # In a thread, since a loop may be running here.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, make()).result()
    return path
