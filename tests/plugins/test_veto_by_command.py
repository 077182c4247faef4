"""A veto holds on every way to decide: here, on the command line."""

from __future__ import annotations

import pytest

import plugin_helpers
from agent_gateway_store import SyncGatewayStore
from builders import make_request
from commands import gateway_store
from plugin_helpers import Install

pytestmark = pytest.mark.integration

install = plugin_helpers.install

VETO = """
    from agent_gateway_store import hookimpl

    @hookimpl
    def gateway_store_veto_decision(request, decision, approver_id, note, channel):
        return f"not {decision} by {approver_id} on {channel}" if not note else None
"""


@pytest.mark.system
def test_an_installed_plugin_vetoes_the_command(install: Install) -> None:
    """One sentence, exit code 1, and the approval still waits; what the plugin lets through is decided."""
    install("strict", VETO)
    with SyncGatewayStore("sqlite:///gateway.db", redis_url="") as store:
        asked = make_request()
        store.approvals.issue_token(asked)
    approval, url = str(asked.approval_id), ("--database-url", "sqlite:///gateway.db")

    refused = gateway_store(*url, "approvals", "approve", approval, "--approver", "alice")
    shown = gateway_store(*url, "approvals", "show", approval, "--json")
    approved = gateway_store(*url, "approvals", "approve", approval, "--approver", "alice", "--note", "checked")

    refused.assert_fails(1, "Plugin strict refuses this decision: not APPROVED by alice on cli.")
    assert shown.json["status"] == "PENDING"
    assert approved.code == 0
