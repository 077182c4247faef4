"""`gateway-store db`, `plugins`, `doctor` and `seed`: what sets a gateway up and tells how it stands."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_helpers import KEY
from redis import Redis
from sqlalchemy import make_url, text

import servers
from agent_gateway_store import ApprovalRequest, GatewayStore, SyncGatewayStore, ToolCall, TrustLevel, errors
from agent_gateway_store.audit.record import encode_event, to_values
from agent_gateway_store.audit.spool import Spool
from agent_gateway_store.models.evidence import Checkpoint
from agent_gateway_store.storage.database import create_engine
from builders import make_event, make_request
from commands import Outcome, event_line, gateway_store
from pages import DOCS
from proofs.harness import execute, identity_of
from tampering import tamper

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_db_upgrade_current_check_and_sql(postgres_database: Callable[[], str]) -> None:
    """From an empty PostgreSQL database to one that equals the models."""
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
    servers.run(_execute(url, "ALTER TABLE audit_events DROP COLUMN risk_score"))
    changed = db("check")
    assert changed.code == 1
    assert "risk_score" in changed.err


async def _execute(url: str, statement: str) -> None:
    engine = create_engine(url)
    async with engine.begin() as connection:
        await connection.execute(text(statement))
    await engine.dispose()


async def _tamper(url: str, statement: str) -> None:
    engine = create_engine(url)
    await tamper(engine, statement)
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


def test_a_plugin_that_waits_for_its_settings_is_idle(tmp_path: Path) -> None:
    """Whether it would offer a notifier or keep checkpoints; `plugins list` and `doctor` say the same."""
    set_up = {"WITNESS_FILE_PATH": str(tmp_path / "witness"), "AGENT_GATEWAY_STORE_WEBHOOK_URL": "https://a.example/x"}
    set_up["AGENT_GATEWAY_STORE_WEBHOOK_SECRETS"] = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    waiting = {"apprise": "idle", "log": "active", "slack": "idle", "webhook": "idle", "witness-file": "idle"}

    for given, states in (({}, waiting), (set_up, waiting | {"webhook": "active", "witness-file": "active"})):
        listed = {item["name"]: item for item in gateway_store("plugins", "list", "--json", **given).json["items"]}
        assert {name: item["state"] for name, item in listed.items() if name in states} == states
        assert all("it does nothing yet: set" in listed[name]["error"] for name in states if states[name] == "idle")

        doctor = gateway_store("doctor", **given).out
        assert all(f"plugins {name} {state}" in " ".join(doctor.split()) for name, state in states.items())


def test_doctor_reports_on_postgresql_and_redis(
    migrated_postgres_database: Callable[[], str], fresh_redis_url: str
) -> None:
    """Version, durability setting, schema, Redis: all as they are."""
    url = migrated_postgres_database()

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
    assert well.json["log"] == {"sealed": 0, "unsealed": 0, "last_checkpoint": None, "triggers_missing": []}
    assert any("owns the tables it writes" in warning for warning in well.json["warnings"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((), None),
        ((">other",), "WRONGPASS|invalid username-password"),
        (("-evalsha",), "evalsha"),
        (("-publish",), "publish"),
        (("resetkeys",), "key"),
        (("resetchannels",), "channel"),
    ],
)
def test_doctor_says_what_a_user_of_redis_may_not_do(change: tuple[str, ...], reason: str | None) -> None:
    """The one that the page describes may do what the store does; approvals are in Redis then, and wake waiters."""
    page = (DOCS / "how-to" / "postgresql-and-redis.md").read_text()
    [rules] = re.findall("^ACL SETUSER gateway (.+)$", page, re.MULTILINE)
    with servers.RedisServer() as server, Redis.from_url(server.url) as operator:
        operator.execute_command("ACL", "SETUSER", "gateway", *rules.split(" "))
        if ">other" in change:
            operator.execute_command("ACL", "SETUSER", "gateway", "resetpass")
        operator.execute_command("ACL", "SETUSER", "gateway", *change)
        url = server.url.replace("://", "://gateway:secret@")
        found = gateway_store("--redis-url", url, "doctor", "--json")
        if reason is None:
            with SyncGatewayStore(redis_url=url) as store:
                token = store.approvals.issue_token(make_request(request_id="r-1"))
                assert operator.exists(f"approval:{token}") == 1
                store.approvals.deny(token, approver_id="bob")
                store.audit.write(make_event(request_id="r-1"))
                store.retention.erase("r-1", reason="law", by="dpo")
                assert operator.keys("*") == []
    if reason is None:
        assert (found.code, found.json["redis"]["state"]) == (0, "reachable")
    else:
        assert (found.code, found.json["redis"]["state"]) == (5, "down")
        assert re.search(reason, found.json["problems"][0])
        assert "secret" not in found.said


def test_doctor_shows_no_password_that_redis_repeats() -> None:
    """A server, or a proxy before it, that does not know the command answers with its arguments."""
    with servers.RedisServer(options=("--rename-command", "HELLO", "", "--rename-command", "AUTH", "")) as server:
        found = gateway_store("--redis-url", server.url.replace("://", "://:hunter2@"), "doctor", "--json")

    assert found.code == 5
    assert "unknown command" in found.json["problems"][0]
    assert "hunter2" not in found.said


@pytest.fixture
def limited_url(migrated_postgres_database: Callable[[], str]) -> Iterator[str]:
    """A database for the role of gateways that the page describes; its owner's URL has `postgres` as its user."""
    url, role = migrated_postgres_database(), f"gateway_{secrets.token_hex(4)}"
    page = (DOCS / "how-to" / "postgresql-and-redis.md").read_text()
    grants = [line.replace("gateway_app", role) for line in page.splitlines() if line.startswith("GRANT ")]
    servers.run(execute(url, f"CREATE ROLE {role} LOGIN", *(grant.rstrip(";") for grant in grants)))
    yield make_url(url).set(username=role).render_as_string(hide_password=False)
    servers.run(execute(url, f"DROP OWNED BY {role}", f"DROP ROLE {role}"))


