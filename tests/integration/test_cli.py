"""`gateway-store` does what its help says, on SQLite and on PostgreSQL, for people and for programs."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import servers
from agent_gateway_store import ApprovalRequest, GatewayStore, ToolCall, TrustLevel
from agent_gateway_store.errors import InvalidApiKeyError
from commands import Outcome, event_line, gateway_store, process, run_process

pytestmark = pytest.mark.integration

KEY = re.compile(r"agw_[0-9A-Za-z]{12}_[0-9A-Za-z]{49}")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty, migrated database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'cli.db'}"
    create: Callable[[], str] = request.getfixturevalue("postgres_database")
    made = create()
    assert gateway_store("--database-url", made, "db", "upgrade").code == 0
    return made


@pytest.fixture
def cli(url: str) -> Callable[..., Outcome]:
    """Run a command on the database."""

    def run(*args: str, **options: Any) -> Outcome:
        return gateway_store("--database-url", url, *args, **options)

    return run


def ask(url: str, request_id: str, *, name: str = "a.txt", caller_id: str = "dev-agent") -> str:
    """Ask for an approval and return its id."""

    async def work() -> str:
        async with GatewayStore(url) as store:
            call = ToolCall(server="files", tool="delete_file", arguments={"name": name})
            request = ApprovalRequest(
                request_id=request_id, caller_id=caller_id, tool_call=call, risk_explanation="It is gone for good."
            )
            await store.approvals.issue_token(request)
            return str(request.approval_id)

    return servers.run(work())


def test_help_and_version_load_neither_the_database_nor_pydantic() -> None:
    """They answer at once."""
    code = "import sys; import agent_gateway_store.cli.app; print(*sys.modules)"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert {"alembic", "asyncpg", "pydantic", "redis", "rich", "sqlalchemy"} & set(loaded) == set()
    assert gateway_store("--version").out.startswith("gateway-store ")
    assert gateway_store("--help").code == 0


@pytest.mark.parametrize("group", ["db", "keys", "audit", "approvals", "plugins"])
def test_a_group_without_a_command_is_a_usage_error_that_shows_the_help(group: str) -> None:
    """Exit code 2, and what can be typed."""
    outcome = gateway_store(group)

    assert outcome.code == 2
    assert "Commands" in outcome.said


def test_a_key_is_printed_once_and_to_standard_output_only(cli: Callable[..., Outcome]) -> None:
    """`keys issue` gives the plaintext; nothing gives it a second time."""
    issued = cli("keys", "issue", "dev-agent", "--role", "developer", "--trust-level", "medium", "--expires-in", "90d")

    assert issued.code == 0
    assert KEY.fullmatch(issued.out.strip())
    assert KEY.search(issued.err) is None
    listed = cli("keys", "list", "--json")
    (item,) = listed.json["items"]
    assert (item["caller_id"], item["role"], item["trust_level"]) == ("dev-agent", "developer", 2)
    assert item["expires_at"] is not None
    assert KEY.search(listed.out) is None
    assert "hash" not in listed.out
    assert "$2b$" not in listed.out + cli("keys", "list").out
    cli("keys", "issue", "dev-agent", "--role", "developer").assert_fails(1, "already has an API key", "keys rotate")


def test_keys_rotate_and_revoke(cli: Callable[..., Outcome], url: str) -> None:
    """The new key works, the old one until its overlap ends, none after the revocation."""
    first = cli("keys", "issue", "dev-agent", "--role", "developer", "--json").json
    second = cli("keys", "rotate", "dev-agent", "--overlap", "1h", "--json").json
    third = cli("keys", "rotate", "dev-agent", "--overlap", "0s").out.strip()

    assert first["key_id"] == second["key_id"]
    assert _accepted(url, first["plaintext"], second["plaintext"], third) == [False, False, True]
    assert cli("keys", "revoke", "dev-agent").out == "The API key of dev-agent is revoked.\n"
    assert cli("keys", "revoke", "dev-agent", "--json").json["is_active"] is False
    assert _accepted(url, third) == [False]
    cli("keys", "revoke", "nobody").assert_fails(4, "nobody", "keys issue")


def _accepted(url: str, *keys: str) -> list[bool]:
    async def work() -> list[bool]:
        answers = []
        async with GatewayStore(url) as store:
            for key in keys:
                try:
                    await store.keys.verify(key)
                except InvalidApiKeyError:
                    answers.append(False)
                else:
                    answers.append(True)
        return answers

    return servers.run(work())


def test_audit_write_stores_json_lines_and_search_finds_them(cli: Callable[..., Outcome]) -> None:
    """Each line gets its outcome; the same line again is a duplicate; the filters find what they name."""
    lines = [event_line(f"r{number}", caller_id=f"agent-{number % 2}") for number in range(4)]
    lines[0] = event_line("r0", caller_id="agent-0", timestamp="2026-01-01T00:00:00Z")
    lines[3] = event_line("r3", caller_id="agent-1", decision="DENY", execution_status=None)

    written = cli("audit", "write", input="\n".join([*lines, "", lines[0]]) + "\n")

    assert written.code == 0
    assert written.out.splitlines() == ["1 STORED r0", "2 STORED r1", "3 STORED r2", "4 STORED r3", "6 DUPLICATE r0"]
    assert _ids(cli("audit", "search", "--json")) == ["r3", "r2", "r1", "r0"]
    assert _ids(cli("audit", "search", "--json", "--limit", "1")) == ["r3"]
    assert _ids(cli("audit", "search", "--json", "--caller", "agent-0")) == ["r2", "r0"]
    assert _ids(cli("audit", "search", "--json", "--decision", "deny")) == ["r3"]
    assert _ids(cli("audit", "search", "--json", "--request-id", "r1")) == ["r1"]
    assert _ids(cli("audit", "search", "--json", "--request-id", "other")) == []
    assert "agent-0" in cli("audit", "search").out
    assert "deterministic_rationale" in cli("audit", "search", "--request-id", "r1").out


def _ids(found: Outcome) -> list[str]:
    assert found.json["next_cursor"] is None
    return [item["request_id"] for item in found.json["items"]]


def test_what_search_prints_as_json_can_be_written_again(cli: Callable[..., Outcome]) -> None:
    """A round trip changes nothing: the same event is the same event."""
    cli("audit", "write", input=event_line("r1", sanitized_args={"q": [1, None, "é"]}, risk_labels=["PII"]))
    (item,) = cli("audit", "search", "--json").json["items"]

    again = cli("audit", "write", "--json", input=json.dumps(item))

    assert again.json == {"line": 1, "outcome": "DUPLICATE", "request_id": "r1"}


def test_a_malformed_line_is_reported_by_number_and_the_others_are_written(cli: Callable[..., Outcome]) -> None:
    """Exit code 1 at the end; the input is not repeated."""
    lines = [
        event_line("r1").encode(),
        b"{not json",
        b"[1]",
        event_line("r4", decision="MAYBE", caller_role="hunter2").encode(),
        event_line("r5", surplus="hunter2").encode(),
        b"\xff\xfe",
        b"[" * 100_000,
        event_line("r8").encode(),
    ]

    written = cli("audit", "write", "--json", input=b"\n".join(lines))

    outcomes = [json.loads(line) for line in written.out.splitlines()]
    assert [each["outcome"] for each in outcomes] == ["STORED", *["INVALID"] * 6, "STORED"]
    assert written.code == 1
    for number in range(2, 8):
        assert f"Line {number} is malformed: " in written.err
    assert "decision: " in written.err
    assert "6 malformed lines" in written.err.splitlines()[-1]
    assert "hunter2" not in written.said
    assert "Traceback" not in written.err
    assert _ids(cli("audit", "search", "--json")) == ["r8", "r1"]


def test_tail_shows_the_newest_events_oldest_first(cli: Callable[..., Outcome]) -> None:
    """As `tail -n`, as lines for people and as JSON lines."""
    cli("audit", "write", input="\n".join(event_line(f"r{number}") for number in range(5)))

    lines = cli("audit", "tail", "-n", "2", "--no-follow").out.splitlines()
    documents = cli("audit", "tail", "-n", "3", "--no-follow", "--json").out.splitlines()

    assert [line.split()[-1] for line in lines] == ["r3", "r4"]
    assert [json.loads(each)["request_id"] for each in documents] == ["r2", "r3", "r4"]
    assert cli("audit", "tail", "-n", "0", "--no-follow").out == ""


def test_tail_follows_what_is_added_and_ends_cleanly_on_ctrl_c(tmp_path: Path) -> None:
    """Nothing is shown twice or left out, a burst neither; Ctrl-C is the ordinary end."""
    url = f"sqlite:///{tmp_path / 'cli.db'}"
    gateway_store("--database-url", url, "audit", "write", input=event_line("first"))
    with process("--database-url", url, "audit", "tail", "--interval", "0.05", "--json") as tail:
        assert tail.stdout is not None
        seen = [json.loads(tail.stdout.readline())["request_id"]]
        for names in (["a"], [f"b{number}" for number in range(450)], ["c"]):
            gateway_store("--database-url", url, "audit", "write", input="\n".join(map(event_line, names)))
            seen += [json.loads(tail.stdout.readline())["request_id"] for _ in names]
        tail.send_signal(signal.SIGINT)
        out, err = tail.communicate(timeout=10)

    assert seen == ["first", "a", *(f"b{number}" for number in range(450)), "c"]
    assert (tail.returncode, out, err) == (0, "", "")


def test_ctrl_c_ends_a_command_with_130_and_without_a_traceback(tmp_path: Path) -> None:
    """Here `audit write`, which waits for input; what was written before stays."""
    url = f"sqlite:///{tmp_path / 'cli.db'}"
    with process("--database-url", url, "audit", "write") as writing:
        assert writing.stdin is not None
        assert writing.stdout is not None
        writing.stdin.write(event_line("r1") + "\n")
        writing.stdin.flush()
        assert writing.stdout.readline() == "1 STORED r1\n"
        writing.send_signal(signal.SIGINT)
        _, err = writing.communicate(timeout=10)

    assert (writing.returncode, err) == (130, "")
    assert _ids(gateway_store("--database-url", url, "audit", "search", "--json")) == ["r1"]


def test_a_reader_that_goes_away_is_no_error_to_shout_about(tmp_path: Path) -> None:
    """`gateway-store ... | head` ends quietly."""
    url = f"sqlite:///{tmp_path / 'cli.db'}"
    gateway_store("--database-url", url, "audit", "write", input=event_line("r1"))
    with process("--database-url", url, "audit", "search", "--json") as searching:
        assert searching.stdout is not None
        assert searching.stderr is not None
        searching.stdout.close()
        err = searching.stderr.read()

    assert (searching.wait(10), err) == (141, "")


def test_approvals_are_listed_shown_and_decided(cli: Callable[..., Outcome], url: str) -> None:
    """By approval id; the second decision learns of the first."""
    first, second = ask(url, "r1"), ask(url, "r2", name="b.txt")

    pending = cli("approvals", "list", "--status", "pending", "--json").json
    assert [item["approval_id"] for item in pending["items"]] == [second, first]
    assert all("token" not in item or item["token"] is None for item in pending["items"])
    assert second in cli("approvals", "list", COLUMNS="80").out
    shown = cli("approvals", "show", first)
    assert "files.delete_file name=a.txt" in shown.out

    approved = cli("approvals", "approve", first, "--approver", "ann", "--note", "go on")
    denied = cli("approvals", "deny", second, "--approver", "ben", "--json")

    assert approved.out == f"Approval {first} is APPROVED.\n"
    assert (denied.json["status"], denied.json["approver_id"]) == ("DENIED", "ben")
    decided = cli("approvals", "show", first, "--json").json
    assert (decided["status"], decided["approver_id"], decided["approver_note"]) == ("APPROVED", "ann", "go on")
    cli("approvals", "deny", first, "--approver", "ben").assert_fails(1, "already decided", "APPROVED by ann")


@pytest.mark.parametrize("alias", ["reject", "decline"])
def test_deny_has_aliases_that_the_help_does_not_show(alias: str) -> None:
    """What people type by habit works."""
    url = "sqlite:///cli.db"
    approval_id = ask(url, "r1")

    outcome = gateway_store("--database-url", url, "approvals", alias, approval_id, "--approver", "ben")

    assert outcome.out == f"Approval {approval_id} is DENIED.\n"
    assert alias not in gateway_store("approvals", "--help").out


def test_nobody_approves_their_own_call(cli: Callable[..., Outcome], url: str) -> None:
    """The error is a sentence, the approval stays pending."""
    approval_id = ask(url, "r1")

    cli("approvals", "approve", approval_id, "--approver", "dev-agent").assert_fails(1, "somebody else")

    assert cli("approvals", "show", approval_id, "--json").json["status"] == "PENDING"


def test_a_listing_is_paged_by_its_cursor(cli: Callable[..., Outcome], url: str) -> None:
    """`next_cursor` leads on; the last page has none."""
    ids = [ask(url, f"r{number}") for number in range(3)]

    first = cli("approvals", "list", "--limit", "2", "--json").json
    second = cli("approvals", "list", "--limit", "2", "--json", "--cursor", first["next_cursor"]).json

    found = [item["approval_id"] for page in (first, second) for item in page["items"]]
    assert found == ids[::-1]
    assert second["next_cursor"] is None
    assert first["next_cursor"] in cli("approvals", "list", "--limit", "2").err


def test_an_organisation_sees_its_own_only(cli: Callable[..., Outcome]) -> None:
    """`--org` binds what is written and what is read."""
    cli("--org", "acme", "keys", "issue", "dev-agent", "--role", "developer")
    cli("--org", "acme", "audit", "write", input=event_line("r1"))

    assert [item["org_id"] for item in cli("keys", "list", "--json").json["items"]] == ["acme"]
    assert cli("--org", "other", "keys", "list", "--json").json["items"] == []
    assert cli("--org", "other", "audit", "search", "--json").json["items"] == []
    assert _ids(cli("--org", "acme", "audit", "search", "--json")) == ["r1"]


def test_db_upgrade_current_check_and_sql(postgres_database: Callable[[], str]) -> None:
    """From an empty PostgreSQL database to one that equals the models."""
    url = postgres_database()

    def db(*args: str) -> Outcome:
        return gateway_store("--database-url", url, "db", *args)

    assert db("current", "--json").json["state"] == "empty"
    db("check").assert_fails(1, "behind", "db upgrade")
    assert db("upgrade").out.startswith("The schema is at 0001")
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


def test_no_control_byte_of_the_data_reaches_the_terminal() -> None:
    """Neither in tables nor in lines nor in JSON; a stranger's text must not steer the terminal."""
    nasty = "evil\x1b]0;title\x07\x7f\x9b31m\r\nnext"
    gateway_store("audit", "write", input=event_line(nasty, caller_id=nasty, sanitized_args={nasty: nasty}))
    gateway_store("keys", "issue", nasty, "--role", nasty)
    approval_id = ask("sqlite:///gateway.db", nasty, name=nasty, caller_id=nasty)

    printed = [
        gateway_store(*command.split(), *more)
        for command in (
            "audit search",
            "audit tail --no-follow",
            "keys list",
            "approvals list",
            f"approvals show {approval_id}",
        )
        for more in ([], ["--json"])
    ]
    printed += [
        gateway_store("audit", "search", "--request-id", nasty),
        gateway_store("keys", "rotate", nasty),
        gateway_store("keys", "rotate", f"no {nasty}"),
        gateway_store("keys", "revoke", nasty),
        gateway_store("audit", "write", input=event_line(nasty, caller_id="another")),
        gateway_store("approvals", "approve", approval_id, "--approver", nasty),
        gateway_store("approvals", "approve", approval_id, "--approver", f"not {nasty}"),
    ]

    for outcome in printed:
        assert "evil" in outcome.said or outcome.out.startswith(("1 ", "Approval", "agw_")), outcome
        assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", outcome.said) is None, outcome


