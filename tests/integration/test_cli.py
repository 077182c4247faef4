"""`gateway-store` does what its help says, on SQLite and on PostgreSQL, for people and for programs."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import cli_helpers
import pytest
from cli_helpers import KEY, ask, ids

import servers
from agent_gateway_store import GatewayStore, clock
from agent_gateway_store.errors import InvalidApiKeyError
from commands import Outcome, event_line, gateway_store, process, run_process
from forks import forks

url, cli = cli_helpers.url, cli_helpers.cli


@pytest.mark.parametrize("group", ["db", "keys", "audit", "approvals", "plugins"])
def test_a_group_without_a_command_is_a_usage_error_that_shows_the_help(group: str) -> None:
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


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_key_lives_as_long_as_it_says_where_the_clocks_differ(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """`--expires-in` is added to the database's time, not to that of the machine of the command."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(hours=hours)

    monkeypatch.setattr(clock, "datetime", Wrong)
    issued = cli("keys", "issue", "dev-agent", "--role", "developer", "--expires-in", "1h", "--json").json

    left = datetime.fromisoformat(issued["expires_at"]) - datetime.now(UTC)
    assert abs(left - timedelta(hours=1)) < timedelta(minutes=1)


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
    url = "sqlite:///cli.db"
    approval_id = ask(url, "r1")

    outcome = gateway_store("--database-url", url, "approvals", alias, approval_id, "--approver", "ben")

    assert outcome.out == f"Approval {approval_id} is DENIED.\n"
    assert alias not in gateway_store("approvals", "--help").out


@pytest.mark.parametrize("before", [True, False], ids=["before the command", "after it"])
def test_global_options_stand_on_either_side_of_the_command(before: bool, tmp_path: Path) -> None:
    """Those after the command win; an empty one is refused on both sides."""

    def run(*options: str, command: tuple[str, ...] = ("keys", "list", "--json")) -> Outcome:
        return gateway_store(*options, *command) if before else gateway_store(*command, *options)

    here, there = (f"sqlite:///{tmp_path / name}" for name in ("here.db", "there.db"))
    assert run("--database-url", here, command=("keys", "issue", "ann", "--role", "r")).code == 0

    assert run("--database-url", here).json["items"][0]["caller_id"] == "ann"
    assert run("--database-url", here, "--org", "other").json["items"] == []
    assert gateway_store("--database-url", here, "keys", "list", "--database-url", there, "--json").json["items"] == []
    assert "must not be empty" in run("--database-url", "").err
    assert "must not be empty" in run("--org", "").err
    assert "Traceback" in run("--database-url", "nonsense", "--debug").err
    assert gateway_store("keys", "list", "-h").out == gateway_store("keys", "list", "--help").out


def test_a_command_that_reads_says_which_database_and_that_it_is_empty(tmp_path: Path) -> None:
    """A wrong folder looks like an empty log otherwise; programs that read JSON are told nothing."""
    url = f"sqlite:///{tmp_path / 'cli.db'}"
    commands = (("audit", "search"), ("audit", "tail", "--no-follow"), ("approvals", "list"), ("notifications", "list"))

    new = gateway_store("--database-url", url, "keys", "list").err
    empty = [gateway_store("--database-url", url, *command).err for command in commands]
    assert "cli.db, which is new and empty. --database-url or DATABASE_URL names another database." in new
    assert all("cli.db, which is empty." in err for err in empty)

    ask(url, "r1")
    commands += (("approvals", "show", str(UUID(int=0))),)
    filled = [gateway_store("--database-url", url, *command) for command in commands]

    assert filled[-1].code == 4
    assert all(f"Reading {tmp_path / 'cli.db'}.\n" in outcome.err for outcome in filled)
    assert gateway_store("--database-url", url, "audit", "search", "--json").err == ""


def test_a_narrow_terminal_gets_a_block_of_lines_for_each_row(cli: Callable[..., Outcome], url: str) -> None:
    """With 60 columns ids stay whole, and nothing is left out or broken into single letters."""
    approval_id = ask(url, "r1", name="long-" * 12)
    cli("keys", "issue", "dev-agent", "--role", "developer")

    listed = cli("approvals", "list", COLUMNS="60").out
    assert approval_id in listed
    assert "caller" in listed
    for command in (("approvals", "list"), ("keys", "list"), ("notifications", "list"), ("plugins", "list")):
        lines = cli(*command, COLUMNS="60").out.splitlines()
        assert max(map(len, lines)) <= 60
        assert [line for line in lines if re.search(r"[│┃] ?\w{1,2} ?[│┃]", line)] == []