def test_doctor_finds_a_database_well_as_the_role_of_gateways(limited_url: str) -> None:
    """It is no superuser, and reads no more of the server's own tables than anybody may."""
    outcome = gateway_store("--database-url", limited_url, "doctor", "--json")

    assert (outcome.code, outcome.json["problems"]) == (0, [])
    assert outcome.json["database"]["takes_events"]
    assert outcome.json["retention"]["held_events"] == 0


def test_a_role_that_may_not_delete_archives_no_approvals(limited_url: str) -> None:
    """It is refused before anything is written to the folder."""
    with SyncGatewayStore(limited_url, redis_url="") as store:
        store.approvals.deny(store.approvals.issue_token(make_request()), approver_id="bob")

    options = ("--before", "0d", "--below-floor", "--archive", "archive", "--by", "ops")
    gateway_store("--database-url", limited_url, "retention", "prune-approvals", *options).assert_fails(
        5, "approval_requests"
    )

    assert not Path("archive").exists()


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_doctor_finds_a_log_that_nothing_protects(kind: str, request: pytest.FixtureRequest) -> None:
    """A trigger that is gone is a problem, with the statement that brings it back; what is not sealed is counted."""
    url = "sqlite:///cli.db" if kind == "sqlite" else request.getfixturevalue("migrated_postgres_database")()
    gateway_store("--database-url", url, "db", "upgrade")
    gateway_store("--database-url", url, "audit", "write", input=event_line("r1"))
    name = "audit_events_no_update" if kind == "sqlite" else "audit_events_append_only"
    servers.run(_execute(url, f"DROP TRIGGER {name}{' ON audit_events' if kind == 'postgres' else ''}"))
    bare = gateway_store("--database-url", url, "doctor", "--json")
    (problem,) = bare.json["problems"]

    assert (bare.code, bare.json["log"]["unsealed"], bare.json["log"]["triggers_missing"]) == (1, 1, [name])
    assert problem.startswith(f"The trigger {name} is missing")
    servers.run(_execute(url, problem.split("`")[1]))
    assert gateway_store("--database-url", url, "doctor").code == 0


