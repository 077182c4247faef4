"""The example gateway when something is away: its audit table, its database, its policy file."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gateway_process
import httpx
import pytest
from gateway_process import Bench, environment
from sqlalchemy import make_url

from agent_gateway_store import AuditEvent
from forks import forks

pytestmark = pytest.mark.system

site, logs, bench = gateway_process.site, gateway_process.logs, gateway_process.bench


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

    well = [await client.get("/healthz") for client in bench.agent.clients]

    assert [(answer.status_code, answer.json()["status"]) for answer in well] == [(200, "ok")] * 2
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

    ended = forks().run(["-m", "fastapi_gateway"], cwd=tmp_path, env=environment(tmp_path), timeout=120)

    assert ended.returncode == 1
    assert ended.stderr.startswith("The gateway did not start: The policy file ")
    assert sentence in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "gateway.db").exists()
