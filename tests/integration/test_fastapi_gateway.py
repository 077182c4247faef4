"""The example gateway over HTTP: two processes on one real PostgreSQL and Redis.

The first runs in the default audit mode, the second in AUDIT_MODE=strict.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from sqlalchemy import make_url

import servers
from agent_gateway_store import AuditEvent, GatewayStore, TrustLevel

pytestmark = pytest.mark.integration

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
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "fastapi_gateway"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                preexec_fn=servers._die_with_parent(signal.SIGKILL),
            )

    def text(self) -> str:
        """Return what it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_until_up(self, timeout_s: float = 30) -> str:
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
        "PYTHONPATH": str(EXAMPLES),
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


def _execute(url: Any, *statements: str) -> None:
    async def send() -> None:
        connection = await asyncpg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    servers.run(send())


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
def _logs(request: pytest.FixtureRequest) -> Iterator[None]:
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


async def test_allowed_call_runs_and_is_recorded(bench: Bench) -> None:
    """A real file is read, and the event says all that is known of the call."""
    (bench.site.sandbox / "hello.txt").write_text("hello")

    answer = await bench.agent.call("read_file", {"path": "hello.txt"})
    event = await bench.last_event()

    assert (answer.status_code, answer.json()["result"]) == (200, "hello")
    assert answer.headers["X-Request-Id"] == answer.json()["request_id"] == event.request_id
    assert (event.decision, event.execution_status) == ("ALLOW", "SUCCESS")
    assert (event.mcp_server, event.tool_name, event.session_id) == ("files", "read_file", "session-1")
    assert (event.caller_role, event.environment, event.org_id) == ("developer", "test", "default")
    assert event.raw_args_hash == AuditEvent.hash_args({"path": "hello.txt"})
    assert event.sanitized_args == {"path": "hello.txt"}
    assert event.matched_policy_rule == "developer.allow.1 files/*_file"
    assert event.policy_version == f"7@{hashlib.sha256(POLICY.encode()).hexdigest()[:12]}"
    assert event.output_hash == AuditEvent.hash_args({"result": "hello"})
    assert 0 <= event.latency_ms < 10_000
    assert (await bench.store.keys.get(bench.agent.caller_id)).key_id == event.key_id


async def test_tools_do_real_work(bench: Bench) -> None:
    """Listing and hashing tell what is on the disk."""
    (bench.site.sandbox / "data.bin").write_bytes(b"\x00\xff")

    listed = (await bench.agent.call("list_files")).json()["result"]
    hashed = (await bench.agent.call("hash_file", {"path": "data.bin"})).json()["result"]

    assert {"name": "data.bin", "kind": "file", "bytes": 2} in listed
    assert hashed == {"sha256": hashlib.sha256(b"\x00\xff").hexdigest(), "bytes": 2}


@pytest.mark.parametrize(
    ("tool", "rule"),
    [
        ("shell/run", "developer.deny.1 shell/*"),
        ("files/write_locked", "developer.deny.2 files/write_locked"),
        ("mail/send", "default-deny"),
    ],
)
async def test_denied_call_is_refused_and_recorded(bench: Bench, tool: str, rule: str) -> None:
    """deny beats the other rules, and what no rule speaks of is denied."""
    answer = await bench.agent.call(tool, {"password": SECRET})
    event = await bench.last_event()

    assert (answer.status_code, answer.json()["error"]) == (403, "denied_by_policy")
    assert (event.decision, event.execution_status, event.matched_policy_rule) == ("DENY", None, rule)
    assert answer.json()["detail"] == event.deterministic_rationale


async def test_role_unknown_to_the_policy_may_call_nothing(bench: Bench) -> None:
    """An approver is no caller of tools."""
    answer = await bench.approver.call("list_files")

    assert (answer.status_code, answer.json()["error"]) == (403, "denied_by_policy")


