"""`gateway-store doctor`: what it finds well, and what it names with the command that mends it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cli_helpers
import pytest
from cli_helpers import execute_on
from redis import Redis
from sqlalchemy import make_url

import servers
from agent_gateway_store import GatewayStore, StoreSettings, SyncGatewayStore, ToolCall, clock
from agent_gateway_store.audit.record import encode_event, to_values
from agent_gateway_store.audit.spool import Spool
from builders import make_event, make_request
from commands import event_line, gateway_store
from pages import DOCS
from proofs.harness import identity_of, spooled_ids

limited_url = cli_helpers.limited_url


def test_doctor_reports_on_postgresql_and_redis(limited_url: str, fresh_redis_url: str) -> None:
    """Also as the role of gateways, which reads no more of the server's own tables than anybody may."""
    for url in (limited_url, make_url(limited_url).set(username="postgres").render_as_string(hide_password=False)):
        well = gateway_store("--database-url", url, "--redis-url", fresh_redis_url, "doctor", "--json")

        assert (well.code, well.json["problems"]) == (0, [])
        database, schema = well.json["database"], well.json["schema"]
        assert (database["kind"], database["takes_events"], bool(database["server_version"])) == (
            "postgresql",
            True,
            True,
        )
        assert abs(database["clock_difference_s"]) < 5
        assert (schema["current"], schema["state"], schema["differences"]) == (schema["expected"], "current", [])
        assert well.json["redis"]["state"] == "reachable"
        assert well.json["log"] == {"sealed": 0, "unsealed": 0, "last_checkpoint": None, "triggers_missing": []}
        assert well.json["retention"]["held_events"] == 0
        owns = any("owns the tables it writes" in warning for warning in well.json["warnings"])
        assert owns == (url != limited_url)


@pytest.mark.system
def test_doctor_says_what_a_user_of_redis_may_not_do() -> None:
    """The one that the page describes may do what the store does; approvals are in Redis then, and wake waiters."""
    page = (DOCS / "how-to" / "postgresql-and-redis.md").read_text()
    [rules] = re.findall("^ACL SETUSER gateway (.+)$", page, re.MULTILINE)
    with servers.RedisServer() as server, Redis.from_url(server.url) as operator:
        url = server.url.replace("://", "://gateway:secret@")
        for change, reason in (
            ("", None),
            ("resetpass >other", "WRONGPASS|invalid username-password"),
            ("-evalsha", "evalsha"),
            ("-publish", "publish"),
            ("-set", "stores nothing: .* may not SET"),
            ("-subscribe", "subscribe"),
            ("resetkeys", "key"),
            ("resetchannels", "channel"),
        ):
            operator.execute_command("ACL", "SETUSER", "gateway", "reset", *rules.split(" "))
            operator.execute_command("ACL", "SETUSER", "gateway", *change.split())
            found = gateway_store("--redis-url", url, "doctor", "--json")
            if reason is not None:
                assert (found.code, found.json["redis"]["state"]) == (5, "down"), change
                assert re.search(reason, found.json["problems"][0]), change
                assert "secret" not in found.said
                continue
            assert (found.code, found.json["redis"]["state"]) == (0, "reachable")
            with SyncGatewayStore(redis_url=url) as store:
                token = store.approvals.issue_token(make_request(request_id="r-1"))
                assert operator.exists(f"approval:{token}") == 1
                store.approvals.deny(token, approver_id="bob")
                store.audit.write(make_event(request_id="r-1"))
                store.retention.erase("r-1", reason="law", by="dpo")
                assert operator.keys("*") == []


@pytest.mark.system
def test_doctor_finds_a_redis_that_stores_nothing() -> None:
    with servers.RedisServer() as server, Redis.from_url(server.url) as operator:
        operator.execute_command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        for command, undo in (
            ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
            ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
        ):
            operator.execute_command(*command.split())
            found = gateway_store("--redis-url", server.url, "doctor", "--json")
            operator.execute_command(*undo.split())

            assert (found.code, found.json["redis"]["state"]) == (5, "down")
            assert "stores nothing: it is full, a replica" in found.json["problems"][0]


