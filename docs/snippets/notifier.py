"""How-to: a plugin that is given to the store."""

import asyncio

from agent_gateway_store import ApprovalRequest, GatewayStore, ToolCall
from agent_gateway_store.testing import RecordingNotifier


async def main() -> None:
    my_notifier = RecordingNotifier("mine")
    # --8<-- [start:given]
    async with GatewayStore(plugins=[my_notifier]) as store:
        for record in store.plugins.records:
            print(record.name, record.state, record.hooks, record.error)
        # --8<-- [end:given]
        assert store.plugins.records[0].state == "active"
        call = ToolCall(server="files", tool="delete_file", arguments={"path": "old.log"})
        token = await store.approvals.issue_token(
            ApprovalRequest(request_id="r-1", caller_id="dev-agent", tool_call=call, risk_explanation="Deletes a file.")
        )
        await store.approvals.deny(token, approver_id="alice")
        await my_notifier.wait_for(2)
    assert {notice.status for notice in my_notifier.notices} == {"PENDING", "DENIED"}


asyncio.run(main())