def test_no_color_is_honoured_and_a_terminal_gets_only_our_own_sequences() -> None:
    """On a real terminal, where tables are drawn with styles."""
    gateway_store("audit", "write", input=event_line("r1", caller_id="evil\x1b[31m"))

    plain, coloured = _on_terminal({"NO_COLOR": "1"}), _on_terminal({"NO_COLOR": ""})

    for printed in (plain, coloured):
        assert "r1" in printed
        assert "evil\\x1b[31m" in printed
        assert "\x1b[31m" not in printed
    assert re.search(r"\x1b\[[0-9;]*[34][0-7]", plain) is None


def _on_terminal(environment: dict[str, str]) -> str:
    master, slave = pty.openpty()
    environment = {"TERM": "xterm-256color", "COLUMNS": "200", **environment}
    with process("audit", "search", stdout=slave, stderr=slave, environment=environment) as searching:
        os.close(slave)
        printed = b""
        with suppress(OSError):  # Linux says EIO where the other end is closed
            while chunk := os.read(master, 65536):
                printed += chunk
    os.close(master)
    assert searching.returncode == 0
    return printed.decode()


def test_the_installed_command_and_the_module_are_one() -> None:
    """`python -m agent_gateway_store.cli` is `gateway-store`."""
    script = Path(sys.executable).parent / "gateway-store"

    by_script = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)

    assert by_script.stdout == run_process("--version").out


def test_help_is_quick() -> None:
    """Well below a second, however busy the machine is."""
    started = time.monotonic()

    assert run_process("--help").code == 0

    assert time.monotonic() - started < 3
