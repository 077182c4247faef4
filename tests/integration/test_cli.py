"""`gateway-store` does what its help says, on SQLite and on PostgreSQL, for people and for programs."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import cli_helpers
import pytest
from cli_helpers import KEY, Cli, ask, ids

from agent_gateway_store import SyncGatewayStore, clock
from agent_gateway_store.errors import InvalidApiKeyError
from commands import Outcome, event_line, gateway_store, process, run_process
from forks import forks

url, cli = cli_helpers.url, cli_helpers.cli


def test_a_key_is_printed_once_and_to_standard_output_only(cli: Cli) -> None:
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


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_key_lives_as_long_as_it_says_where_the_clocks_differ(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(hours=hours)

    monkeypatch.setattr(clock, "datetime", Wrong)
    issued = cli("keys", "issue", "dev-agent", "--role", "developer", "--expires-in", "1h", "--json").json

    left = datetime.fromisoformat(issued["expires_at"]) - datetime.now(UTC)
    assert abs(left - timedelta(hours=1)) < timedelta(minutes=1)


def test_keys_rotate_and_revoke(cli: Cli, url: str) -> None:
    def accepted(*keys: str) -> list[bool]:
        found = []
        with SyncGatewayStore(url, redis_url="") as store:
            for key in keys:
                try:
                    found.append(bool(store.keys.verify(key)))
                except InvalidApiKeyError:
                    found.append(False)
        return found

    first = cli("keys", "issue", "dev-agent", "--role", "developer", "--json").json
    second = cli("keys", "rotate", "dev-agent", "--overlap", "1h", "--json").json
    third = cli("keys", "rotate", "dev-agent", "--overlap", "0s").out.strip()

    assert first["key_id"] == second["key_id"]
    assert accepted(first["plaintext"], second["plaintext"], third) == [False, False, True]
    assert cli("keys", "revoke", "dev-agent").out == "The API key of dev-agent is revoked.\n"
    assert cli("keys", "revoke", "dev-agent", "--json").json["is_active"] is False
    assert accepted(third) == [False]
    cli("keys", "revoke", "nobody").assert_fails(4, "nobody", "keys issue")


def test_approvals_are_listed_shown_and_decided(cli: Cli, url: str) -> None:
    """By approval id, page by page; the second decision learns of the first; `deny` has other names."""
    first, second, third = ask(url, "r1"), ask(url, "r2", name="b.txt"), ask(url, "r3")

    pending = cli("approvals", "list", "--status", "pending", "--limit", "2", "--json").json
    rest = cli("approvals", "list", "--status", "pending", "--json", "--cursor", pending["next_cursor"]).json
    found = [*pending["items"], *rest["items"]]
    assert [item["approval_id"] for item in found] == [third, second, first]
    assert rest["next_cursor"] is None
    assert all("token" not in item or item["token"] is None for item in found)
    narrow = cli("approvals", "list", "--limit", "2", COLUMNS="80")
    assert second in narrow.out
    assert "--cursor" in narrow.err
    assert "files.delete_file name=a.txt" in cli("approvals", "show", first).out

    approved = cli("approvals", "approve", first, "--approver", "ann", "--note", "go on")
    denied = cli("approvals", "deny", second, "--approver", "ben", "--json")

    assert approved.out == f"Approval {first} is APPROVED.\n"
    assert (denied.json["status"], denied.json["approver_id"]) == ("DENIED", "ben")
    assert cli("approvals", "reject", third, "--approver", "ben").out == f"Approval {third} is DENIED.\n"
    assert not re.search("reject|decline", cli("approvals", "--help").out)
    decided = cli("approvals", "show", first, "--json").json
    assert (decided["status"], decided["approver_id"], decided["approver_note"]) == ("APPROVED", "ann", "go on")
    cli("approvals", "decline", first, "--approver", "ben").assert_fails(1, "already decided", "APPROVED by ann")


@pytest.mark.parametrize("before", [True, False], ids=["before the command", "after it"])
def test_global_options_stand_on_either_side_of_the_command(before: bool, tmp_path: Path) -> None:
    """Those after the command win; an empty one is refused on both sides; an organisation sees its own only."""

    def run(*options: str, command: tuple[str, ...] = ("keys", "list", "--json"), **given: Any) -> Outcome:
        return gateway_store(*((*options, *command) if before else (*command, *options)), **given)

    here, there = (f"sqlite:///{tmp_path / name}" for name in ("here.db", "there.db"))
    acme = ("--database-url", here, "--org", "acme")
    assert run(*acme, command=("keys", "issue", "ann", "--role", "r")).code == 0
    run(*acme, command=("audit", "write"), input=event_line("r1"))

    [key] = run("--database-url", here).json["items"]
    assert (key["caller_id"], key["org_id"]) == ("ann", "acme")
    assert ids(run(*acme, command=("audit", "search", "--json"))) == ["r1"]
    for command in (("keys", "list", "--json"), ("audit", "search", "--json")):
        assert run("--database-url", here, "--org", "other", command=command).json["items"] == []
    assert gateway_store("--database-url", here, "keys", "list", "--database-url", there, "--json").json["items"] == []
    assert "must not be empty" in run("--database-url", "").err
    assert "must not be empty" in run("--org", "").err
    assert "Traceback" in run("--database-url", "nonsense", "--debug").err
    assert gateway_store("keys", "list", "-h").out == gateway_store("keys", "list", "--help").out


def test_a_command_that_reads_says_which_database_and_that_it_is_empty(tmp_path: Path) -> None:
    """A wrong folder looks like an empty log otherwise; an organisation without rows is another matter."""
    url = f"sqlite:///{tmp_path / 'cli.db'}"
    commands = (("audit", "search"), ("audit", "tail", "--no-follow"), ("approvals", "list"), ("notifications", "list"))

    new = gateway_store("--database-url", url, "keys", "list").err
    empty = [gateway_store("--database-url", url, *command).err for command in commands]
    assert "cli.db, which is new and empty. --database-url or DATABASE_URL names another database." in new
    assert all("cli.db, which is empty." in err for err in empty)

    ask(url, "r1")
    commands += (("--org", "acme", "audit", "search"), ("approvals", "show", str(UUID(int=0))))
    filled = [gateway_store("--database-url", url, *command) for command in commands]

    assert filled[-1].code == 4
    assert all(f"Reading {tmp_path / 'cli.db'}.\n" in outcome.err for outcome in filled)
    assert gateway_store("--database-url", url, "audit", "search", "--json").err == ""


def test_a_narrow_terminal_gets_a_block_of_lines_for_each_row(cli: Cli, url: str) -> None:
    approval_id = ask(url, "r1", name="long-" * 12)
    cli("keys", "issue", "dev-agent", "--role", "developer")

    listed = cli("approvals", "list", COLUMNS="60").out
    assert approval_id in listed
    assert "caller" in listed
    for command in (("approvals", "list"), ("keys", "list"), ("notifications", "list"), ("plugins", "list")):
        lines = cli(*command, COLUMNS="60").out.splitlines()
        assert max(map(len, lines)) <= 60
        assert [line for line in lines if re.search(r"[│┃] ?\w{1,2} ?[│┃]", line)] == []


def test_no_control_byte_of_the_data_reaches_the_terminal() -> None:
    nasty = "evil\x1b]0;title\x07\x7f\x9b31m\r\nnext"
    gateway_store("audit", "write", input=event_line(nasty, caller_id=nasty, sanitized_args={nasty: nasty}))
    gateway_store("keys", "issue", nasty, "--role", nasty)
    approval_id = ask("sqlite:///gateway.db", nasty, name=nasty, caller_id=nasty)
    reading = ("audit search", "audit tail --no-follow", "keys list", "approvals list", f"approvals show {approval_id}")

    printed = [gateway_store(*command.split(), *more) for command in reading for more in ([], ["--json"])]
    printed += [
        gateway_store("audit", "search", "--request-id", nasty),
        gateway_store("keys", "rotate", f"no {nasty}"),
        gateway_store("keys", "revoke", nasty),
        gateway_store("audit", "write", input=event_line(nasty, caller_id="another")),
        gateway_store("approvals", "approve", approval_id, "--approver", nasty),
        gateway_store("approvals", "approve", approval_id, "--approver", f"not {nasty}"),
    ]

    for outcome in printed:
        assert "evil" in outcome.said or outcome.out.startswith(("1 ", "Approval", "agw_")), outcome
        assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", outcome.said) is None, outcome


@pytest.mark.system
def test_no_color_is_honoured_and_a_terminal_gets_only_our_own_sequences() -> None:
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
    script = Path(sys.executable).parent / "gateway-store"

    by_script = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)

    assert by_script.stdout == run_process("--version", is_new=True).out


def test_what_cannot_be_read_or_written_is_named(cli: Cli, tmp_path: Path) -> None:
    for content, words in (
        (b"\xff\xfe", ("a.env is not text in UTF-8",)),
        (b"REDIS_URL=\n\nDATABASE_URL\n", ("Line 3 of", "is not NAME=value")),
    ):
        (tmp_path / "a.env").write_bytes(content)
        cli("keys", "list", "--env-file", str(tmp_path / "a.env")).assert_fails(2, *words)
    (tmp_path / "taken").write_text("")
    cli("audit", "write", input=event_line("r-1"))
    cli("evidence", "seal")
    cli("evidence", "publish", str(tmp_path / "taken" / "log")).assert_fails(1, "taken", "check the path")
    proved = cli("evidence", "prove", "r-1", "-o", str(tmp_path / "taken" / "x"))
    assert (proved.code, proved.err.splitlines()[1:]) == (1, [f"There is no folder {tmp_path}/taken: make it first."])
    cli("keys", "list", AUDIT_SIGNING_KEY="foo").assert_fails(2, "A setting is wrong", "not a signing key")
    doctor = cli("doctor", AUDIT_SIGNING_KEY="foo")
    assert (doctor.code, "AUDIT_SIGNING_KEY: This is not a signing key" in doctor.err) == (1, True)


def test_an_output_that_takes_nothing_is_named(tmp_path: Path) -> None:
    command = f"DATABASE_URL=sqlite:///{tmp_path}/k.db {forks().programs}/gateway-store keys issue al --role r"
    for form in ("", " --json"):
        unseen = subprocess.run(["sh", "-c", f"{command}{form} >/dev/full"], stderr=-1, text=True)
        assert unseen.returncode == 1
        assert "nobody has seen it" in unseen.stderr
        assert "`gateway-store keys rotate al --overlap 0s` replaces it." in unseen.stderr
        command = command.replace("issue al --role r", "rotate al")
    with Path("/dev/full").open("w") as full:
        shown = subprocess.run([forks().programs / "gateway-store", "--help"], stdout=full, stderr=-1)
    assert (shown.returncode, shown.stderr) == (1, b"The output cannot be written: No space left on device.\n")
