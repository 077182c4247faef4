"""`gateway-store demo` does the main job end to end, as a user sees it."""

from __future__ import annotations

import gzip
import os
import tempfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cli_helpers import ask

from agent_gateway_store import AuditEvent, SyncGatewayStore
from commands import gateway_store, run_process
from forks import forks

pytestmark = pytest.mark.system


def test_the_demo_runs_in_an_empty_folder_and_shows_its_audit_log(tmp_path: Path) -> None:
    outcome = run_process("demo", NO_COLOR="1", COLUMNS="80", BCRYPT_ROUNDS="10")

    assert (outcome.code, outcome.err) == (0, "")
    assert max(map(len, outcome.out.splitlines())) <= 80
    for text in ("delete_file", "APPROVAL_REQUIRED", "DENY", "access_code=***", "gateway-demo.db", "list_recent()"):
        assert text in outcome.out
    assert "4711" not in outcome.out
    assert "\x1b" not in outcome.out
    names = {path.name for path in tmp_path.iterdir()}
    assert "gateway-demo.db" in names
    assert all(name.startswith("gateway-demo.db") for name in names)


def test_the_demo_tells_the_truth_and_can_be_run_again(tmp_path: Path) -> None:
    first = gateway_store("demo", "--json").json

    second = gateway_store("demo", "--json").json

    assert first["session_id"] != second["session_id"]
    assert second["files_left"] == ["customers.csv", "notes.txt"]
    assert second["second_use_refused"] is True
    assert Path(second["database_file"]) == tmp_path / "gateway-demo.db"
    with SyncGatewayStore(second["database_url"]) as store:
        events = [event for event in store.audit.list_recent() if event.session_id == second["session_id"]][::-1]
        approvals = {request.tool_call.arguments["name"]: request for request in store.approvals.list_requests(limit=2)}
        key = store.keys.get("demo-agent")
        assert len(store.audit.list_recent()) == 10
    assert [(event.tool_name, event.decision, event.execution_status) for event in events] == [
        ("list_files", "ALLOW", "SUCCESS"),
        ("read_file", "ALLOW", "SUCCESS"),
        ("hash_file", "ALLOW", "SUCCESS"),
        ("delete_file", "APPROVAL_REQUIRED", "SUCCESS"),
        ("delete_file", "DENY", None),
    ]
    assert [event.approver_id for event in events] == [None, None, None, "alice", "alice"]
    assert events[1].raw_args_hash == AuditEvent.hash_args({"name": "notes.txt", "access_code": "4711"})
    assert events[1].sanitized_args == {"name": "notes.txt", "access_code": "***"}
    assert events[1].redaction_flags[0].field == "sanitized_args.access_code"
    assert events[3].latency_ms > 0
    assert (approvals["old-export.csv"].status, approvals["old-export.csv"].outcome) == ("USED", "SUCCESS")
    assert approvals["customers.csv"].status == "DENIED"
    assert key.is_active is False


def test_the_demo_uses_the_database_it_is_given(
    migrated_postgres_database: Callable[[], str],
    fresh_redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PostgreSQL by DATABASE_URL, with Redis; no file is left, and somebody else's approval is not decided."""
    url = migrated_postgres_database()
    approval_id = ask(url, "somebody-elses", name="old-secrets")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    outcome = gateway_store("demo", DATABASE_URL=url, REDIS_URL=fresh_redis_url, HASH_KEY="pepper")

    assert outcome.code == 0
    assert list(tmp_path.iterdir()) == []
    with SyncGatewayStore(url) as store:
        events = store.audit.list_by_caller("demo-agent")
        assert store.approvals.get(approval_id=approval_id).status == "PENDING"
    assert len(events) == 5
    assert events[-1].raw_args_hash == AuditEvent.hash_args({}, key="pepper")


def test_a_load_ends_by_itself_and_sends_its_figures_by_otlp(tmp_path: Path) -> None:
    """To the endpoint that the SDK's variable names; without the exporter it says what to install."""
    paths: list[str] = []
    bodies = bytearray()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            paths.append(self.path)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bodies.extend(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    load = ("demo", "--load", "--seconds", "2", "--rate", "20", "--json")
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        # A process of its own: it sets the OpenTelemetry providers, of which each process has one for good.
        endpoint = f"http://127.0.0.1:{server.server_port}"
        sent = run_process(*load, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
        server.shutdown()
        serving.join()
    program = "import sys; sys.modules['opentelemetry.exporter'] = None; "
    program += "from agent_gateway_store.cli import main; main()"
    without = forks().run(["-c", program, *load[:2], "--seconds", "1"], cwd=tmp_path, env=os.environ, timeout=60)

    assert (sent.code, sent.err) == (0, "")
    assert sent.json["calls"] + sent.json["left_out"] <= 40
    assert sent.json["failed"] == 0
    with SyncGatewayStore(f"sqlite:///{tmp_path}/gateway-demo.db") as store:
        # Two of forty only try a wrong key.
        assert len(store.audit.list_recent(500)) >= sent.json["calls"] - 2
        assert {request.status for request in store.approvals.list_requests()} <= {"USED", "DENIED"}
    assert set(paths) == {"/v1/traces", "/v1/metrics"}
    assert b"audit.write" in bodies
    assert b"agent_gateway_store.audit.commit_duration" in bodies
    assert without.returncode == 0
    assert "pip install 'agent-gateway-store[otel]' opentelemetry-sdk" in without.stderr
