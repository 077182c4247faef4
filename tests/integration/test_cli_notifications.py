"""`gateway-store notifications`: a worker, dead letters, old records."""

from __future__ import annotations

import signal
import time

import cli_helpers
import pytest
from cli_helpers import Cli, ask, execute_on

import servers
from commands import process

url, cli = cli_helpers.url, cli_helpers.cli


@pytest.fixture(autouse=True)
def _nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores send nothing by themselves; the installed notifier is `log` alone."""
    monkeypatch.setenv("NOTIFICATION_WORKER", "false")
    monkeypatch.setenv("AGENT_GATEWAY_STORE_LOAD_PLUGINS", "log")


def test_a_worker_sends_what_is_due_and_ends(url: str, cli: Cli) -> None:
    approval_id = ask(url, "r-1")
    before = cli("notifications", "list", "--json").json
    sent = cli("notifications", "run", "--once")
    after = cli("notifications", "list", "--json", "--approval", approval_id).json

    assert [(row["notifier"], row["status"], row["attempts"]) for row in before["items"]] == [("log", "DUE", 0)]
    assert [(count["notifier"], count["due"], count["is_loaded"]) for count in before["notifiers"]] == [
        ("log", 1, True)
    ]
    assert (sent.code, sent.out) == (0, "1 notices arrived.\n")
    assert "APPROVAL_REQUIRED" in sent.err
    assert [(row["status"], row["attempts"]) for row in after["items"]] == [("DELIVERED", 1)]
    assert after["items"][0]["delivery_id"] == before["items"][0]["delivery_id"]
    assert cli("notifications", "run", "--once").out == "0 notices arrived.\n"


@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_worker_cleanly(url: str, cli: Cli, number: signal.Signals) -> None:
    with process("--database-url", url, "notifications", "run") as worker:
        assert worker.stderr is not None
        assert worker.stderr.readline() == "Sending notices to: log.\n"
        ask(url, "r-1")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if found := cli("notifications", "list", "--status", "delivered", "--json").json["items"]:
                break
        worker.send_signal(number)
        try:
            out, err = worker.communicate(timeout=120)
        finally:
            worker.kill()

    assert len(found) == 1
    assert (worker.returncode, out) == (0, "")
    assert "Traceback" not in err


def test_dead_letters_are_shown_and_redriven(url: str, cli: Cli) -> None:
    for number in range(3):
        ask(url, f"r-{number}")
    given_up = "UPDATE notification_deliveries SET status = 'DEAD', attempts = 15, last_error = 'OSError: gone'"
    servers.run(execute_on(url, given_up))
    away = ask(url, "r-4")
    servers.run(execute_on(url, "UPDATE notification_deliveries SET notifier = 'pager' WHERE status = 'DUE'"))
    listed = cli("notifications", "list", "--status", "DEAD")
    examined = cli("doctor", "--json").json
    first = cli("notifications", "list", "--json", "--status", "DEAD").json["items"][0]["delivery_id"]
    one = cli("notifications", "redrive", first)
    again = cli("notifications", "redrive", first)
    rest = cli("notifications", "redrive", "--notifier", "log", "--json")

    assert listed.out.count("OSError: gone") == 3
    assert "log: 0 wait (0 due), 3 dead" in listed.err
    assert "pager: 1 wait (1 due), 0 dead; not loaded here" in listed.err
    assert examined["notifications"] == {"waiting": 1, "due": 1, "dead": 3, "not_loaded_here": ["pager"]}
    assert [text for text in examined["warnings"] if "notice" in text] == [
        "3 notices were given up: see `gateway-store notifications list --status DEAD`.",
        "1 notices wait for the notifier pager, which is not loaded here: run a worker that has it.",
    ]
    assert (one.code, one.out) == (0, "1 dead letters are due again.\n")
    again.assert_fails(4, "No dead letter has this id")
    assert rest.json == {"redriven": 2}
    assert cli("notifications", "redrive", "nonsense").code == 2
    cli("notifications", "redrive", "--notifier", "lag").assert_fails(4, "There is no notifier 'lag'", "log")
    assert cli("notifications", "run", "--once").out == "3 notices arrived.\n"

    # A decision on the command line is sent before the command ends.
    assert cli("approvals", "deny", away, "--approver", "alice", NOTIFICATION_WORKER="true").code == 0
    rows = cli("notifications", "list", "--json", "--approval", away).json["items"]
    assert [(row["event"], row["status"]) for row in rows] == [("decision", "DELIVERED"), ("pending", "DUE")]