def test_a_listing_is_paged_by_its_cursor(cli: Callable[..., Outcome], url: str) -> None:
    ids = [ask(url, f"r{number}") for number in range(3)]

    first = cli("approvals", "list", "--limit", "2", "--json").json
    second = cli("approvals", "list", "--limit", "2", "--json", "--cursor", first["next_cursor"]).json

    found = [item["approval_id"] for page in (first, second) for item in page["items"]]
    assert found == ids[::-1]
    assert second["next_cursor"] is None
    assert first["next_cursor"] in cli("approvals", "list", "--limit", "2").err


def test_an_organisation_sees_its_own_only(cli: Callable[..., Outcome]) -> None:
    cli("--org", "acme", "keys", "issue", "dev-agent", "--role", "developer")
    cli("--org", "acme", "audit", "write", input=event_line("r1"))

    assert [item["org_id"] for item in cli("keys", "list", "--json").json["items"]] == ["acme"]
    assert cli("--org", "other", "keys", "list", "--json").json["items"] == []
    assert cli("--org", "other", "audit", "search", "--json").json["items"] == []
    assert ids(cli("--org", "acme", "audit", "search", "--json")) == ["r1"]


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


def test_a_wrong_signing_key_is_a_wrong_setting_that_doctor_finds(cli: Callable[..., Outcome]) -> None:
    """Every command says so in one sentence, and the check of the installation does not pass."""
    cli("keys", "list", AUDIT_SIGNING_KEY="foo").assert_fails(2, "A setting is wrong", "not a signing key")

    found = cli("doctor", AUDIT_SIGNING_KEY="foo")

    assert found.code == 1
    assert "AUDIT_SIGNING_KEY: This is not a signing key" in found.err


def test_what_cannot_be_read_or_written_is_named(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "bad.env").write_bytes(b"\xff\xfe")
    (tmp_path / "taken").write_text("")
    cli("keys", "list", "--env-file", str(tmp_path / "bad.env")).assert_fails(2, "bad.env is not text in UTF-8")
    (tmp_path / "torn.env").write_text("REDIS_URL=\n\nDATABASE_URL\n")
    cli("keys", "list", "--env-file", str(tmp_path / "torn.env")).assert_fails(2, "Line 3 of", "is not NAME=value")
    cli("audit", "write", input=event_line("r-1"))
    cli("evidence", "seal")
    cli("evidence", "publish", str(tmp_path / "taken" / "log")).assert_fails(1, "taken", "check the path")
    proved = cli("evidence", "prove", "r-1", "-o", str(tmp_path / "taken" / "x"))
    assert (proved.code, proved.err.splitlines()[1:]) == (1, [f"There is no folder {tmp_path}/taken: make it first."])


def test_an_output_that_takes_nothing_is_named(tmp_path: Path) -> None:
    """And of an API key that was made, that nobody has seen it."""
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


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_no_api_key_is_made_that_nobody_would_see(cli: Callable[..., Outcome], url: str) -> None:
    """Where standard output is closed, the key that is in use stays, and none is added."""
    cli("keys", "issue", "kept", "--role", "r")
    for command in ("keys issue al --role r", "keys rotate kept --overlap 0s --json", "seed"):
        closed = subprocess.run(
            ["sh", "-c", f"{forks().programs}/gateway-store {command} >&-"],
            stderr=-1,
            text=True,
            env={**os.environ, "DATABASE_URL": url},
        )
        assert (closed.returncode, closed.stderr.count("\n")) == (1, 1), closed.stderr
        assert "There is no standard output, to which the API key is printed once" in closed.stderr
    keys = cli("keys", "list", "--json").json["items"]

    assert [(key["caller_id"], key["previous_key_expires_at"]) for key in keys] == [("kept", None)]


def test_an_organisation_without_rows_is_no_empty_database(cli: Callable[..., Outcome]) -> None:
    """Another organisation is meant then, not another database."""
    cli("audit", "write", input=event_line("r-1"))

    assert "which is empty" not in cli("--org", "acme", "audit", "search").err
