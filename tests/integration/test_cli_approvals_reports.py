"""`gateway-store approvals`: votes in listings, counts and exports."""

from __future__ import annotations

import json
from pathlib import Path

import cli_helpers
import pytest
from cli_helpers import Cli

from agent_gateway_store import SyncGatewayStore, ToolCall
from agent_gateway_store._text import CUT_CALL
from builders import make_request

url, cli = cli_helpers.url, cli_helpers.cli


@pytest.fixture
def filled(cli: Cli, url: str) -> Cli:
    """One approval with a vote by Slack, and one without."""
    with SyncGatewayStore(url, redis_url="") as store:
        token = store.approvals.issue_token(make_request(request_id="r-1"))
        store.approvals.deny(token, "carla", "No", channel="slack")
        store.approvals.issue_token(make_request(request_id="r-2", caller_id="other"))
    return cli


def test_votes_are_listed_counted_and_exported(filled: Cli, tmp_path: Path) -> None:
    listed = filled("approvals", "list", "--json").json["items"]
    assert [[vote["channel"] for vote in each["votes"]] for each in listed] == [[], ["slack"]]
    assert "carla DENIED (slack)" in filled("approvals", "list", "--status", "denied").out
    approval_id = listed[1]["approval_id"]
    assert filled("approvals", "show", approval_id, "--json").json["votes"][0]["approver_id"] == "carla"
    assert "carla DENIED (slack)" in filled("approvals", "show", approval_id).out

    rows = filled("approvals", "stats", "--by", "status", "--json").json["items"]
    assert {row["status"]: row["approvals"] for row in rows} == {"DENIED": 1, "PENDING": 1}
    only = ("approvals", "stats", "--caller", "other", "--bucket", "1d", "--time-zone", "Asia/Kolkata", "--json")
    (row,) = filled(*only).json["items"]
    assert (row["bucket"][-6:], row["approvals"]) == ("+05:30", 1)
    for service in ("approvals", "audit"):
        wrong = filled(service, "stats", "--time-zone", "Nowhere")
        assert (wrong.code, "time_zone must be the name of a zone" in wrong.err) == (2, True)

    path = tmp_path / "a.jsonl"
    assert filled("approvals", "export", str(path), "--status", "denied", "--json").json["rows"] == 1
    assert json.loads(path.read_text())["votes"][0]["note"] == "No"
    assert filled("approvals", "export", str(path)).code == 1
    assert "2 approvals" in filled("approvals", "export", str(path), "--overwrite").out


def test_a_call_that_was_not_stored_whole_says_so(cli: Cli, url: str) -> None:
    """In the list and alone; a program that reads JSON finds the mark, and a person the sentence beside it."""
    arguments = {**{f"p{number}": "x" * 65_000 for number in range(5)}, "cmd": "rm -rf /"}
    with SyncGatewayStore(url, redis_url="") as store:
        store.approvals.issue_token(make_request(request_id="whole"))
        call = ToolCall(server="s", tool="t", arguments=arguments)
        store.approvals.issue_token(make_request(request_id="cut", tool_call=call))
        cut, whole = (
            str(store.approvals.search(request_id=request_id)[0].approval_id) for request_id in ("cut", "whole")
        )
    said = f"Approval {cut}: {CUT_CALL}"

    for command in (("list",), ("show", cut)):
        assert said in cli("approvals", *command).out
        outcome = cli("approvals", *command, "--json")
        assert (said in outcome.err, "[cut: 1 more entries]" in json.dumps(json.loads(outcome.out))) == (True, True)
    assert f"Approval {whole}" not in cli("approvals", "list").out
    assert CUT_CALL not in cli("approvals", "show", whole).out
