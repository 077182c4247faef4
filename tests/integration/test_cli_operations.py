"""`gateway-store db`, `plugins` and `seed`: what sets a gateway up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
from cli_helpers import KEY, execute_on, tamper_with

import servers
from agent_gateway_store import GatewayStore, SyncGatewayStore, TrustLevel, errors
from agent_gateway_store.models.evidence import Checkpoint
from builders import make_event, make_request
from commands import Outcome, event_line, gateway_store

limited_url = cli_helpers.limited_url

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_db_upgrade_current_check_and_sql(postgres_database: Callable[[], str]) -> None:
    url = postgres_database()

    def db(*args: str) -> Outcome:
        return gateway_store("--database-url", url, "db", *args)

    assert db("current", "--json").json["state"] == "empty"
    db("check").assert_fails(1, "behind", "db upgrade")
    assert db("upgrade").out.startswith("The schema is at 0015")
    assert db("upgrade", "--json").json["state"] == "current"
    assert "current" in db("current").out
    assert db("check").code == 0
    assert db("check", "--json").json["differences"] == []
    assert "CREATE TABLE audit_events" in db("sql").out
    assert "JSONB" in db("sql", "--json").json["sql"]
    servers.run(execute_on(url, "ALTER TABLE audit_events DROP COLUMN risk_score"))
    changed = db("check")
    assert changed.code == 1
    assert "risk_score" in changed.err


def test_plugins_are_listed_with_what_is_wrong_with_them(tmp_path: Path) -> None:
    """One that waits for its settings is idle, one that is not installed broken; `doctor` says the same."""
    set_up = {"WITNESS_FILE_PATH": str(tmp_path / "witness"), "AGENT_GATEWAY_STORE_WEBHOOK_URL": "https://a.example/x"}
    set_up["AGENT_GATEWAY_STORE_WEBHOOK_SECRETS"] = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    waiting = {"apprise": "idle", "log": "active", "slack": "idle", "webhook": "idle", "witness-file": "idle"}

    for given, states in (({}, waiting), (set_up, waiting | {"webhook": "active", "witness-file": "active"})):
        listed = {item["name"]: item for item in gateway_store("plugins", "list", "--json", **given).json["items"]}
        assert {name: item["state"] for name, item in listed.items() if name in states} == states
        assert all("it does nothing yet: set" in listed[name]["error"] for name in states if states[name] == "idle")
        assert (listed["log"]["distribution"], listed["log"]["error"]) == ("agent-gateway-store", None)
        assert listed["log"]["hooks"] == ["gateway_store_register_notifiers"]

        doctor = gateway_store("doctor", **given).out
        assert all(f"plugins {name} {state}" in " ".join(doctor.split()) for name, state in states.items())
    broken = gateway_store("plugins", "list", AGENT_GATEWAY_STORE_LOAD_PLUGINS="log,missing")
    assert broken.code == 0
    assert all(words in broken.out for words in ("missing", "broken", "no such plugin is installed"))
    # Nor did asking about a database that is not there make it.
    assert gateway_store("db", "current").out.startswith("none (empty")
    gateway_store("db", "check").assert_fails(1, "db upgrade")
    assert "CREATE TABLE" in gateway_store("db", "sql").out
    assert list(tmp_path.iterdir()) == []


def test_a_role_that_may_not_delete_archives_no_approvals(limited_url: str) -> None:
    with SyncGatewayStore(limited_url, redis_url="") as store:
        store.approvals.deny(store.approvals.issue_token(make_request()), approver_id="bob")

    options = ("--before", "0d", "--below-floor", "--archive", "archive", "--by", "ops")
    gateway_store("--database-url", limited_url, "retention", "prune-approvals", *options).assert_fails(
        5, "approval_requests"
    )

    assert not Path("archive").exists()


@pytest.mark.system
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_restored_database_has_a_new_identity(kind: str, request: pytest.FixtureRequest) -> None:
    """It says so in an audit event; cursors from before are refused, and what was there is read as history."""
    url = "sqlite:///cli.db" if kind == "sqlite" else request.getfixturevalue("postgres_database")()

    def cli(*args: str, **options: Any) -> Outcome:
        return gateway_store("--database-url", url, *args, **options)

    cli("db", "restored", "--by", "ann").assert_fails(1, "db upgrade")
    cli("db", "upgrade")
    cli("audit", "write", input=f"{event_line('r1')}\n{event_line('r2')}")
    sealed: list[Checkpoint | None] = []
    cursors: list[str | None] = []

    async def look() -> None:
        async with GatewayStore(url) as store:
            sealed.append(await store.evidence.seal())
            cursors.append((await store.audit.changes()).next_cursor)
            cursors.append((await store.audit.changes("beginning", limit=1)).next_cursor)

    servers.run(look())
    if kind == "postgres":
        ahead = "pg_snapshot_xmax(pg_current_snapshot())::text::bigint + 1000"
        assert cli("doctor", "--json").json["database"]["foreign_transactions"] is False
        servers.run(tamper_with(url, f"UPDATE audit_events SET transaction_id = {ahead}"))
        restored = cli("doctor", "--json")
        (problem,) = restored.json["problems"]
        assert (restored.code, "`gateway-store db restored --by NAME`" in problem) == (1, True)
    blank = cli("db", "restored", "--by", " ")
    assert (blank.code, "--by must not be empty" in blank.err) == (2, True)
    cli("keys", "issue", "bot", "--role", "developer")
    ended = cli("db", "restored", "--by", "ann", "--json")
    found = ended.json
    assert "Approvals cancelled: 0." in ended.err
    assert "Active API keys: 1. Those revoked or rotated since the backup are valid again" in ended.err

    event, *_ = cli("audit", "search", "--tool", "db.restored", "--json").json["items"]
    assert (event["mcp_server"], event["caller_id"], event["sanitized_args"]) == ("gateway-store", "ann", found)
    assert found["history_id"] == 2
    (last,) = sealed
    assert last is not None
    assert (found["old_origin"], found["old_size"], found["old_root_hash"]) == (last.origin, 2, last.root_hash)
    assert last.origin.endswith(f"/{found['old_identity']}")
    well = cli("doctor", "--json")
    assert (well.code, well.json["problems"]) == (0, [])
    assert found["new_identity"] == well.json["database"]["identity"] != found["old_identity"]

    async def follow() -> tuple[list[str], list[str]]:
        async with GatewayStore(url) as store:
            for cursor in cursors:
                with pytest.raises(errors.InvalidCursorError, match="before `gateway-store db restored`"):
                    await store.audit.changes(cursor)
            pages = [await store.audit.changes("beginning", limit=2)]
            now = await store.audit.changes()
            await store.audit.write(make_event(request_id="new"))
            for _ in range(2):
                pages.append(await store.audit.changes(pages[-1].next_cursor, limit=2))
            new = await store.audit.changes(now.next_cursor)
            return [event.request_id for page in pages for event in page], [event.request_id for event in new]

    name = f"db.restored-{found['new_identity']}"
    assert servers.run(follow()) == (["r1", "r2", name, "new"], ["new"])


def test_seed_reads_a_policy_file_and_is_safe_to_repeat(tmp_path: Path) -> None:
    policies = str(EXAMPLES / "policies" / "default.yaml")

    first = gateway_store("seed", "--policies", policies)
    again = gateway_store("seed", "--policies", policies)
    as_json = gateway_store("seed", "--json")

    assert KEY.fullmatch(first.out.strip())
    assert "developer MEDIUM" in first.err
    assert (again.code, again.out) == (0, "")
    assert "already has an API key" in again.err
    assert (as_json.json["created"], as_json.json["trust_level"]) == (False, TrustLevel.MEDIUM)
    assert KEY.search(as_json.out) is None
    (item,) = gateway_store("keys", "list", "--json").json["items"]
    assert (item["caller_id"], item["role"], item["trust_level"]) == ("dev-agent", "developer", 2)

    own = tmp_path / "policies.yaml"
    own.write_text("version: 1\nroles:\n  developer: {trust_level: HIGH}\n")
    seeded = gateway_store("seed", "--policies", str(own), "--json", DATABASE_URL="sqlite:///own.db").json
    assert (seeded["created"], seeded["trust_level"], seeded["roles"]) == (True, 3, {"developer": "HIGH"})
    assert KEY.fullmatch(seeded["plaintext"])


def test_an_env_file_is_read_only_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DATABASE_URL=sqlite:///from-env-file.db\n")

    gateway_store("keys", "list")
    assert not (tmp_path / "from-env-file.db").exists()
    gateway_store("--env-file", ".env", "keys", "list")
    assert (tmp_path / "from-env-file.db").exists()
    gateway_store("--env-file", ".env", "--database-url", "sqlite:///option.db", "keys", "list")
    assert (tmp_path / "option.db").exists()