@pytest.mark.system
def test_doctor_repeats_no_password() -> None:
    """A server that does not know a command answers with its arguments, and redis-py says all of its client."""
    with servers.RedisServer(options=("--rename-command", "HELLO", "", "--rename-command", "AUTH", "")) as server:
        repeated = gateway_store("--redis-url", server.url.replace("://", "://:hunter2@"), "doctor", "--json")
    url = "redis+sentinel://:hunter2@127.0.0.1:1,127.0.0.1:2/gateway?sentinel_password=hunter3"
    sentinel = gateway_store("--redis-url", url, "doctor", "--json")
    replica = "postgresql://postgres:hunter2@127.0.0.1:1/gateway"
    gateway_store("--database-url", "sqlite:///g.db", "db", "upgrade")
    read = gateway_store("doctor", "--json", DATABASE_URL="sqlite:///g.db", DATABASE_READ_URL=replica, REDIS_URL="")

    assert repeated.code == sentinel.code == 5
    assert "unknown command" in repeated.json["problems"][0]
    (problem,) = sentinel.json["problems"]
    assert re.search(r"No master found for 'gateway' : \S*ConnectionError", problem)
    assert "<redis" not in problem
    (problem,) = read.json["problems"]
    assert "at DATABASE_READ_URL" in problem
    assert "DATABASE_READ_URL is right" in problem
    assert "DATABASE_URL" not in problem
    for found in (repeated, sentinel, read):
        assert "hunter" not in found.said


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_doctor_finds_a_log_that_nothing_protects(kind: str, request: pytest.FixtureRequest) -> None:
    """A trigger that is gone is a problem, with the statement that brings it back; what is not sealed is counted."""
    url = "sqlite:///cli.db" if kind == "sqlite" else request.getfixturevalue("migrated_postgres_database")()
    gateway_store("--database-url", url, "db", "upgrade")
    gateway_store("--database-url", url, "audit", "write", input=event_line("r1"))
    name = "audit_events_no_update" if kind == "sqlite" else "audit_events_append_only"
    servers.run(execute_on(url, f"DROP TRIGGER {name}{' ON audit_events' if kind == 'postgres' else ''}"))
    bare = gateway_store("--database-url", url, "doctor", "--json")
    (problem,) = bare.json["problems"]

    assert (bare.code, bare.json["log"]["unsealed"], bare.json["log"]["triggers_missing"]) == (1, 1, [name])
    assert problem.startswith(f"The trigger {name} is missing")
    servers.run(execute_on(url, problem.split("`")[1]))
    assert gateway_store("--database-url", url, "doctor").code == 0


def test_doctor_warns_of_a_postgresql_that_may_lose_commits(migrated_postgres_database: Callable[[], str]) -> None:
    """synchronous_commit off breaks the promise that acknowledged means durable; read-only, nothing can be decided."""
    url = migrated_postgres_database()
    alter = f'ALTER DATABASE "{url.rpartition("/")[2]}" SET'
    servers.run(execute_on(url, f"{alter} synchronous_commit = off"))
    off = gateway_store("--database-url", url, "doctor", "--json")
    servers.run(execute_on(url, f"{alter} default_transaction_read_only = on"))
    read_only = gateway_store("--database-url", url, "doctor", "--json")

    assert (off.code, off.json["database"]["synchronous_commit"]) == (0, "off")
    assert any("synchronous_commit" in warning for warning in off.json["warnings"])
    assert (read_only.code, read_only.json["database"]["reachable"]) == (5, True)
    assert "takes no writes" in read_only.json["problems"][0]


def test_doctor_finds_a_log_that_was_weakened(migrated_postgres_database: Callable[[], str]) -> None:
    url = migrated_postgres_database()
    weakened = {
        "UNLOGGED": "ALTER TABLE audit_events SET UNLOGGED",
        "id of their transaction": "ALTER TABLE audit_events ALTER transaction_id SET DEFAULT 3",
        "audit_door": "INSERT INTO audit_door VALUES (3)",
    }
    for statement in weakened.values():
        servers.run(execute_on(url, statement))
    weak = gateway_store("--database-url", url, "doctor", "--json")
    assert len(weak.json["problems"]) == len(weakened)
    for said in weakened:
        [problem] = [each for each in weak.json["problems"] if said in each]
        servers.run(execute_on(url, problem.split("`")[-2]))

    assert weak.code == 1
    assert gateway_store("--database-url", url, "doctor").code == 0


