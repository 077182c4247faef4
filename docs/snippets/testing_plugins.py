"""How-to: test plugins. A file of tests; run as a script it runs itself by pytest."""

import subprocess
import sys
from datetime import timedelta

import pytest

from agent_gateway_store import ApprovalRequest, ToolCall, hookimpl
from agent_gateway_store.errors import ApprovalExpiredError, DecisionVetoedError
from agent_gateway_store.testing import NotifierConformance
from agent_gateway_store.testing import RecordingNotifier as MyNotifier


def my_request() -> ApprovalRequest:
    call = ToolCall(server="files", tool="delete_file", arguments={"path": "old.log"})
    return ApprovalRequest(request_id="r-1", caller_id="dev-agent", tool_call=call, risk_explanation="Deletes a file.")


# --8<-- [start:fixtures]
@pytest.mark.asyncio
async def test_who_decides_too_late_is_told(gateway_store, gateway_clock, recorded_notifications):
    token = await gateway_store.approvals.issue_token(my_request())
    [notice] = await recorded_notifications.wait_for(event="pending")
    assert notice.tool_call.tool == "delete_file"

    gateway_clock.move(timedelta(hours=2))
    with pytest.raises(ApprovalExpiredError):
        await gateway_store.approvals.approve(token, "alice")


# --8<-- [end:fixtures]


# --8<-- [start:conformance]
class TestMyNotifier(NotifierConformance):
    @pytest.fixture
    def notifier(self):
        return MyNotifier("mine")


# --8<-- [end:conformance]


# --8<-- [start:hook]
class NobodyDeletes:
    @hookimpl
    def gateway_store_veto_decision(self, request, decision):
        if decision == "APPROVED" and request.tool_call.tool == "delete_file":
            return "nobody deletes files on a Friday"
        return None


class TestNobodyDeletes:
    @pytest.fixture
    def gateway_store_plugins(self):
        return [NobodyDeletes()]

    def test_it_vetoes(self, sync_gateway_store):
        token = sync_gateway_store.approvals.issue_token(my_request())
        with pytest.raises(DecisionVetoedError, match="on a Friday"):
            sync_gateway_store.approvals.approve(token, "alice")


# --8<-- [end:hook]


if __name__ == "__main__":
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:valkey", "-c", "/dev/null", "--rootdir=.", "-W", "error"]
    options += ["-o", "asyncio_default_fixture_loop_scope=function"]
    sys.exit(subprocess.call([sys.executable, "-m", "pytest", __file__, *options]))  # noqa: S603
