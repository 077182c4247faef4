"""Hooks: object to a decision."""

import asyncio

# --8<-- [start:plugin]
from agent_gateway_store import hookimpl


class ProductionNeedsAReason:
    """Approving anything of the production servers takes a note of ten letters or more."""

    @hookimpl
    def gateway_store_veto_decision(self, request, decision, note):
        if decision == "APPROVED" and request.tool_call.server.startswith("prod-") and len(note) < 10:
            return "say why, in the note"
        return None


# --8<-- [end:plugin]


from contextlib import suppress

from agent_gateway_store import ApprovalRequest, GatewayStore, ToolCall
from agent_gateway_store.errors import DecisionVetoedError


async def main() -> None:
    async with GatewayStore(plugins=[ProductionNeedsAReason()]) as store:
        call = ToolCall(server="prod-db", tool="drop_table")
        token = await store.approvals.issue_token(
            ApprovalRequest(request_id="r-1", caller_id="dev-agent", tool_call=call, risk_explanation="Drops a table.")
        )
        with suppress(DecisionVetoedError):
            await store.approvals.approve(token, approver_id="alice")
        assert (await store.approvals.check_token(token)).status == "PENDING"
        await store.approvals.approve(token, approver_id="alice", note="ticket 4711, backed up")


asyncio.run(main())
