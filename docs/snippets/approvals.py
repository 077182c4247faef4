"""How-to: approvals."""

import asyncio
from datetime import UTC, datetime, timedelta

# --8<-- [start:imports]
from agent_gateway_store import ApprovalRequest, ApprovalScope, ApprovalStatus, GatewayStore, ToolCall, errors

# --8<-- [end:imports]


def ask(request_id: str, **fields: object) -> ApprovalRequest:
    values = {
        "request_id": request_id,
        "caller_id": "dev-agent",
        "tool_call": ToolCall(server="files", tool="delete_file", arguments={"path": "/tmp/old.log"}),  # noqa: S108
        "risk_explanation": "Deletes a file for good.",
    }
    return ApprovalRequest(**(values | fields))


async def sanitised(store: GatewayStore) -> None:
    # --8<-- [start:issue]
    call = ToolCall(server="mail", tool="send", arguments={"to": "bob@example.com", "body": "the whole letter"})
    shown = ToolCall(server="mail", tool="send", arguments={"to": "bob@example.com", "body": "(14 words)"})

    token = await store.approvals.issue_token(
        ApprovalRequest(request_id="r-1", caller_id="dev-agent", tool_call=shown, risk_explanation="Leaves the house."),
        call=call,
    )
    # --8<-- [end:issue]

    # --8<-- [start:decide]
    [request] = await store.approvals.list_requests(ApprovalStatus.PENDING)
    print(request.caller_id, request.tool_call.tool, request.tool_call.arguments)

    result = await store.approvals.approve(approval_id=request.approval_id, approver_id="alice", note="Known receiver.")
    # --8<-- [end:decide]
    assert result.status is ApprovalStatus.APPROVED

    # --8<-- [start:use]
    result = await store.approvals.wait_for_decision(token, timeout_s=60)
    if result.status is ApprovalStatus.APPROVED:
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=call)
        # Run the call here: this process, and no other, may.
        await store.approvals.record_outcome(token, "sent")
    # --8<-- [end:use]

    # --8<-- [start:second]
    try:
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=call)
    except errors.ApprovalAlreadyUsedError as refusal:
        print(refusal)
    # --8<-- [end:second]
    else:
        raise AssertionError


async def deadlines(store: GatewayStore) -> None:
    # --8<-- [start:deadlines]
    now = datetime.now(UTC)
    token = await store.approvals.issue_token(
        ask("r-2", expires_at=now + timedelta(minutes=10), use_before=now + timedelta(hours=1))
    )
    # --8<-- [end:deadlines]
    # --8<-- [start:cancel]
    await store.approvals.cancel(token, approver_id="dev-agent", note="No longer needed.")
    # --8<-- [end:cancel]
    assert (await store.approvals.check_token(token)).status is ApprovalStatus.CANCELLED


async def several(store: GatewayStore) -> None:
    # --8<-- [start:several]
    token = await store.approvals.issue_token(ask("r-3", required_approvals=2))

    first = await store.approvals.approve(token, approver_id="alice")
    second = await store.approvals.approve(token, approver_id="bob")
    print(first.status, second.status)  # PENDING APPROVED
    # --8<-- [end:several]
    assert (first.status, second.status) == ("PENDING", "APPROVED")


async def output(store: GatewayStore) -> None:
    rows = [{"name": "Ada", "salary": 100}]
    # --8<-- [start:output]
    token = await store.approvals.issue_token(ask("r-5", scope=ApprovalScope.OUTPUT_RELEASE, output_payload=rows))
    await store.approvals.approve(token, approver_id="alice", note="No more than was asked for.")

    released = await store.approvals.release_output(token, caller_id="dev-agent")
    # --8<-- [end:output]
    assert released == rows


async def refusals(store: GatewayStore) -> None:
    token = await store.approvals.issue_token(ask("r-4"))
    await store.approvals.deny(token, approver_id="carol", note="Ask first.")
    # --8<-- [start:refusals]
    try:
        await store.approvals.approve(token, approver_id="alice")
    except errors.ApprovalAlreadyDecidedError as refusal:
        print(refusal.status, refusal.approver_id, refusal.decided_at)
    # --8<-- [end:refusals]
    else:
        raise AssertionError
    # --8<-- [start:sweep]
    swept = await store.approvals.expire_stale()
    # --8<-- [end:sweep]
    assert swept == 0


async def main() -> None:
    async with GatewayStore() as store:
        await sanitised(store)
        await deadlines(store)
        await several(store)
        await output(store)
        await refusals(store)


asyncio.run(main())
