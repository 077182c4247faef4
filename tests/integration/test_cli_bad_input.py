"""Whatever is wrong, `gateway-store` ends in one clear sentence and the right exit code; nothing is left half done."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from cli_helpers import ask
from sqlalchemy import make_url

import servers
from agent_gateway_store import clock
from agent_gateway_store.storage import migrate
from commands import event_line, gateway_store, process, run_process
from proofs.harness import execute

COMMANDS = [
    ("keys", "list"),
    ("audit", "tail"),
    ("audit", "write"),
    ("db", "upgrade"),
    ("db", "current"),
    ("seed",),
    ("demo",),
]


def test_an_unreachable_database_is_exit_code_5() -> None:
    """Every command that needs one says so, in a sentence that repeats no password; `doctor` goes on without it."""
    down = "postgresql://u:hunter2@127.0.0.1:1/x"
    for command in COMMANDS:
        outcome = gateway_store("--database-url", down, *command, input=event_line("r1"))

        outcome.assert_fails(5, "DATABASE_URL")
        assert "hunter2" not in outcome.said
    examined = gateway_store("--database-url", down, "doctor", "--json")
    assert (examined.code, examined.json["database"]["reachable"]) == (5, False)
    assert examined.json["plugins"]["log"] == "active"
    assert "DATABASE_URL" in examined.json["problems"][0]
    assert "hunter2" not in examined.said


def test_a_folder_that_cannot_be_written_is_exit_code_5(tmp_path: Path) -> None:
    """Nothing is made on the way, whether the parent is a file, or does not exist, or the file is no database."""
    (tmp_path / "file").write_text("Dear database, " * 100)
    url = f"sqlite:///{tmp_path}"

    for command, path in ((("keys", "list"), "file/gateway.db"), *((each, "none/gateway.db") for each in COMMANDS)):
        outcome = gateway_store("--database-url", f"{url}/{path}", *command, input=event_line("r1"))
        outcome.assert_fails(5, "folder exists and is writable")
    gateway_store("--database-url", f"{url}/file", "keys", "list").assert_fails(5, "not a SQLite database")

    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "Dear database, " * 100


@pytest.mark.system
def test_as_a_process_no_thread_adds_a_traceback(tmp_path: Path) -> None:
    for command in (("keys", "list"), ("audit", "write")):
        outcome = run_process("--database-url", f"sqlite:///{tmp_path}/none/gateway.db", *command, input="")

        outcome.assert_fails(5, "folder exists and is writable")


def test_an_unknown_url_scheme_is_a_usage_error() -> None:
    for url in ("mysql://u:hunter2@h/x", "nonsense", "http://h/x", "postgresql+psycopg2://h/x", "://"):
        outcome = gateway_store("--database-url", url, "keys", "list")

        outcome.assert_fails(2, "write sqlite:///gateway.db or postgresql://")
        assert "hunter2" not in outcome.said


def test_redis_that_is_down_stops_nothing_but_the_doctor_says_so() -> None:
    down = "redis://:hunter2@127.0.0.1:1/0"

    listed = gateway_store("--redis-url", down, "approvals", "list", "--json")
    examined = gateway_store("--redis-url", down, "doctor", "--json")

    assert (listed.code, listed.err) == (0, "")
    assert examined.code == 5
    assert examined.json["redis"]["state"] == "down"
    assert "REDIS_URL" in examined.json["problems"][0]
    assert "hunter2" not in examined.said


def test_a_file_opened_read_only_can_be_read_and_not_written(tmp_path: Path) -> None:
    gateway_store("keys", "issue", "a", "--role", "r")
    url = f"sqlite:///file:{tmp_path / 'gateway.db'}?mode=ro&uri=true"

    assert len(gateway_store("--database-url", url, "keys", "list", "--json").json["items"]) == 1
    gateway_store("--database-url", url, "keys", "issue", "b", "--role", "r").assert_fails(5, "read-only")
    gateway_store("--database-url", url, "keys", "revoke", "a").assert_fails(5, "read-only")

    assert len(gateway_store("keys", "list", "--json").json["items"]) == 1


def test_a_schema_that_is_behind_is_named_with_the_command_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres_database: Callable[[], str]
) -> None:
    """A database that holds other tables, or is empty, is not set up unasked; nor is one of an older revision."""
    behind = ("behind", "gateway-store db upgrade")
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as connection:
        connection.execute("CREATE TABLE of_the_host (id INTEGER)")
        for command in COMMANDS:
            if command[0] not in ("db", "demo"):
                gateway_store(*command, input=event_line("r1")).assert_fails(1, *behind)
        assert connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == [
            ("of_the_host",)
        ]
    assert gateway_store("doctor").code == 1

    url = postgres_database()
    gateway_store("--database-url", url, "keys", "list").assert_fails(1, *behind)
    assert gateway_store("--database-url", url, "db", "current", "--json").json["state"] == "empty"
    gateway_store("--database-url", url, "db", "upgrade")
    monkeypatch.setattr(migrate, "head", lambda: "0002_next")
    assert gateway_store("--database-url", url, "db", "current", "--json").json["state"] == "behind"
    for command in (("db", "check"), ("keys", "list")):
        gateway_store("--database-url", url, *command).assert_fails(1, *behind)


def test_a_schema_that_is_ahead_is_never_touched(tmp_path: Path) -> None:
    gateway_store("db", "upgrade")
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as connection, connection:
        connection.execute(f"UPDATE {migrate.VERSION_TABLE} SET version_num = '9999_future'")

    for command in COMMANDS[:-1]:
        outcome = gateway_store(*command, input=event_line("r1"))
        if command == ("db", "current"):
            assert "9999_future (ahead" in outcome.out
        else:
            outcome.assert_fails(1, "9999_future", "newer than this package", "upgrade agent-gateway-store")
    examined = gateway_store("doctor", "--json")
    assert (examined.code, examined.json["schema"]["state"]) == (1, "ahead")


def test_an_approval_that_is_unknown_or_expired_is_exit_code_4() -> None:
    for handle in (
        "nonsense",
        "00000000-0000-0000-0000-000000000000",
        "agw_0123456789ab_0123456789abcdefghijABCDEFGHIJ0123456789abcdefghi",
        "\x1b[31m'; DROP TABLE api_keys; --",
        "9" * 10_000,
    ):
        for command in (["show"], ["deny", "--approver", "ann"]):
            outcome = gateway_store("approvals", *command, "--", handle)

            outcome.assert_fails(4, "Approval not found")
            assert handle not in outcome.said
    gateway_store("approvals", "list", "--cursor", "bogus").assert_fails(2, "cursor")
    approval_id = ask("sqlite:///gateway.db", "r1")
    clock.move(timedelta(hours=2))
    gateway_store("approvals", "approve", approval_id, "--approver", "ann").assert_fails(4, "expired")


def test_a_policy_file_that_is_none_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for content, words in (
        (b"roles: [unclosed", "not YAML at line 1"),
        (b"a: b: c", "not YAML at line 1"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"", "holds no"),
        (b"- a list", "holds no"),
        (b"version: 1\nroles: {}", "roles: "),
        (b"version: 1\nroles: {developer: {trust_level: GODLIKE}}", "roles.developer.trust_level: "),
        (b"version: 1\nroles: {analyst: {trust_level: LOW}}", "no role developer"),
        (b"!!python/object/apply:os.system ['touch pwned']", "not YAML"),
        (b"[" * 1000, "not YAML"),
    ):
        (tmp_path / "policies.yaml").write_bytes(content)
        gateway_store("seed", "--policies", "policies.yaml").assert_fails(1, "policies.yaml", words)

    assert [each.name for each in tmp_path.iterdir()] == ["policies.yaml"]


def test_wrong_usage_is_exit_code_2_and_makes_nothing(tmp_path: Path) -> None:
    for arguments in (
        *(("db",), ("keys",), ("audit",), ("approvals",), ("plugins",)),
        ("nonsense",),
        ("keys", "issue"),
        ("keys", "issue", "a"),
        ("keys", "issue", "", "--role", "r"),
        ("keys", "issue", "a", "--role", ""),
        ("keys", "issue", "a", "--role", "r", "--environment", ""),
        ("keys", "issue", "a", "--role", "r", "--trust-level", "GOD"),
        ("keys", "issue", "a", "--role", "r", "--expires-in", "soon"),
        ("keys", "issue", "a", "--role", "r", "--expires-in", "0s"),
        ("keys", "rotate", "a", "--overlap", "-1h"),
        ("keys", "list", "--limit", "0"),
        ("audit", "tail", "--interval", "0"),
        ("approvals", "list", "--status", "GONE"),
        ("approvals", "approve", "x"),
        ("approvals", "approve", "x", "--approver", " "),
        ("approvals", "deny", "x", "--approver", "\u200b"),
        ("seed", "--policies", "missing.yaml"),
        ("seed", "--policies", "."),
        ("--org", "", "keys", "list"),
        ("--org", "acme", "db", "restored", "--by", "ops"),
        ("--org", "acme", "evidence", "seal"),
        ("--org", "acme", "evidence", "verify"),
        ("--org", "acme", "evidence", "publish", "log"),
        ("--org", "acme", "retention", "holds"),
        ("--org", "acme", "retention", "prune", "--before", "400d", "--by", "ops", "--discard"),
        ("--database-url", "", "keys", "list"),
        ("--env-file", "missing", "keys", "list"),
    ):
        outcome = gateway_store(*arguments)

        assert (outcome.code, outcome.out) == (2, ""), arguments
        assert "Traceback" not in outcome.err, arguments
        assert list(tmp_path.iterdir()) == [], arguments


def test_a_wrong_setting_is_named_and_its_value_is_not_repeated() -> None:
    for name, value in (("BCRYPT_ROUNDS", "99"), ("AUDIT_MODE", "hunter2"), ("REDIS_TIMEOUT_SECONDS", "hunter2")):
        outcome = gateway_store("keys", "list", **{f"AGENT_GATEWAY_STORE_{name}": value})

        outcome.assert_fails(2, name.lower())
        assert "hunter2" not in outcome.said


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be removed there")
def test_a_current_folder_that_was_removed_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(gone)
        gone.rmdir()
        outcome = gateway_store("audit", "search")

    assert outcome.code in (1, 5)
    assert "The current folder was removed: change to another one" in outcome.err


def test_an_unexpected_error_is_a_sentence_and_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("cannot use password=hunter2 here\nnor there")

    monkeypatch.setattr("agent_gateway_store.cli.plugins.plugin_records", fail)

    plain = gateway_store("plugins", "list")
    debugged = gateway_store("--debug", "plugins", "list")

    plain.assert_fails(1, "RuntimeError", "--debug for the traceback")
    assert "hunter2" not in plain.said
    assert debugged.code == 1
    assert "Traceback" in debugged.err


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [("LOST", 5, "1 event could not be stored"), ("SPOOLED", 0, "1 event kept in the local spool")],
)
def test_what_becomes_of_events_that_the_database_does_not_take_is_told(
    outcome: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agent_gateway_store import WriteOutcome
    from agent_gateway_store.audit import AuditManager

    async def write(*_: object) -> WriteOutcome:
        return WriteOutcome(outcome)

    monkeypatch.setattr(AuditManager, "write", write)

    written = gateway_store("audit", "write", input=event_line("r1"))

    assert (written.code, written.out) == (code, f"1 {outcome} r1\n")
    assert said in written.err


@pytest.mark.system
def test_a_database_that_goes_away_while_following_ends_tail_with_5(
    migrated_postgres_database: Callable[[], str], postgres_url: str
) -> None:
    url = migrated_postgres_database()
    gateway_store("--database-url", url, "audit", "write", input=event_line("r1"))
    with process("--database-url", url, "audit", "tail", "--interval", "0.05", "--patience", "0.1") as tail:
        assert tail.stdout is not None
        assert tail.stdout.readline().rstrip().endswith("r1")
        servers.run(execute(postgres_url, f'DROP DATABASE "{make_url(url).database}" WITH (FORCE)'))
        _, err = tail.communicate(timeout=120)

    assert tail.returncode == 5
    assert "Traceback" not in err
    assert [line.split()[0] for line in err.strip().splitlines()] == ["Reading", "The"]
