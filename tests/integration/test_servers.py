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

import servers
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


def test_failed_start_shows_the_log(folders: list[Path]) -> None:
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