def test_doctor_finds_a_trigger_that_refuses_events(migrated_postgres_database: Callable[[], str]) -> None:
    url, body = migrated_postgres_database(), "BEGIN RAISE EXCEPTION ''no more events''; END"
    for statement in (
        f"CREATE FUNCTION full_log() RETURNS trigger LANGUAGE plpgsql AS '{body}'",
        "CREATE TRIGGER full_log BEFORE INSERT ON audit_events FOR EACH ROW EXECUTE FUNCTION full_log()",
    ):
        servers.run(execute_on(url, statement))

    outcome = gateway_store("--database-url", url, "doctor", "--json")

    assert (outcome.code, outcome.json["database"]["takes_events"]) == (1, False)
    (problem,) = outcome.json["problems"]
    assert problem.startswith("The database refuses audit events (")
    assert "no more events" in problem
    assert gateway_store("--database-url", url, "audit", "search", "--json").json["items"] == []


def test_doctor_finds_a_table_without_statistics_and_policies_that_hide_rows(
    migrated_postgres_database: Callable[[], str],
) -> None:
    """As after a restore, which `db restored` reads; a policy may be meant, so it is a warning."""
    url = migrated_postgres_database()
    filled = "INSERT INTO audit_events SELECT (jsonb_populate_record(NULL::audit_events, to_jsonb(event) || "
    filled += "jsonb_build_object('id', n, 'request_id', n::text))).* FROM audit_events AS event, "
    filled += "generate_series(100002, 103000) AS n"
    gateway_store("--database-url", url, "audit", "write", input=event_line("r1"))
    policy = "ALTER TABLE audit_leaves ENABLE ROW LEVEL SECURITY"
    for statement in ("ALTER TABLE audit_events SET (autovacuum_enabled = off)", filled, policy):
        servers.run(execute_on(url, statement))

    bad = gateway_store("--database-url", url, "doctor", "--json")
    assert gateway_store("--database-url", url, "db", "restored", "--by", "operator").code == 0
    good = gateway_store("--database-url", url, "doctor", "--json")

    assert (bad.code, bad.json["database"]["never_analysed"]) == (1, ["audit_events"])
    assert any("ANALYZE" in problem for problem in bad.json["problems"])
    assert any("Row-level security of audit_leaves" in warning for warning in bad.json["warnings"])
    assert (good.code, good.json["problems"]) == (0, [])


@pytest.mark.system
def test_an_event_that_a_policy_refuses_costs_no_other_and_doctor_names_it(limited_url: str) -> None:
    """It is set aside, alone, in a batch and from the spool; without a grant, which may come, all events wait."""
    owner, role = make_url(limited_url).set(username="postgres"), make_url(limited_url).username
    path = StoreSettings().audit_spool_path

    def as_owner(statement: str) -> None:
        servers.run(execute_on(owner.render_as_string(hide_password=False), statement))

    async def outcomes() -> list[Any]:
        async with GatewayStore(limited_url, redis_url="") as store:
            found: list[Any] = [await store.audit.write(make_event(org_id=org)) for org in ("other", "acme")]
            found.append(await store.audit.write_many(make_event(org_id=org) for org in ("acme", "other", "acme")))
            return [*found, await store.audit.flush()]

    as_owner("ALTER TABLE audit_events ENABLE ROW LEVEL SECURITY")
    as_owner(f"CREATE POLICY own ON audit_events TO {role} USING (org_id = 'acme')")
    for org in ("other", "acme"):
        servers.run(_spool(limited_url, path, (org, None), org_id=org))
    assert servers.run(outcomes()) == ["SPOOLED", "STORED", {"STORED": 2, "SPOOLED": 1}, 0]
    assert len(spooled_ids(path, poisoned=True)) == 3
    refused, own = (
        gateway_store("--database-url", limited_url, *org, "doctor", "--json") for org in ((), ("--org", "acme"))
    )
    assert (refused.code, refused.json["database"]["takes_events"]) == (1, False)
    assert "policy on audit_events" in refused.json["problems"][0]
    assert (own.code, own.json["database"]["takes_events"]) == (0, True)

    raised = "RAISE 'no' USING ERRCODE = 'insufficient_privilege'"
    as_owner(f"CREATE FUNCTION forbid() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {raised}; END $$")
    forbidden = "BEFORE INSERT ON audit_events FOR EACH ROW WHEN (NEW.org_id = 'other')"
    as_owner(f"CREATE TRIGGER forbid {forbidden} EXECUTE FUNCTION forbid()")
    assert servers.run(outcomes()) == ["SPOOLED", "STORED", {"STORED": 2, "SPOOLED": 1}, 0]
    as_owner(f"REVOKE INSERT ON audit_events FROM {role}")
    as_owner(f"REVOKE ALL (org_id) ON audit_events FROM {role}")
    assert servers.run(outcomes())[-1] == 5
    clock.move(timedelta(hours=2))
    late = gateway_store("--database-url", limited_url, "doctor", "--json")
    assert (late.code, "5 events wait" in late.json["problems"][-1]) == (1, True)


