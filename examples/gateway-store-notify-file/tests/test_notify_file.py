"""The notifier passes the conformance suite, and does its work in a store."""

import json

import pytest
from gateway_store_notify_file import FileNotifier

from agent_gateway_store import ApprovalRequest, ToolCall
from agent_gateway_store.testing import NotifierConformance, wait_until


class TestConformance(NotifierConformance):
    """Everything that a store asks of a notifier."""

    @pytest.fixture
    def notifier(self, tmp_path):
        return FileNotifier(tmp_path / "notices.jsonl")

    @pytest.fixture
    def unreachable_notifier(self, tmp_path):
        return FileNotifier(tmp_path)  # a folder cannot be appended to

    @pytest.fixture
    def sent_text(self, tmp_path):
        return (tmp_path / "notices.jsonl").read_text


@pytest.fixture
def file(tmp_path):
    return tmp_path / "notices.jsonl"


@pytest.fixture
def gateway_store_plugins(file):
    return [FileNotifier(file)]


def test_an_approval_becomes_two_lines(sync_gateway_store, file):
    """One when it is asked, one when it is decided; neither holds the token."""
    call = ToolCall(server="files", tool="delete_file", arguments={"path": "old.log"})
    token = sync_gateway_store.approvals.issue_token(
        ApprovalRequest(request_id="r-1", caller_id="dev-agent", tool_call=call, risk_explanation="Deletes a file.")
    )
    sync_gateway_store.approvals.approve(token, "alice")

    wait_until(lambda: file.exists() and len(file.read_text().splitlines()) == 2)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["status"] for line in lines} == {"PENDING", "APPROVED"}
    assert {line["tool_call"]["tool"] for line in lines} == {"delete_file"}
    assert token not in file.read_text()
