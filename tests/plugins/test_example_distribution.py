"""The example plugin as a user gets it: its wheel and ours, installed side by side into a fresh environment."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from wheels import ROOT, build_wheel, dependencies, offline, run

pytestmark = pytest.mark.integration

EXAMPLE = ROOT / "examples" / "gateway-store-notify-file"

Run = Callable[..., CompletedProcess[str]]

ASK = """
from agent_gateway_store import ApprovalRequest, SyncGatewayStore, ToolCall

with SyncGatewayStore("sqlite:///gateway.db") as store:
    call = ToolCall(server="files", tool="delete_file")
    token = store.approvals.issue_token(
        ApprovalRequest(request_id="r-1", caller_id="dev-agent", tool_call=call, risk_explanation="Deletes a file.")
    )
    store.approvals.deny(token, "alice")
    print(store.plugins.__module__, __import__("agent_gateway_store").__file__)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder of a fresh environment that holds both wheels, and the variables that keep pip off the network."""
    work = tmp_path_factory.mktemp("example")
    ours = build_wheel(ROOT, work)
    theirs = build_wheel(EXAMPLE, work)
    variables = offline(dependencies(work / "deps"), ours.parent)
    # Its pip is the one that PYTHONPATH links: to unpack another takes longer than the rest.
    run(sys.executable, "-m", "venv", "--without-pip", work / "venv", cwd=work)
    # Without a path to ours: pip finds it as the dependency that it is.
    run(work / "venv" / "bin" / "python", "-m", "pip", "install", theirs, cwd=work, **variables)
    return work / "venv" / "bin", variables


@pytest.fixture
def installed(environment: tuple[Path, dict[str, str]], tmp_path: Path) -> Run:
    """Runs a command of that environment in an empty folder, which is also the user's home."""
    folder, variables = environment

    def call(command: str, *args: str, **more: str) -> CompletedProcess[str]:
        return run(folder / command, *args, cwd=tmp_path, **variables, **more)

    return call


def plugins_of(installed: Run, **variables: str) -> dict[str, dict[str, object]]:
    """What `plugins list` knows, by name."""
    listed = installed("gateway-store", "plugins", "list", "--json", **variables)
    return {item["name"]: item for item in json.loads(listed.stdout)["items"]}


def test_it_is_listed(installed: Run) -> None:
    """Name, version, distribution, hooks and settings; unset, it is active and offers nothing."""
    plugin = plugins_of(installed)["notify-file"]

    assert (plugin["distribution"], plugin["version"]) == ("gateway-store-notify-file", "0.1.0")
    assert (plugin["state"], plugin["notifiers"]) == ("active", [])
    assert plugin["settings"] == {"prefix": "NOTIFY_FILE_", "state": "defaults", "problems": []}
    assert plugins_of(installed, NOTIFY_FILE_PATH="x")["notify-file"]["notifiers"] == ["notify-file"]


def test_it_can_be_switched_off_by_name(installed: Run) -> None:
    """Blocked, it is not even imported."""
    plugin = plugins_of(installed, AGENT_GATEWAY_STORE_BLOCK_PLUGINS="notify-file")["notify-file"]

    assert (plugin["state"], plugin["hooks"]) == ("blocked", [])


def test_check_sends_a_test_notice_and_its_command_shows_it(installed: Run, tmp_path: Path) -> None:
    """`plugins check` and the plugin's own command work on the file that the variable names."""
    installed("gateway-store", "plugins", "check", "notify-file", NOTIFY_FILE_PATH="notices.jsonl")
    shown = installed("gateway-store", "notices", NOTIFY_FILE_PATH="notices.jsonl").stdout

    assert len((tmp_path / "notices.jsonl").read_text().splitlines()) == 2
    assert [line.split()[:3] for line in shown.splitlines()] == [
        ["pending", "PENDING", "'plugins_check'"],
        ["decision", "CANCELLED", "'plugins_check'"],
    ]


def test_an_approval_of_a_gateway_becomes_two_lines(installed: Run, tmp_path: Path) -> None:
    """A program that knows nothing of the plugin: it is installed and set up, that is all."""
    said = installed("python", "-W", "error", "-c", ASK, NOTIFY_FILE_PATH=str(tmp_path / "notices.jsonl")).stdout
    lines = [json.loads(line) for line in (tmp_path / "notices.jsonl").read_text().splitlines()]

    assert "venv/lib" in said
    assert sorted(line["status"] for line in lines) == ["DENIED", "PENDING"]
    assert len({line["approval_id"] for line in lines}) == 1
