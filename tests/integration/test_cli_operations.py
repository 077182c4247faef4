"""`gateway-store db`, `plugins`, `doctor` and `seed`: what sets a gateway up and tells how it stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import KEY

import servers
from agent_gateway_store import ApprovalRequest, GatewayStore, ToolCall, TrustLevel
from commands import Outcome, event_line, gateway_store

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_db_upgrade_current_check_and_sql(postgres_database: Callable[[], str]) -> None:
    """From an empty PostgreSQL database to one that equals the models."""
    url = postgres_database()

    def db(*args: str) -> Outcome:
        return gateway_store("--database-url", url, "db", *args)

    assert db("current", "--json").json["state"] == "empty"
    db("check").assert_fails(1, "behind", "db upgrade")
    assert db("upgrade").out.startswith("The schema is at 0005")
    assert db("upgrade", "--json").json["state"] == "current"
    assert "current" in db("current").out
    assert db("check").code == 0
    assert db("check", "--json").json["differences"] == []
    assert "CREATE TABLE audit_events" in db("sql").out
    assert "JSONB" in db("sql", "--json").json["sql"]
    servers.run(_execute(url, "ALTER TABLE audit_events DROP COLUMN risk_score"))
    changed = db("check")
    assert changed.code == 1
    assert "risk_score" in changed.err


async def _execute(url: str, statement: str) -> None:
    from sqlalchemy import text

    from agent_gateway_store.storage.database import create_engine

    engine = create_engine(url)
    async with engine.begin() as connection:
        await connection.execute(text(statement))
    await engine.dispose()


def test_asking_about_a_database_that_is_not_there_does_not_make_it(tmp_path: Path) -> None:
    """`db current`, `db check`, `db sql`, `plugins list` and `doctor` leave no file."""
    assert gateway_store("db", "current").out.startswith("none (empty")
    gateway_store("db", "check").assert_fails(1, "db upgrade")
    assert "CREATE TABLE" in gateway_store("db", "sql").out
    assert gateway_store("plugins", "list").code == 0
    assert gateway_store("doctor").code == 0

    assert list(tmp_path.iterdir()) == []


def test_plugins_are_listed_with_what_is_wrong_with_them() -> None:
    """The bundled notifier is active; one that was asked for and is not installed is broken."""
    (log,) = (item for item in gateway_store("plugins", "list", "--json").json["items"] if item["name"] == "log")
    assert (log["distribution"], log["state"], log["error"]) == ("agent-gateway-store", "active", None)
    assert log["hooks"] == ["gateway_store_register_notifiers"]

    broken = gateway_store("plugins", "list", AGENT_GATEWAY_STORE_LOAD_PLUGINS="log,missing")

    assert broken.code == 0
    assert "missing" in broken.out
    assert "broken" in broken.out
    assert "no such plugin is installed" in broken.out


def test_doctor_reports_on_postgresql_and_redis(postgres_database: Callable[[], str], fresh_redis_url: str) -> None:
    """Version, durability setting, schema, Redis: all as they are."""
    url = postgres_database()
    gateway_store("--database-url", url, "db", "upgrade")

    well = gateway_store("--database-url", url, "--redis-url", fresh_redis_url, "doctor", "--json")

    assert well.code == 0
    assert well.json["database"]["kind"] == "postgresql"
    assert well.json["database"]["server_version"]
    assert well.json["schema"] | {"expected": ""} == {
        "current": well.json["schema"]["expected"],
        "expected": "",
        "state": "current",
        "differences": [],
    }
    assert well.json["redis"]["state"] == "reachable"
    assert well.json["problems"] == []


def test_doctor_warns_of_a_postgresql_that_may_lose_commits(postgres_database: Callable[[], str]) -> None:
    """synchronous_commit off breaks the promise that acknowledged means durable."""
    url = postgres_database()
    gateway_store("--database-url", url, "db", "upgrade")
    servers.run(_execute(url, f'ALTER DATABASE "{url.rpartition("/")[2]}" SET synchronous_commit = off'))

    outcome = gateway_store("--database-url", url, "doctor", "--json")

    assert outcome.code == 0
    assert outcome.json["database"]["synchronous_commit"] == "off"
    assert "synchronous_commit" in outcome.json["warnings"][0]


def test_doctor_finds_a_restored_dump(postgres_database: Callable[[], str]) -> None:
    """Events that hold transaction ids which this server has not given out are a problem; its own are none."""
    url = postgres_database()
    gateway_store("--database-url", url, "db", "upgrade")
    gateway_store("--database-url", url, "audit", "write", input=event_line("r1"))

    def doctor() -> Outcome:
        return gateway_store("--database-url", url, "doctor", "--json")

    own = doctor()
    assert (own.code, own.json["problems"]) == (0, [])
    assert own.json["database"]["foreign_transactions"] is False
    ahead = "pg_snapshot_xmax(pg_current_snapshot())::text::bigint + 1000"
    servers.run(_execute(url, f"UPDATE audit_events SET transaction_id = {ahead}"))
    restored = doctor()
    assert restored.code == 1
    (problem,) = restored.json["problems"]
    advised = problem.split("`")[7]
    assert advised == "UPDATE audit_events SET transaction_id = NULL"
    servers.run(_execute(url, advised))

    assert doctor().code == 0


def test_doctor_reports_on_sqlite_and_on_approvals_without_outcome(tmp_path: Path) -> None:
    """Journal mode, synchronous, the file; a used approval of which nobody told the end is a warning."""
    url = f"sqlite:///{tmp_path / 'cli.db'}"
    call = ToolCall(server="files", tool="delete_file")

    async def use() -> None:
        async with GatewayStore(url) as store:
            token = await store.approvals.issue_token(
                ApprovalRequest(request_id="r1", caller_id="a", tool_call=call, risk_explanation="risky")
            )
            await store.approvals.approve(token, "ann")
            await store.approvals.consume_token(token, caller_id="a", tool_call=call)

    servers.run(use())

    found = gateway_store("--database-url", url, "doctor", "--json")

    database = found.json["database"]
    assert (database["journal_mode"], database["synchronous"]) == ("wal", "FULL")
    assert database["file"] == str(tmp_path / "cli.db")
    assert found.json["redis"] == {"state": "off"}
    assert found.json["audit"]["spool_path"] == str(tmp_path / "spool.db")
    assert found.json["approvals"]["used_without_outcome"] == 1
    assert "1 of the newest 1 used approvals" in found.json["warnings"][0]
    assert found.code == 0
    approval_id = gateway_store("--database-url", url, "approvals", "list", "--json").json["items"][0]["approval_id"]
    assert "outcome" in gateway_store("--database-url", url, "approvals", "show", approval_id).out
    assert "unknown" in gateway_store("--database-url", url, "approvals", "show", approval_id).out


def test_seed_reads_the_shipped_policy_file_and_is_safe_to_repeat() -> None:
    """dev-agent gets its role and trust level, and its key once."""
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


def test_seed_takes_the_trust_level_from_the_file(tmp_path: Path) -> None:
    """And without a file the developer is MEDIUM."""
    policies = tmp_path / "policies.yaml"
    policies.write_text("version: 1\nroles:\n  developer: {trust_level: HIGH}\n")

    seeded = gateway_store("seed", "--policies", str(policies), "--json").json

    assert (seeded["created"], seeded["trust_level"], seeded["roles"]) == (True, 3, {"developer": "HIGH"})
    assert KEY.fullmatch(seeded["plaintext"])


def test_an_env_file_is_read_only_when_asked_for(tmp_path: Path) -> None:
    """And an option wins over it."""
    (tmp_path / ".env").write_text("DATABASE_URL=sqlite:///from-env-file.db\n")

    gateway_store("keys", "list")
    assert not (tmp_path / "from-env-file.db").exists()
    gateway_store("--env-file", ".env", "keys", "list")
    assert (tmp_path / "from-env-file.db").exists()
    gateway_store("--env-file", ".env", "--database-url", "sqlite:///option.db", "keys", "list")
    assert (tmp_path / "option.db").exists()