@pytest.mark.parametrize(
    "path",
    ["../policy.yaml", "/etc/passwd", "a/../../policy.yaml", "link", "a\0b"],
    ids=["up", "root", "far", "link", "nul"],
)
async def test_path_that_leads_out_is_refused(bench: Bench, path: str) -> None:
    """Neither dots nor an absolute path nor a link leaves the sandbox; the attempt is labelled."""
    link = bench.site.sandbox / "link"
    if not link.is_symlink():
        link.symlink_to("../policy.yaml")

    answer = await bench.agent.call("read_file", {"path": path})
    event = await bench.last_event()

    assert (answer.status_code, answer.json()["error"]) == (403, "path_refused")
    assert (event.decision, event.execution_status) == ("DENY", None)
    assert "PATH_TRAVERSAL" in event.risk_labels


async def test_path_is_checked_before_anybody_is_asked(bench: Bench) -> None:
    """A call that could never run does not reach an approver."""
    answer = await bench.agent.call("delete_file", {"path": "../policy.yaml"})

    assert answer.status_code == 403
    assert (bench.site.folder / "policy.yaml").exists()


@pytest.mark.parametrize(
    ("tool", "arguments", "status", "error", "executed"),
    [
        ("read_file", {"path": "missing.txt"}, 422, "tool_failed", "TOOL_ERROR"),
        ("read_file", {"password": SECRET}, 422, "invalid_arguments", None),
        ("read_file", {"path": 7}, 422, "invalid_arguments", None),
        ("fly_file", {}, 404, "unknown_tool", None),
    ],
    ids=["missing-file", "wrong-name", "wrong-type", "unknown-tool"],
)
async def test_call_that_cannot_be_done_says_why(
    bench: Bench, tool: str, arguments: dict[str, Any], status: int, error: str, executed: str | None
) -> None:
    """A tool that ran and failed is told from a call that never ran."""
    answer = await bench.agent.call(tool, arguments)
    event = await bench.last_event()

    assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert (event.decision, event.execution_status) == ("ALLOW" if executed else "DENY", executed)
    assert SECRET not in answer.text


async def _ask(bench: Bench, path: str, *, at: int = 0) -> dict[str, str]:
    """Put a file there, ask to delete it, and return the answer."""
    (bench.site.sandbox / path).write_text("x")
    answer = await bench.agent.call("delete_file", {"path": path}, at=at)
    assert answer.status_code == 202, answer.text
    asked: dict[str, str] = answer.json()
    return asked


async def test_approved_call_runs_once(bench: Bench) -> None:
    """Asked at one gateway, decided and used at the other; the events tell the whole story."""
    name = f"{uuid4().hex}.txt"
    asked = await _ask(bench, name)
    call = {"path": name}

    early = await bench.agent.call("delete_file", call, token=asked["token"], at=1)
    decided = await bench.approver.decide(asked["approval_id"], "approve", at=1, note="go ahead")
    done = await bench.agent.call("delete_file", call, token=asked["token"], at=1)
    again = await bench.agent.call("delete_file", call, token=asked["token"])
    events = await bench.events()
    stored = await bench.store.approvals.get(approval_id=asked["approval_id"])

    assert asked["status"] == "approval_required"
    assert (early.status_code, early.json()["error"]) == (409, "approval_not_approved")
    assert (decided.status_code, decided.json()["status"]) == (200, "APPROVED")
    assert decided.json()["approver_id"] == bench.approver.caller_id
    assert (done.status_code, done.json()["result"]) == (200, {"deleted": True, "bytes": 1})
    assert not (bench.site.sandbox / name).exists()
    assert (again.status_code, again.json()["error"]) == (409, "approval_already_used")
    assert [event.decision for event in events] == ["APPROVAL_REQUIRED", "DENY", "ALLOW", "DENY"]
    assert [event.execution_status for event in events] == [None, None, "SUCCESS", None]
    assert [event.approver_id for event in events] == [None, None, bench.approver.caller_id, None]
    assert [event.parent_request_id for event in events] == [None, *[asked["request_id"]] * 3]
    assert {event.matched_policy_rule for event in events} == {"developer.require_approval.2 files/delete_file"}
    assert (stored.status, stored.outcome, stored.approver_note) == ("USED", "SUCCESS", "go ahead")