def test_doctor_warns_of_a_postgresql_that_may_lose_commits(migrated_postgres_database: Callable[[], str]) -> None:
    """synchronous_commit off breaks the promise that acknowledged means durable."""
    url = migrated_postgres_database()
    servers.run(_execute(url, f'ALTER DATABASE "{url.rpartition("/")[2]}" SET synchronous_commit = off'))

    outcome = gateway_store("--database-url", url, "doctor", "--json")

    assert outcome.code == 0
    assert outcome.json["database"]["synchronous_commit"] == "off"
    assert any("synchronous_commit" in warning for warning in outcome.json["warnings"])


def test_doctor_finds_a_database_that_takes_no_writes(migrated_postgres_database: Callable[[], str]) -> None:
    """Exit 5, as where it is away: nothing can be decided or written."""
    url = migrated_postgres_database()
    servers.run(_execute(url, f'ALTER DATABASE "{url.rpartition("/")[2]}" SET default_transaction_read_only = on'))

    outcome = gateway_store("--database-url", url, "doctor", "--json")

    assert outcome.code == 5
    assert outcome.json["database"]["reachable"] is True
    assert "takes no writes" in outcome.json["problems"][0]


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_doctor_finds_a_trigger_that_refuses_events(kind: str, request: pytest.FixtureRequest) -> None:
    """Every event would end in quarantine. What is tried is rolled back."""
    url = "sqlite:///cli.db" if kind == "sqlite" else request.getfixturevalue("migrated_postgres_database")()
    gateway_store("--database-url", url, "db", "upgrade")
    for statement in REFUSING[kind]:
        servers.run(_execute(url, statement))

    outcome = gateway_store("--database-url", url, "doctor", "--json")

    assert (outcome.code, outcome.json["database"]["takes_events"]) == (1, False)
    (problem,) = outcome.json["problems"]
    assert problem.startswith("The database refuses audit events (")
    assert "no more events" in problem
    assert gateway_store("--database-url", url, "audit", "search", "--json").json["items"] == []


REFUSING = {
    "sqlite": [
        "CREATE TRIGGER full_log BEFORE INSERT ON audit_events BEGIN SELECT raise(ABORT, 'no more events'); END"
    ],
    "postgres": [
        """CREATE FUNCTION full_log() RETURNS trigger LANGUAGE plpgsql
        AS 'BEGIN RAISE EXCEPTION ''no more events''; END'""",
        "CREATE TRIGGER full_log BEFORE INSERT ON audit_events FOR EACH ROW EXECUTE FUNCTION full_log()",
    ],
}


def test_doctor_finds_a_table_without_statistics_and_a_clock_that_is_wrong(
    migrated_postgres_database: Callable[[], str],
) -> None:
    """As after a restore; `db restored` reads them, and at the right time all is well."""
    url = migrated_postgres_database()
    filled = "INSERT INTO audit_events SELECT (jsonb_populate_record(NULL::audit_events, to_jsonb(event) || "
    filled += "jsonb_build_object('id', n, 'request_id', n::text))).* FROM audit_events AS event, "
    filled += "generate_series(100002, 103000) AS n"
    gateway_store("--database-url", url, "audit", "write", input=event_line("r1"))
    for statement in ("ALTER TABLE audit_events SET (autovacuum_enabled = off)", filled):
        servers.run(_execute(url, statement))

    bad = gateway_store("--database-url", url, "doctor", "--json")
    assert gateway_store("--database-url", url, "db", "restored", "--by", "operator").code == 0
    good = gateway_store("--database-url", url, "doctor", "--json")

    assert (bad.code, bad.json["database"]["never_analysed"]) == (1, ["audit_events"])
    assert any("ANALYZE" in problem for problem in bad.json["problems"])
    assert (good.code, good.json["problems"]) == (0, [])
    assert abs(good.json["database"]["clock_difference_s"]) < 5


