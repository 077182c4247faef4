"""`gateway-store approvals acquire`: a script asks before it acts, and goes by the exit code."""

from __future__ import annotations

import json

import cli_helpers
from cli_helpers import Cli

url, cli = cli_helpers.url, cli_helpers.cli
CALL = ("--caller", "backup", "--server", "disk", "--tool", "wipe", "--arguments", '{"name": "sdb"}')


def test_exit_codes_say_whether_to_run(cli: Cli) -> None:
    def acquire(*options: str) -> tuple[int, dict[str, str]]:
        found = cli("approvals", "acquire", *CALL, "--json", *options)
        return found.code, json.loads(found.out)

    code, asked = acquire("--reason", "Old disk")
    assert (code, asked["status"]) == (6, "PENDING")
    assert cli("approvals", "approve", asked["approval_id"], "--approver", "ann").code == 0
    assert acquire()[0] == 0
    code, again = acquire("--wait", "0.05")
    assert (code, again["status"], again["approval_id"] != asked["approval_id"]) == (6, "PENDING", True)
    assert cli("approvals", "deny", again["approval_id"], "--approver", "ann").code == 0
    code, denied = acquire()
    assert (code, denied["status"], denied["approver_id"]) == (7, "DENIED", "ann")
    assert acquire("--bind", "another session")[0] == 6


def test_people_read_what_to_do(cli: Cli) -> None:
    asked = cli("approvals", "acquire", *CALL)
    assert (asked.code, "run this command again after the decision" in asked.out) == (6, True)
    approval_id = asked.out.split()[1]
    cli("approvals", "approve", approval_id, "--approver", "ann")
    assert cli("approvals", "acquire", *CALL).out == f"Approval {approval_id} released the call: run it now, once.\n"
    for wrong in ("[1]", "{", "no JSON"):
        found = cli("approvals", "acquire", *CALL[:-1], wrong)
        assert (found.code, "--arguments must be a JSON object" in found.err) == (2, True)