@pytest.mark.parametrize("word", ["deny", "reject", "decline"])
async def test_denied_approval_releases_nothing(bench: Bench, word: str) -> None:
    """A denial is final, and its aliases mean the same."""
    name = f"{uuid4().hex}.txt"
    asked = await _ask(bench, name)

    decided = await bench.approver.decide(asked["approval_id"], word, note="no")
    late = await bench.approver.decide(asked["approval_id"], "approve")
    done = await bench.agent.call("delete_file", {"path": name}, token=asked["token"])

    assert decided.json()["status"] == "DENIED"
    assert (late.status_code, late.json()["error"]) == (409, "approval_already_decided")
    assert bench.approver.caller_id in late.json()["detail"]
    assert (done.status_code, done.json()["error"]) == (403, "approval_denied")
    assert (bench.site.sandbox / name).exists()
    assert [event.decision for event in await bench.events()] == ["APPROVAL_REQUIRED", "DENY"]


async def test_token_is_bound_to_caller_and_arguments(bench: Bench) -> None:
    """Another file, another tool, another caller, another token: none of them runs, and the token stays good."""
    name = f"{uuid4().hex}.txt"
    asked = await _ask(bench, name)
    await bench.approver.decide(asked["approval_id"], "approve")
    (bench.site.sandbox / "other.txt").write_text("x")
    other = await bench.store.keys.issue(f"other-{uuid4().hex[:8]}", role="developer")
    stranger = Agent(bench.site, "other", other.plaintext.get_secret_value(), bench.agent.clients)

    refused = [
        await bench.agent.call("delete_file", {"path": "other.txt"}, token=asked["token"]),
        await bench.agent.call("write_file", {"path": name, "content": "x"}, token=asked["token"]),
        await stranger.call("delete_file", {"path": name}, token=asked["token"]),
        await bench.agent.call("delete_file", {"path": name}, token="no-such-token"),
    ]
    done = await bench.agent.call("delete_file", {"path": name}, token=asked["token"])

    assert [answer.status_code for answer in refused] == [403, 403, 403, 403]
    assert [answer.json()["error"] for answer in refused] == [*["approval_mismatch"] * 3, "approval_not_found"]
    assert (bench.site.sandbox / "other.txt").exists()
    assert done.status_code == 200


async def test_race_for_one_token_has_one_winner(bench: Bench) -> None:
    """Twelve uses at two gateways at once: one runs, and the events agree."""
    name = f"{uuid4().hex}.txt"
    asked = await _ask(bench, name)
    await bench.approver.decide(asked["approval_id"], "approve", at=1)

    answers = await asyncio.gather(
        *(bench.agent.call("delete_file", {"path": name}, token=asked["token"], at=number % 2) for number in range(12))
    )
    counted = Counter((event.decision, event.execution_status) for event in await bench.events())

    assert sorted(answer.status_code for answer in answers) == [200, *[409] * 11]
    assert counted == {("APPROVAL_REQUIRED", None): 1, ("ALLOW", "SUCCESS"): 1, ("DENY", None): 11}


async def test_approved_call_that_fails_is_used_up(bench: Bench) -> None:
    """The file vanished before the call ran: the token is spent, and the outcome says so."""
    name = f"{uuid4().hex}.txt"
    asked = await _ask(bench, name)
    await bench.approver.decide(asked["approval_id"], "approve")
    (bench.site.sandbox / name).unlink()

    done = await bench.agent.call("delete_file", {"path": name}, token=asked["token"])
    event = await bench.last_event()
    stored = await bench.store.approvals.get(approval_id=asked["approval_id"])

    assert (done.status_code, done.json()["error"]) == (422, "tool_failed")
    assert (event.decision, event.execution_status) == ("ALLOW", "TOOL_ERROR")
    assert event.approver_id == bench.approver.caller_id
    assert (stored.status, stored.outcome) == ("USED", "TOOL_ERROR")