def test_doctor_reports_on_sqlite_and_on_approvals_without_outcome(tmp_path: Path) -> None:
    """Journal mode, synchronous, the file; a used approval of which nobody told the end is a warning."""
    url = f"sqlite:///{tmp_path / 'cli.db'}"
    call = ToolCall(server="files", tool="delete_file")

    async def use() -> None:
        async with GatewayStore(url) as store:
            token = await store.approvals.issue_token(make_request(caller_id="a", tool_call=call))
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


def test_doctor_lists_every_database_that_events_wait_for(tmp_path: Path) -> None:
    """Those of another one by its identity and its last URL, with the command that brings them in here."""
    here, there = (f"sqlite:///{tmp_path}/{name}.db" for name in ("here", "there"))
    for url in (here, there):
        gateway_store("--database-url", url, "db", "upgrade")
        servers.run(_spool(url, tmp_path / "spool.db", ("waits", None), ("refused", "DataError")))

    found = gateway_store("--database-url", here, "doctor", "--json")

    audit = found.json["audit"]
    assert (audit["spool_waiting"], audit["spool_quarantined"]) == (1, 1)
    (other,) = audit["spool_other_targets"]
    assert other == {
        "target": servers.run(identity_of(there)),
        "url": f"sqlite:///{tmp_path}/there.db",
        "waiting": 1,
        "quarantined": 1,
    }
    advised = found.json["warnings"][-1].split("`")[1].split()
    (tmp_path / "there.db").unlink()
    gateway_store("--database-url", here, "audit", "adopt", "unknown").assert_fails(4, "doctor")
    taken = gateway_store("--database-url", here, *advised[1:])
    assert taken.out == "2 events taken over, 0 still waiting.\n"
    assert gateway_store("--database-url", here, "doctor", "--json").json["audit"]["spool_other_targets"] == []
    assert len(gateway_store("--database-url", here, "audit", "search", "--json").json["items"]) == 2


async def _spool(url: str, path: Path, *rows: tuple[str, str | None], **fields: Any) -> None:
    spool = Spool(path, make_url(url), await identity_of(url))
    for request_id, error in rows:
        event = make_event(request_id=f"{url}/{request_id}", **fields)
        await spool.add([to_values(encode_event(event))], error=error)
    await spool.close()


def test_doctor_says_when_events_could_not_be_spooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / "file" / "spool.db")

    found = gateway_store("doctor", "--json", AUDIT_SPOOL_PATH=path)

    assert found.code == 1
    assert "events would be lost" in found.json["problems"][0]
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert gateway_store("doctor", AUDIT_SPOOL_PATH=path, AUDIT_MODE="strict").code == 0
    unread = gateway_store("doctor", "--json", AUDIT_SPOOL_PATH=str(tmp_path), AUDIT_MODE="strict")
    assert unread.json["problems"][0].startswith("What waits there is not brought in. The spool")
    gateway_store("doctor", AUDIT_SPOOL_PATH="").assert_fails(2, "audit_spool_path: ", "must name a file")
    gateway_store("db", "upgrade")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=2**20))
    full = gateway_store("doctor", "--json")
    assert full.code == 1
    assert any("The disk of the spool has 1 MiB left" in problem for problem in full.json["problems"])