def test_doctor_names_tables_of_which_policies_hide_rows(migrated_postgres_database: Callable[[], str]) -> None:
    """Whoever reads there may be shown another log; a policy may be meant, so it is a warning."""
    url = migrated_postgres_database()
    servers.run(_execute(url, "ALTER TABLE audit_leaves ENABLE ROW LEVEL SECURITY"))

    outcome = gateway_store("--database-url", url, "doctor", "--json")

    assert outcome.code == 0
    assert any("Row-level security of audit_leaves" in warning for warning in outcome.json["warnings"])


def test_doctor_finds_a_disk_without_room_for_the_spool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before the outage in which events would be lost."""
    gateway_store("db", "upgrade")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=2**20))

    outcome = gateway_store("doctor", "--json")

    assert outcome.code == 1
    assert any("The disk of the spool has 1 MiB left" in problem for problem in outcome.json["problems"])


def test_doctor_finds_a_restored_dump(migrated_postgres_database: Callable[[], str]) -> None:
    """Events that hold transaction ids which this server has not given out are a problem; its own are none."""
    url = migrated_postgres_database()
    gateway_store("--database-url", url, "audit", "write", input=event_line("r1"))

    def doctor() -> Outcome:
        return gateway_store("--database-url", url, "doctor", "--json")

    own = doctor()
    assert (own.code, own.json["problems"]) == (0, [])
    assert own.json["database"]["foreign_transactions"] is False
    ahead = "pg_snapshot_xmax(pg_current_snapshot())::text::bigint + 1000"
    servers.run(_tamper(url, f"UPDATE audit_events SET transaction_id = {ahead}"))
    restored = doctor()
    assert restored.code == 1
    (problem,) = restored.json["problems"]
    advised = problem.split("`")[7]
    assert advised == "gateway-store db restored --by NAME"
    gateway_store("--database-url", url, *advised.split()[1:])

    assert doctor().code == 0
    assert doctor().json["database"]["identity"] != own.json["database"]["identity"]


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
        servers.run(_tamper(url, f"UPDATE audit_events SET transaction_id = {ahead}"))
    blank = cli("db", "restored", "--by", " ")
    assert (blank.code, "--by must not be empty" in blank.err) == (2, True)
    found = cli("db", "restored", "--by", "ann", "--json").json

    event, *_ = cli("audit", "search", "--tool", "db.restored", "--json").json["items"]
    assert (event["mcp_server"], event["caller_id"], event["sanitized_args"]) == ("gateway-store", "ann", found)
    assert found["history_id"] == 2
    (last,) = sealed
    assert last is not None
    assert (found["old_origin"], found["old_size"], found["old_root_hash"]) == (last.origin, 2, last.root_hash)
    assert last.origin.endswith(f"/{found['old_identity']}")
    assert found["new_identity"] == cli("doctor", "--json").json["database"]["identity"] != found["old_identity"]

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
        "url": f"sqlite://:/{tmp_path}/there.db",
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


async def _spool(url: str, path: Path, *rows: tuple[str, str | None]) -> None:
    spool = Spool(path, make_url(url), await identity_of(url))
    for request_id, error in rows:
        await spool.add([to_values(encode_event(make_event(request_id=f"{url}/{request_id}")))], error=error)
    await spool.close()


def test_doctor_says_when_events_could_not_be_spooled(tmp_path: Path) -> None:
    """A problem, exit code 1, and nothing is made; in strict mode nothing needs that place."""
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