async def test_expired_approval_is_gone(bench: Bench) -> None:
    """After the deadline nothing is decided and nothing runs."""
    name = f"{uuid4().hex}.txt"
    asked = await _ask(bench, name)
    await bench.approver.decide(asked["approval_id"], "approve")
    past = "UPDATE approval_requests SET expires_at = created_at - interval '1 day' WHERE approval_id = '{}'"
    bench.site.sql_inside(past.format(asked["approval_id"]))

    done = await bench.agent.call("delete_file", {"path": name}, token=asked["token"])

    assert (done.status_code, done.json()["error"]) == (410, "approval_expired")
    assert (bench.site.sandbox / name).exists()


async def test_caller_follows_its_approval(bench: Bench) -> None:
    """The status is PENDING at once, and `wait` returns as soon as somebody decides at the other gateway."""
    asked = await _ask(bench, f"{uuid4().hex}.txt")
    path = f"/v1/approvals/{asked['token']}"

    pending = await bench.agent.send("GET", path)
    waiting = asyncio.create_task(bench.agent.send("GET", path, params={"wait": 15}))
    started = time.monotonic()
    await bench.approver.decide(asked["approval_id"], "approve", at=1)
    decided = await waiting

    assert (pending.status_code, pending.json()["status"]) == (200, "PENDING")
    assert (decided.json()["status"], decided.json()["approver_id"]) == ("APPROVED", bench.approver.caller_id)
    assert time.monotonic() - started < 10
    assert "token" not in decided.json()


async def test_status_of_an_unknown_token_is_404(bench: Bench) -> None:
    """Nothing is told about tokens that do not exist, and waits are bounded."""
    unknown = await bench.agent.send("GET", "/v1/approvals/no-such-token")
    too_long = await bench.agent.send("GET", "/v1/approvals/no-such-token", params={"wait": 31})

    assert (unknown.status_code, unknown.json()["error"]) == (404, "approval_not_found")
    assert too_long.status_code == 422


async def test_approver_sees_what_is_pending(bench: Bench) -> None:
    """The list shows the call with its arguments redacted, without token or hash."""
    answer = await bench.agent.call("write_file", {"path": "new.txt", "content": SECRET})
    asked = answer.json()

    listed = await bench.approver.send("GET", "/v1/approvals", params={"status": "PENDING", "limit": 500})
    item = next(item for item in listed.json()["items"] if item["approval_id"] == asked["approval_id"])

    assert item["tool_call"] == {
        "server": "files",
        "tool": "write_file",
        "arguments": {"path": "new.txt", "content": "[redacted]"},
    }
    assert (item["caller_id"], item["status"]) == (bench.agent.caller_id, "PENDING")
    assert SECRET not in listed.text
    assert asked["token"] not in listed.text
    assert "hash" not in listed.text


async def test_only_approvers_decide_and_read(bench: Bench) -> None:
    """A developer's key opens none of the approver's endpoints, and an admin's only the audit log."""
    asked = await _ask(bench, f"{uuid4().hex}.txt")
    issued = await bench.store.keys.issue(f"admin-{uuid4().hex[:8]}", role="admin", trust_level=TrustLevel.ADMIN)
    admin = Agent(bench.site, "admin", issued.plaintext.get_secret_value(), bench.agent.clients)

    refused = [
        await bench.agent.decide(asked["approval_id"], "approve"),
        await bench.agent.send("GET", "/v1/approvals"),
        await bench.agent.send("GET", "/v1/audit"),
        await admin.decide(asked["approval_id"], "approve"),
    ]
    read = [await who.send("GET", "/v1/audit", params={"limit": 3}) for who in (admin, bench.approver)]

    assert [answer.status_code for answer in refused] == [403] * 4
    assert [(answer.status_code, len(answer.json()["items"])) for answer in read] == [(200, 3)] * 2
    assert (await bench.agent.send("GET", f"/v1/approvals/{asked['token']}")).json()["status"] == "PENDING"


