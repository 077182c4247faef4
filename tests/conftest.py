"""Fixtures for every test: servers, empty databases, and a clean environment."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from redis.exceptions import RedisError
from sqlalchemy import make_url

import once
import servers
from agent_gateway_store import clock
from agent_gateway_store.storage.cache import create_redis

_SETTINGS = (
    *(
        "AGENT_GATEWAY_STORE_",
        "ALLOW_SELF_APPROVAL",
        "API_KEY_",
        "APPROVAL_",
        "AUDIT_",
        "BCRYPT_",
        "CONSOLE_",
        "DATABASE_",
    ),
    *("ENVIRONMENT", "HASH_KEY", "NOTIFICATION_", "OTEL_", "PLUGIN_", "REDIS_"),
)


HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Where pytest-xdist is not loaded (`-p no:xdist`), its options of pyproject.toml stand for nothing."""
    if not pluginmanager.hasplugin("xdist"):
        parser.addoption("--numprocesses")
        parser.addoption("--dist")


def pytest_configure() -> None:
    """Keep compiled modules: without them each worker, and each process of a test, compiles the package anew."""
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # The processes of tests find there what pytest itself finds by `pythonpath`.
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if "TMPDIR" not in os.environ and (folder := servers.memory()):
        os.environ["TMPDIR"] = tempfile.tempdir = folder
    if (absent := str(HERE / "absent")) not in given:
        os.environ["PYTHONPATH"] = os.pathsep.join([absent, *filter(None, given)])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import, for `-m unit`, the folders in which each test is marked otherwise."""
    is_needless = collection_path.parent == HERE and collection_path.name in ("contract", "integration", "system")
    return True if is_needless and config.option.markexpr == "unit" else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests of the folders that `-m unit` leaves out, and let the slow ones take their time."""
    if not {HERE / "contract", HERE / "integration"}.isdisjoint(item.path.parents):
        item.add_marker(pytest.mark.integration)
    if item.get_closest_marker("slow"):
        # The limit is for the others.
        item.add_marker(pytest.mark.timeout(0))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run files and tests that are named in this process: it takes less time than starting workers for them."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    if named and all(Path(argument.partition("::")[0]).is_file() for argument in config.args):
        return 0
    # One for each core: with two, tests that start processes reach their timeouts on a slow machine.
    return len(os.sched_getaffinity(0))


def pytest_collection_finish() -> None:
    """Hide what was imported from the garbage collector: to collect after a test then costs next to nothing."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Let go of the values of its fixtures: those of the last test of a module would be hidden, and no leak found."""
    getattr(item, "funcargs", {}).clear()


@pytest.fixture(scope="session", autouse=True)
def _hidden_is_collected() -> Iterator[None]:
    """Collect, as the last of all, what was hidden and is used no longer; pytest itself would say it in no worker."""
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _garbage_is_collected() -> Iterator[None]:
    """Collect what a module leaves, and hide the rest: collecting took a tenth of the run and grew with each module."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _interrupts_are_heard() -> None:
    """A shell starts what runs in its background with SIGINT ignored; tests and their processes would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _once() -> Iterator[None]:
    """Do once what each store would do again, at a third of the time of most tests."""
    with pytest.MonkeyPatch.context() as patch:
        once.packages_are_read_once(patch)
        once.empty_files_are_migrated_once(patch)
        yield


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Settings of the machine do not reach a test, and its files stay in its own folder."""
    for name in [name for name in os.environ if name.upper().startswith(_SETTINGS)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AUDIT_SPOOL_PATH", str(tmp_path / "spool.db"))
    monkeypatch.setenv("BCRYPT_ROUNDS", "4")
    # Many tests ask for more approvals at once, as one caller, than the default allows.
    monkeypatch.setenv("APPROVAL_MAX_PENDING", "1000000")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """No store loads a plugin: the notices of the bundled one would only take time."""
    monkeypatch.setenv("AGENT_GATEWAY_STORE_LOAD_PLUGINS", "")


@pytest.fixture(autouse=True)
def _clock() -> Iterator[None]:
    """A test that moves the clock moves no other's."""
    yield
    clock.reset()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a real PostgreSQL server; the test fails if there is none."""
    try:
        with servers.postgres() as url:
            yield url
    except LookupError as exc:
        pytest.fail(str(exc))


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The URL of a real Redis server; the test fails if there is none."""
    # Workers share a server that was given to the run: each takes a database of its own there.
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    try:
        with servers.redis() as given:
            # That of a Sentinel, which `make_url` does not know, names several hosts, and the master in its path.
            parts = urlsplit(given)
            name, _, database = parts.path.rpartition("/")
            yield parts._replace(path=f"{name}/{int(database or 0) + worker}").geturl()
    except LookupError as exc:
        pytest.fail(str(exc))


@pytest.fixture
def fresh_redis_url(redis_url: str) -> str:
    """The URL of a real Redis server with nothing in it."""

    async def flush() -> None:
        async with create_redis(redis_url, timeout_s=5) as client:
            # Sentinels take a while to name another master.
            async with asyncio.timeout(30 if "+sentinel" in redis_url else 5):
                while True:
                    try:
                        return await client.flushdb()
                    except RedisError:
                        await asyncio.sleep(0.2)

    servers.run(flush())
    return redis_url


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[Callable[[], str]]:
    """Make an empty database with each call and return its URL; all are dropped after the test."""
    with _databases(postgres_url, "template0") as create:
        yield create


@pytest.fixture(scope="session")
def _migrated_template(postgres_url: str) -> Iterator[str]:
    """The name of a migrated, empty database: a clone of it costs a tenth of a migration."""
    from proofs.harness import migrated

    with _databases(postgres_url, "template0") as create:
        yield make_url(migrated(create())).database or ""


@pytest.fixture(scope="session")
def lasting_postgres_database(postgres_url: str, _migrated_template: str) -> Iterator[Callable[[], str]]:
    """The same as `migrated_postgres_database`; all are dropped after the session."""
    with _databases(postgres_url, _migrated_template) as create:
        yield create


@pytest.fixture
def migrated_postgres_database(postgres_url: str, _migrated_template: str) -> Iterator[Callable[..., str]]:
    """Make a migrated, empty database with each call and return its URL; all are dropped after the test.

    Given the URL of a database, make a copy of that one.
    """
    with _databases(postgres_url, _migrated_template) as create:
        yield create


@contextmanager
def _databases(server_url: str, template: str) -> Iterator[Callable[..., str]]:
    url = make_url(server_url)
    made: list[str] = []

    def send(*statements: str) -> None:
        from proofs.harness import execute

        servers.run(execute(url.render_as_string(hide_password=False), *statements))

    def create(copied: str = "") -> str:
        name, source = f"test_{uuid4().hex}", make_url(copied).database if copied else template
        # For files in memory, the quicker way by far; on a disk, and with checkpoints that sync, it is the slower one.
        strategy = "STRATEGY FILE_COPY" if server_url in servers.IN_MEMORY else ""
        # Those of a pooler before the server, which keeps them when its clients have gone.
        left = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{source}'"
        send(left, f"CREATE DATABASE {name} TEMPLATE {source} {strategy}")
        made.append(name)
        return url.set(database=name).render_as_string(hide_password=False)

    try:
        yield create
    finally:
        if made:
            send(*(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)" for name in made))
