"""`gateway-store audit` writes, searches and follows events, and ends cleanly when it is stopped."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import cli_helpers
import pytest
from cli_helpers import Cli, ids

from commands import event_line, gateway_store, process
from forks import forks

url, cli = cli_helpers.url, cli_helpers.cli


def test_audit_write_stores_json_lines_and_search_finds_them(cli: Cli) -> None:
    """Each line gets its outcome; the same line again is a duplicate; the filters find what they name."""
    lines = [event_line(f"r{number}", caller_id=f"agent-{number % 2}") for number in range(4)]
    lines[0] = event_line("r0", caller_id="agent-0", timestamp="2026-01-01T00:00:00Z")
    lines[3] = event_line("r3", caller_id="agent-1", decision="DENY", execution_status=None)

    written = cli("audit", "write", input="\n".join([*lines, "", lines[0]]) + "\n")

    assert written.code == 0
    assert written.out.splitlines() == ["1 STORED r0", "2 STORED r1", "3 STORED r2", "4 STORED r3", "6 DUPLICATE r0"]
    assert ids(cli("audit", "search", "--json")) == ["r3", "r2", "r1", "r0"]
    assert [item["request_id"] for item in cli("audit", "search", "--json", "--limit", "1").json["items"]] == ["r3"]
    assert ids(cli("audit", "search", "--json", "--caller", "agent-0")) == ["r2", "r0"]
    assert ids(cli("audit", "search", "--json", "--decision", "deny")) == ["r3"]
    assert ids(cli("audit", "search", "--json", "--request-id", "r1")) == ["r1"]
    unknown = cli("audit", "search", "--json", "--request-id", "other")
    assert (ids(unknown), unknown.code, unknown.err.startswith("No event has this request id")) == ([], 4, True)
    assert cli("audit", "search", "--request-id", "other").out == ""
    assert "agent-0" in cli("audit", "search").out
    assert "deterministic_rationale" in cli("audit", "search", "--request-id", "r1").out


def test_a_malformed_line_is_reported_by_number_and_the_others_are_written(cli: Cli) -> None:
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
    assert ids(cli("audit", "search", "--json")) == ["r8", "r1"]


def test_tail_shows_the_newest_events_oldest_first(cli: Cli) -> None:
    """As `tail -n`, as lines and as JSON, which can be written again: the same event is the same event."""
    cli("audit", "write", input="\n".join(event_line(f"r{number}", risk_labels=["é"]) for number in range(5)))

    lines = cli("audit", "tail", "-n", "2", "--no-follow").out.splitlines()
    documents = cli("audit", "tail", "-n", "3", "--no-follow", "--json").out

    assert [line.split()[-1] for line in lines] == ["r3", "r4"]
    assert [json.loads(each)["request_id"] for each in documents.splitlines()] == ["r2", "r3", "r4"]
    assert cli("audit", "tail", "-n", "0", "--no-follow").out == ""
    assert cli("audit", "write", input=documents).out == "1 DUPLICATE r2\n2 DUPLICATE r3\n3 DUPLICATE r4\n"


@pytest.mark.system
def test_tail_follows_what_is_added_until_ctrl_c(tmp_path: Path) -> None:
    """Nothing is shown twice or left out, a burst neither; and until its reader ends, as in `audit tail | head`."""
    url = f"sqlite:///{tmp_path / 'cli.db'}"
    follow = ("--database-url", url, "audit", "tail", "--interval", "0.05", "--json")
    gateway_store("--database-url", url, "audit", "write", input=event_line("first"))
    with process(*follow) as tail, process(*follow) as unread:
        assert tail.stdout is not None
        assert unread.stdout is not None
        assert unread.stderr is not None
        unread.stdout.readline()
        unread.stdout.close()
        seen = [json.loads(tail.stdout.readline())["request_id"]]
        for names in (["a"], [f"b{number}" for number in range(450)], ["c"]):
            gateway_store("--database-url", url, "audit", "write", input="\n".join(map(event_line, names)))
            seen += [json.loads(tail.stdout.readline())["request_id"] for _ in names]
        tail.send_signal(signal.SIGINT)
        out, err = tail.communicate(timeout=120)
        ended = unread.wait(20), unread.stderr.read()

    assert seen == ["first", "a", *(f"b{number}" for number in range(450)), "c"]
    assert (tail.returncode, out, err) == (130, "", "Stopped.\n")
    assert ended == (141, "")


# SIGINT at the nth start of a thread, such as that of the store's loop or of a connection; 0: while that loop begins.
INTERRUPTED = """
import asyncio.events, os, signal, sys, threading, time
from agent_gateway_store.cli import main

def start(self, begin=threading.Thread.start):
    begin(self)
    started.append(self)
    if len(started) == {nth}:
        os.kill(os.getpid(), signal.SIGINT)

def new_loop(make=asyncio.events.new_event_loop):
    if {nth} == 0:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
    return make()

started = []
threading.Thread.start, asyncio.events.new_event_loop = start, new_loop
main()
"""


@pytest.mark.system
def test_ctrl_c_while_audit_write_begins_ends_it(tmp_path: Path) -> None:
    options = ["--database-url", f"sqlite:///{tmp_path / 'cli.db'}", "audit", "write"]
    for nth in range(4):
        command = [str(forks().programs / "python"), "-c", INTERRUPTED.format(nth=nth), *options]
        with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1) as writing:
            try:
                code = writing.wait(20)
            finally:
                writing.kill()
            assert writing.stdout is not None
            assert writing.stderr is not None
            outputs = (writing.stdout.read(), writing.stderr.read())

        assert (nth, code, outputs) == (nth, 130, (b"", b"Stopped.\n"))


def test_a_reader_that_goes_away_is_no_error_to_shout_about(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'cli.db'}"
    gateway_store("--database-url", url, "audit", "write", input=event_line("r1"))
    with process("--database-url", url, "audit", "search", "--json") as searching:
        assert searching.stdout is not None
        assert searching.stderr is not None
        searching.stdout.close()
        err = searching.stderr.read()

    assert (searching.wait(10), err) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        *((f"{each} 2>&- >/dev/null", 0, "") for each in ("evidence verify --json", "audit export out.jsonl", "demo")),
        ("audit search --json >&-", 0, ""),
        ("audit search --json >/dev/full", 1, "The disk is full: make room and try again.\n"),
    ],
)
def test_outputs_that_are_closed_or_full_are_no_traceback(tmp_path: Path, command: str, code: int, says: str) -> None:
    """One that the caller closed, as a cron job may, is what was asked for; a full disk is an error."""
    line = f"{forks().programs}/gateway-store {command}"
    ended = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, cwd=tmp_path, timeout=120)

    assert (ended.returncode, ended.stderr) == (code, says)