async def test_decision_about_nothing_is_404(bench: Bench) -> None:
    """An unknown approval and a malformed id look the same; an unknown word is refused."""
    unknown = await bench.approver.decide(str(uuid4()), "approve")
    malformed = await bench.approver.decide("7", "approve")
    word = await bench.approver.decide(str(uuid4()), "perhaps")

    assert [unknown.status_code, malformed.status_code, word.status_code] == [404, 404, 422]


async def test_wrong_keys_are_all_refused_alike(bench: Bench) -> None:
    """Missing, malformed, unknown, wrong and revoked keys get one answer; each is recorded under `unknown`."""
    issued = await bench.store.keys.issue(f"gone-{uuid4().hex[:8]}", role="developer")
    await bench.store.keys.revoke(issued.api_key.caller_id)
    before = len(await bench.store.audit.list_by_caller("unknown", limit=1000))
    keys = ["", "nonsense", "agw_aaaaaaaaaaaa_bbbb", f"{bench.agent.key[:-1]}!", issued.plaintext.get_secret_value()]

    answers = [
        await bench.agent.clients[0].post(
            "/v1/tools/call", content=b"{", headers={"Authorization": f"Bearer {key}"} if key else {}
        )
        for key in keys
    ]
    events = await bench.store.audit.list_by_caller("unknown", limit=1000)

    assert [answer.status_code for answer in answers] == [401] * 5
    assert len({(answer.json()["error"], answer.json()["detail"]) for answer in answers}) == 1
    assert {answer.headers["WWW-Authenticate"] for answer in answers} == {"Bearer"}
    assert len(events) - before == 5
    assert {(event.decision, event.matched_policy_rule) for event in events} == {("DENY", "gateway.invalid_api_key")}
    for key in keys[1:]:
        assert all(key not in answer.text for answer in answers)


async def test_key_may_come_in_its_own_header(bench: Bench) -> None:
    """X-API-Key does what a bearer token does."""
    body = {"server": "files", "tool": "list_files"}
    answer = await bench.agent.clients[0].post("/v1/tools/call", json=body, headers={"X-API-Key": bench.agent.key})

    assert answer.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        f'{{"server": "files", "password": "{SECRET}", ',
        f'{{"server": "files", "tool": "read_file", "extra": "{SECRET}"}}',
        f'{{"server": "files", "tool": "{SECRET} {SECRET}"}}',
        f'{{"server": "files", "tool": "read_file", "arguments": "{SECRET}"}}',
        '{"server": "files", "tool": "read_file", "arguments": ' + '{"a":' * 1000 + "1" + "}" * 1001,
        "",
        "[]",
        "\x00",
    ],
    ids=["cut", "extra", "bad-name", "bad-arguments", "deep", "empty", "list", "nul"],
)
async def test_malformed_request_is_422_and_recorded(bench: Bench, body: str) -> None:
    """What is no call is refused without repeating the input, and leaves one event."""
    answer = await bench.agent.send("POST", "/v1/tools/call", content=body.encode())
    events = await bench.events()

    assert (answer.status_code, answer.json()["error"]) == (422, "malformed_request")
    assert SECRET not in answer.text
    assert [(event.decision, event.tool_name) for event in events] == [("DENY", "unknown")]


async def test_request_that_is_too_large_is_413(bench: Bench) -> None:
    """Reading stops at the limit."""
    answer = await bench.agent.call("write_file", {"path": "big", "content": "x" * 2_000_001})

    assert (answer.status_code, answer.json()["error"]) == (413, "too_large")
    assert [event.decision for event in await bench.events()] == ["DENY"]


