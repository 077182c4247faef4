"""Tutorial: a key, a call that needs an approval, and its audit event, on SQLite."""

# --8<-- [start:imports]
import asyncio
import time
from pathlib import Path
from uuid import uuid4

from agent_gateway_store import (
    ApprovalRequest,
    AuditEvent,
    CallerIdentity,
    Decision,
    ExecutionStatus,
    GatewayStore,
    ToolCall,
    TrustLevel,
)

# --8<-- [end:imports]


# --8<-- [start:handle]
async def delete_file(store: GatewayStore, caller: CallerIdentity, path: Path) -> None:
    """What a gateway does with one dangerous call."""
    request_id = uuid4().hex
    call = ToolCall(server="files", tool="delete_file", arguments={"path": str(path)})

    token = await store.approvals.issue_token(
        ApprovalRequest(
            request_id=request_id,
            caller_id=caller.caller_id,
            tool_call=call,
            risk_explanation="Deletes a file for good.",
        )
    )
    await store.approvals.wait_for_decision(token, timeout_s=30)
    approval = await store.approvals.consume_token(token, caller_id=caller.caller_id, tool_call=call)

    started = time.perf_counter()
    path.unlink()
    latency_ms = round((time.perf_counter() - started) * 1000)
    await store.approvals.record_outcome(token, "deleted")

    await store.audit.write(
        AuditEvent(
            request_id=request_id,
            caller_id=caller.caller_id,
            caller_role=caller.role,
            key_id=caller.key_id,
            environment=caller.environment,
            mcp_server=call.server,
            tool_name=call.tool,
            raw_args_hash=AuditEvent.hash_args(call.arguments),
            sanitized_args={"path": path.name},
            risk_score=0.8,
            matched_policy_rule="deletions-need-approval",
            decision=Decision.APPROVAL_REQUIRED,
            approver_id=approval.approver_id,
            execution_status=ExecutionStatus.SUCCESS,
            latency_ms=latency_ms,
            deterministic_rationale="The tool is on the list of destructive tools.",
        )
    )


# --8<-- [end:handle]


# --8<-- [start:approver]
async def approver(store: GatewayStore) -> None:
    """Stands in for a human: approves the first call that waits."""
    while not (waiting := await store.approvals.list_requests("PENDING")):
        await asyncio.sleep(0.05)
    await store.approvals.approve(approval_id=waiting[0].approval_id, approver_id="alice", note="It is old.")


# --8<-- [end:approver]


# --8<-- [start:main]
async def main() -> None:
    async with GatewayStore("sqlite:///tutorial.db") as store:
        issued = await store.keys.issue("dev-agent", role="developer", trust_level=TrustLevel.MEDIUM)
        key = issued.plaintext.get_secret_value()  # hand this to the agent; it is shown once

        caller = await store.keys.verify(key)
        print(caller.caller_id, caller.role, caller.trust_level.name)

        old_log = Path("old.log")
        old_log.write_text("nothing of value")
        await asyncio.gather(delete_file(store, caller, old_log), approver(store))

        for event in await store.audit.list_recent():
            print(event.caller_id, event.tool_name, event.decision, event.approver_id, event.execution_status)


asyncio.run(main())
# --8<-- [end:main]

assert not Path("old.log").exists()
