"""How-to: the inbox of an approver in a notebook."""

from agent_gateway_store import ApprovalRequest, SyncGatewayStore, ToolCall

with SyncGatewayStore() as _store:
    _store.approvals.issue_token(
        ApprovalRequest(
            request_id="r-1",
            caller_id="dev-agent",
            tool_call=ToolCall(server="files", tool="delete_file", arguments={"path": "a.txt"}),
            risk_explanation="Deletes.",
        )
    )

# --8<-- [start:inbox]
from agent_gateway_store import SyncGatewayStore
from agent_gateway_store.notebook import inbox

store = SyncGatewayStore().open()
waiting = inbox(store, approver="alice")
waiting  # the last line of a cell is shown
# --8<-- [end:inbox]
[_waiting] = waiting.waiting
assert waiting.items[0]["call"] == "files.delete_file"

# --8<-- [start:plain]
plain = inbox(store, approver="alice", widgets=False)
plain
# --8<-- [end:plain]
assert f'store.approvals.approve(approval_id="{_waiting.approval_id}"' in repr(plain)
store.close()