async def test_odd_arguments_are_recorded_too(bench: Bench) -> None:
    """NUL, huge numbers, deep nesting and secrets in depth neither stop the record nor show."""
    deep: Any = SECRET
    for _ in range(100):
        deep = {"level": deep}
    arguments = {"path": "a\0b", "number": 10**40, "deep": deep, "list": [{"db_password": SECRET}]}

    answer = await bench.agent.call("shell/run", arguments)
    event = await bench.last_event()

    assert answer.status_code == 403
    assert event.raw_args_hash == AuditEvent.hash_args(arguments)
    assert SECRET not in event.model_dump_json()
    assert event.sanitized_args["list"] == [{"db_password": "[redacted]"}]
    assert {flag.reason for flag in event.redaction_flags} == {"SECRET_NAME", "TOO_DEEP", "UNSTORABLE"}


async def test_client_may_name_its_request(bench: Bench) -> None:
    """A plain id is taken; asking again under it joins the pending approval; anything else gets a fresh id."""
    name = f"call-{uuid4().hex}"
    first = await bench.agent.call("delete_file", {"path": "x"}, X_Request_Id=name)
    second = await bench.agent.call("delete_file", {"path": "x"}, X_Request_Id=name, at=1)
    odd = await bench.agent.call("list_files", X_Request_Id="not an id")
    labels = [event.risk_labels[-1] for event in await bench.events()]

    assert first.json()["request_id"] == second.json()["request_id"] == name
    assert first.json()["approval_id"] == second.json()["approval_id"]
    assert first.json()["token"] != second.json()["token"]
    assert odd.json()["request_id"] != "not an id"
    assert labels.count("REQUEST_ID_REUSED") == 1


async def test_every_request_leaves_one_event_and_no_secret(bench: Bench) -> None:
    """A mixed session: counts by decision match the answers, and no secret is in an answer, a row or a log."""
    written = {"path": "kept.txt", "content": SECRET}
    asked = (await bench.agent.call("write_file", written)).json()
    await bench.approver.decide(asked["approval_id"], "approve")
    await bench.agent.call("write_file", written, token=asked["token"])
    await bench.agent.call("write_file", written, token=asked["token"])
    await bench.agent.call("shell/run", {"token": SECRET, "headers": {"Authorization": SECRET}})
    await bench.agent.call("hash_file", {"path": "kept.txt"})
    await bench.agent.send("GET", f"/v1/approvals/{asked['token']}")
    events = await bench.events()

    assert Counter(event.decision.value for event in events) == {"APPROVAL_REQUIRED": 1, "ALLOW": 2, "DENY": 2}
    assert len({event.request_id for event in events}) == 5
    secrets = (SECRET, bench.agent.key, bench.approver.key)
    rows = _everything_stored(bench.site)
    logs = "".join(process.text() for process in bench.site.processes)
    for secret in (*secrets, asked["token"]):
        assert secret not in rows
        assert secret not in logs
    for answer in (*bench.agent.answers, *bench.approver.answers):
        assert all(secret not in answer.text for secret in secrets)
    assert hashlib.sha256(asked["token"].encode()).hexdigest() in rows


def _everything_stored(site: Site) -> str:
    async def read() -> str:
        url = make_url(site.database_url).set(drivername="postgresql").render_as_string(hide_password=False)
        connection = await asyncpg.connect(url)
        try:
            names = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
            found = [await connection.fetch(f'SELECT t::text FROM "{name[0]}" AS t') for name in names]
        finally:
            await connection.close()
        return "\n".join(row[0] for rows in found for row in rows)

    return servers.run(read())


async def test_health_asks_the_database(bench: Bench) -> None:
    """Both gateways are well, without a key."""
    answers = [await client.get("/healthz") for client in bench.agent.clients]

    assert [(answer.status_code, answer.json()["status"]) for answer in answers] == [(200, "ok")] * 2


