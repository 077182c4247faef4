"""Hooks: hear of events after their commit."""

import asyncio

# --8<-- [start:plugin]
from collections import Counter

from agent_gateway_store import hookimpl


class CountDenials:
    """Counts denials by caller, for an alarm."""

    def __init__(self):
        self.denials = Counter()

    @hookimpl
    def gateway_store_audit_written(self, events):
        self.denials.update(event.caller_id for event in events if event.decision == "DENY")


# --8<-- [end:plugin]


from agent_gateway_store import AuditEvent, GatewayStore


async def main() -> None:
    event = AuditEvent(
        request_id="r-1",
        caller_id="dev-agent",
        caller_role="developer",
        environment="dev",
        mcp_server="files",
        tool_name="delete_file",
        raw_args_hash=AuditEvent.hash_args({}),
        sanitized_args={},
        risk_score=0.9,
        matched_policy_rule="no-deletes",
        decision="DENY",
        latency_ms=1,
        deterministic_rationale="Nobody deletes.",
    )
    plugin = CountDenials()
    async with GatewayStore(plugins=[plugin]) as store:
        await store.audit.write(event)
    assert plugin.denials == {"dev-agent": 1}


asyncio.run(main())
