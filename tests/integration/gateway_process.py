"""The example gateway as two processes on one real PostgreSQL and Redis, and callers with keys of their own.

The first process runs in the default audit mode, the second in AUDIT_MODE=strict.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import URL, make_url

import servers
from agent_gateway_store import AuditEvent, GatewayStore, TrustLevel
from commands import python_path
from forks import forks
from proofs.harness import execute

EXAMPLES = Path(__file__).parents[2] / "examples"
SECRET = "correct-horse-battery-staple"
POLICY = """
version: 7
roles:
  developer:
    trust_level: MEDIUM
    allow:
      - {server: "files", tool: "*_file", reason: "Files of the sandbox are open."}
      - {server: "files", tool: "list_files", reason: "A listing shows names only."}
    require_approval:
      - {server: "files", tool: "write_*", reason: "Writing replaces what was there."}
      - {server: "files", tool: "delete_file", reason: "A deleted file cannot be brought back."}
    deny:
      - {server: "shell", tool: "*", reason: "A shell can do anything."}
      - {server: "files", tool: "write_locked", reason: "Locked."}
"""


class Process:
    """One gateway process; it ends with the test, and with the test run if that is killed."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        folder.mkdir()
        self.log = folder / "log"
        loaded = forks(is_large=True)
        loaded.load(["uvicorn", "agent_gateway_store.integrations.fastapi"])
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [loaded.programs / "python", "-m", "fastapi_gateway"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                preexec_fn=servers.die_with_parent(signal.SIGKILL),
            )

    def text(self) -> str:
        """Return what it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_until_up(self, timeout_s: float = 120) -> str:
        """Return its URL once it answers requests."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self.popen.poll() is None:
            if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", self.text()):
                return found[1]
            time.sleep(0.02)
        raise AssertionError(f"The gateway did not start:\n{self.text()}")

    def end(self) -> None:
        """Ask it to stop; kill it if it does not."""
        self.popen.terminate()
        try:
            self.popen.wait(10)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a gateway process: nothing of this machine, and warnings are errors."""
    return {
        "PATH": os.defpath,
        "HOME": str(folder),
        "PYTHONPATH": python_path(EXAMPLES),
        "PYTHONWARNINGS": "error",
        "BCRYPT_ROUNDS": "4",
        "GATEWAY_PORT": "0",
        "GATEWAY_POLICIES": str(folder / "policy.yaml"),
        "GATEWAY_SANDBOX": str(folder / "sandbox"),
        **more,
    }


@dataclass
class Site:
    """Two gateways, what they work on, and how to get at it."""

    folder: Path
    database_url: str
    redis_url: str
    processes: list[Process]
    urls: list[str]

    @property
    def sandbox(self) -> Path:
        """The folder of the tools."""
        return self.folder / "sandbox"

    def sql(self, *statements: str) -> None:
        """Run statements on the server, in the database that every server has."""
        _execute(make_url(self.database_url).set(database="postgres"), *statements)

    def sql_inside(self, *statements: str) -> None:
        """Run statements in the gateways' database."""
        _execute(make_url(self.database_url), *statements)


def _execute(url: URL, *statements: str) -> None:
    servers.run(execute(url.render_as_string(hide_password=False), *statements))


@pytest.fixture(scope="module")
def site(postgres_url: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two gateways that serve the same empty database, started side by side."""
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "policy.yaml").write_text(POLICY)
    name = f"gateway_{uuid4().hex}"
    server = make_url(postgres_url)
    _execute(server, f"CREATE DATABASE {name} TEMPLATE template0")
    database_url = server.set(database=name).render_as_string(hide_password=False)
    shared = {"DATABASE_URL": database_url, "REDIS_URL": redis_url}
    processes: list[Process] = []
    try:
        for mode in ("spool", "strict"):
            more = shared | {"AUDIT_MODE": mode, "AUDIT_SPOOL_PATH": str(folder / f"{mode}.db")}
            processes.append(Process(folder / mode, environment(folder, **more)))
        yield Site(folder, database_url, redis_url, processes, [process.wait_until_up() for process in processes])
        for process in processes:
            process.end()
            assert "Application shutdown complete." in process.text()
    finally:
        for process in processes:
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait()
        _execute(server, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture(autouse=True)
def logs(request: pytest.FixtureRequest) -> Iterator[None]:
    """A failing test shows what the gateways printed meanwhile."""
    if "site" not in request.fixturenames:
        yield
        return
    processes: list[Process] = request.getfixturevalue("site").processes
    before = [len(process.text()) for process in processes]
    yield
    for number, (process, start) in enumerate(zip(processes, before, strict=True)):
        print(f"--- gateway {number}\n{process.text()[start:]}")


class Agent:
    """A caller with a key of its own, which keeps every answer it gets."""

    def __init__(self, site: Site, caller_id: str, key: str, clients: list[httpx.AsyncClient]) -> None:
        self.site, self.caller_id, self.key, self.clients = site, caller_id, key, clients
        self.answers: list[httpx.Response] = []

    async def send(self, method: str, path: str, *, at: int = 0, **options: Any) -> httpx.Response:
        """Send a request with the key to gateway 0 or 1."""
        headers = {"Authorization": f"Bearer {self.key}", **options.pop("headers", {})}
        answer = await self.clients[at].request(method, path, headers=headers, **options)
        self.answers.append(answer)
        return answer

    async def call(
        self, tool: str, arguments: dict[str, Any] | None = None, *, at: int = 0, token: str = "", **headers: str
    ) -> httpx.Response:
        """Call a tool of the server `files`, or of another as `server/tool`."""
        server, _, name = tool.rpartition("/")
        body = {"server": server or "files", "tool": name, "arguments": arguments or {}, "session_id": "session-1"}
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            more["X-Approval-Token"] = token
        return await self.send("POST", "/v1/tools/call", at=at, json=body, headers=more)

    async def decide(self, approval_id: str, decision: str, *, at: int = 0, note: str = "") -> httpx.Response:
        """Decide an approval."""
        body = {"decision": decision, "note": note}
        return await self.send("POST", f"/v1/approvals/{approval_id}/decision", at=at, json=body)


@dataclass
class Bench:
    """What a test works with: an agent, an approver, and the store itself, to look behind the HTTP."""

    site: Site
    store: GatewayStore
    agent: Agent
    approver: Agent

    async def events(self) -> list[AuditEvent]:
        """The agent's audit events, oldest first."""
        return list(reversed(await self.store.audit.list_by_caller(self.agent.caller_id)))

    async def last_event(self) -> AuditEvent:
        """The agent's newest audit event."""
        return (await self.events())[-1]


@pytest.fixture
async def bench(site: Site) -> AsyncIterator[Bench]:
    """A fresh agent and a fresh approver."""
    async with (
        GatewayStore(site.database_url, redis_url=site.redis_url) as store,
        httpx.AsyncClient(base_url=site.urls[0], timeout=20) as first,
        httpx.AsyncClient(base_url=site.urls[1], timeout=20) as second,
    ):

        async def agent(role: str) -> Agent:
            caller_id = f"{role}-{uuid4().hex[:8]}"
            issued = await store.keys.issue(caller_id, role=role, trust_level=TrustLevel.MEDIUM, environment="test")
            return Agent(site, caller_id, issued.plaintext.get_secret_value(), [first, second])

        yield Bench(site, store, await agent("developer"), await agent("approver"))
