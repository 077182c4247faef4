"""The example gateway over HTTP: two processes on one real PostgreSQL and Redis.

The first runs in the default audit mode, the second in AUDIT_MODE=strict.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any
from uuid import uuid4

import asyncpg
import gateway_process
import pytest
from gateway_process import POLICY, SECRET, Bench, Site
from sqlalchemy import make_url

import servers
from agent_gateway_store import AuditEvent

pytestmark = pytest.mark.system

site, logs, bench = gateway_process.site, gateway_process.logs, gateway_process.bench


async def test_allowed_call_runs_and_is_recorded(bench: Bench) -> None:
    """A real file is read, and the event says all that is known of the call."""
    (bench.site.sandbox / "hello.txt").write_text("hello")

    listed = (await bench.agent.call("list_files")).json()["result"]
    hashed = (await bench.agent.call("hash_file", {"path": "hello.txt"})).json()["result"]
    answer = await bench.agent.call("read_file", {"path": "hello.txt"})
    event = await bench.last_event()

    assert {"name": "hello.txt", "kind": "file", "bytes": 5} in listed
    assert hashed == {"sha256": hashlib.sha256(b"hello").hexdigest(), "bytes": 5}

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


async def test_denied_call_is_refused_and_recorded(bench: Bench) -> None:
    """deny beats the other rules, what no rule speaks of is denied, and an approver is no caller of tools."""
    for tool, rule in (
        ("shell/run", "developer.deny.1 shell/*"),
        ("files/write_locked", "developer.deny.2 files/write_locked"),
        ("mail/send", "default-deny"),
    ):
        answer = await bench.agent.call(tool, {"password": SECRET})
        event = await bench.last_event()
        assert (answer.status_code, answer.json()["error"]) == (403, "denied_by_policy")
        assert (event.decision, event.execution_status, event.matched_policy_rule) == ("DENY", None, rule)
        assert answer.json()["detail"] == event.deterministic_rationale
    answer = await bench.approver.call("list_files")
    assert (answer.status_code, answer.json()["error"]) == (403, "denied_by_policy")


async def test_path_that_leads_out_is_refused(bench: Bench) -> None:
    """Neither dots nor an absolute path nor a link leaves the sandbox; it is labelled, and no human is asked."""
    (bench.site.sandbox / "link").symlink_to("../policy.yaml")
    for path in ("../policy.yaml", "/etc/passwd", "a/../../policy.yaml", "link", "a\0b"):
        for tool in ("read_file", "delete_file"):
            answer = await bench.agent.call(tool, {"path": path})
            event = await bench.last_event()
            assert (answer.status_code, answer.json()["error"]) == (403, "path_refused"), path
            assert (event.decision, event.execution_status) == ("DENY", None)
            assert "PATH_TRAVERSAL" in event.risk_labels
    assert (bench.site.folder / "policy.yaml").exists()


async def test_call_that_cannot_be_done_says_why(bench: Bench) -> None:
    """A tool that ran and failed is told from a call that never ran."""
    cases: list[tuple[str, dict[str, Any], int, str, str | None]] = [
        ("read_file", {"path": "missing.txt"}, 422, "tool_failed", "TOOL_ERROR"),
        ("read_file", {"password": SECRET}, 422, "invalid_arguments", None),
        ("read_file", {"path": 7}, 422, "invalid_arguments", None),
        ("fly_file", {}, 404, "unknown_tool", None),
    ]
    for tool, arguments, status, error, executed in cases:
        answer = await bench.agent.call(tool, arguments)
        event = await bench.last_event()
        assert (answer.status_code, answer.json()["error"]) == (status, error)
        assert (event.decision, event.execution_status) == ("ALLOW" if executed else "DENY", executed)
        assert SECRET not in answer.text


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


async def test_malformed_request_is_422_and_recorded(bench: Bench) -> None:
    """What is no call is refused without repeating the input, and leaves one event; reading stops at the limit."""
    bodies = [
        f'{{"server": "files", "password": "{SECRET}", ',
        f'{{"server": "files", "tool": "read_file", "extra": "{SECRET}"}}',
        f'{{"server": "files", "tool": "{SECRET} {SECRET}"}}',
        f'{{"server": "files", "tool": "read_file", "arguments": "{SECRET}"}}',
        '{"server": "files", "tool": "read_file", "arguments": ' + '{"a":' * 1000 + "1" + "}" * 1001,
        "",
        "[]",
        "\x00",
    ]
    for body in bodies:
        answer = await bench.agent.send("POST", "/v1/tools/call", content=body.encode())
        assert (answer.status_code, answer.json()["error"]) == (422, "malformed_request")
        assert SECRET not in answer.text
    large = await bench.agent.call("write_file", {"path": "big", "content": "x" * 2_000_001})
    assert (large.status_code, large.json()["error"]) == (413, "too_large")
    events = await bench.events()
    assert [(event.decision, event.tool_name) for event in events] == [("DENY", "unknown")] * (len(bodies) + 1)


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
    await bench.agent.send("GET", "/v1/approval", headers={"X-Approval-Token": asked["token"]})
    events = await bench.events()

    assert Counter(event.decision.value for event in events) == {"APPROVAL_REQUIRED": 2, "ALLOW": 1, "DENY": 2}
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