async def test_audit_that_fails_stops_the_call_in_strict_mode_only(bench: Bench) -> None:
    """The audit table is gone: the strict gateway withholds the result, the other lets the call through."""
    (bench.site.sandbox / "plain.txt").write_text("content-of-the-file")

    with _undone(
        bench.site.sql_inside, "ALTER TABLE audit_events RENAME TO away", "ALTER TABLE away RENAME TO audit_events"
    ):
        loose = await bench.agent.call("read_file", {"path": "plain.txt"}, at=0)
        strict = await bench.agent.call("read_file", {"path": "plain.txt"}, at=1)
        refused = await bench.agent.call("shell/run", at=1)
    strict_again = await _until(200, lambda: bench.agent.call("read_file", {"path": "plain.txt"}, at=1))
    spooled = await _until_there(bench, loose.json()["request_id"])

    assert loose.status_code == 200
    assert (strict.status_code, strict.json()["error"]) == (503, "audit_unavailable")
    assert "content-of-the-file" not in strict.text
    assert refused.status_code == 503
    assert strict_again.json()["result"] == "content-of-the-file"
    assert (spooled.decision, spooled.execution_status) == ("ALLOW", "SUCCESS")


async def test_outage_of_the_database_is_503_and_passes(bench: Bench) -> None:
    """No call runs without the database; one sentence says so, and the gateway recovers by itself."""
    name = make_url(bench.site.database_url).database
    shut = (
        f"ALTER DATABASE {name} ALLOW_CONNECTIONS false",
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
    )

    with _undone(bench.site.sql, shut, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"):
        call = await bench.agent.call("list_files")
        health = [await client.get("/healthz") for client in bench.agent.clients]
    after = await _until(200, lambda: bench.agent.call("list_files"))
    refused = await _until_there(bench, call.json()["request_id"], caller_id="unknown")

    assert (call.status_code, call.json()["error"]) == (503, "store_unavailable")
    assert call.json()["detail"] == "The gateway cannot reach its records: try again later."
    assert [answer.status_code for answer in health] == [503, 503]
    assert after.json()["status"] == "success"
    assert (refused.decision, refused.matched_policy_rule) == ("DENY", "gateway.store_unavailable")


async def _until(status: int, send: Callable[[], Awaitable[httpx.Response]], timeout_s: float = 10) -> httpx.Response:
    """Send again until the answer has this status."""
    end = time.monotonic() + timeout_s
    while (answer := await send()).status_code != status and time.monotonic() < end:
        await asyncio.sleep(0.1)
    assert answer.status_code == status, answer.text
    return answer


async def _until_there(bench: Bench, request_id: str, *, caller_id: str = "", timeout_s: float = 10) -> AuditEvent:
    """Wait until an event has come from the spool of the gateway."""
    end = time.monotonic() + timeout_s
    while (event := await bench.store.audit.get_by_request_id(request_id)) is None and time.monotonic() < end:
        await asyncio.sleep(0.1)
    assert event is not None
    assert event.caller_id == (caller_id or bench.agent.caller_id)
    return event


@contextmanager
def _undone(run: Any, do: str | tuple[str, ...], undo: str) -> Iterator[None]:
    run(*((do,) if isinstance(do, str) else do))
    try:
        yield
    finally:
        run(undo)


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("roles: [", "is not YAML at line 1"),
        ("version: 1\nroles: {developer: {trust_level: LOW, permit: []}}", "is wrong at roles.developer.permit"),
    ],
    ids=["missing", "no-yaml", "unknown-key"],
)
def test_bad_policy_ends_the_start_with_one_sentence(tmp_path: Path, policy: str | None, sentence: str) -> None:
    """The sentence names the file and what is wrong; there is no traceback, and no database is made."""
    if policy is not None:
        (tmp_path / "policy.yaml").write_text(policy)

    ended = subprocess.run(
        [sys.executable, "-m", "fastapi_gateway"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert ended.returncode == 1
    assert ended.stderr.startswith("The gateway did not start: The policy file ")
    assert sentence in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "gateway.db").exists()
