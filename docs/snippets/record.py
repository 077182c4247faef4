"""Reference: an audit event in the caller's own transaction."""

import asyncio

from sqlalchemy import text

from agent_gateway_store import AuditEvent, Decision, GatewayStore


def make_event(request_id: str) -> AuditEvent:
    return AuditEvent(
        request_id=request_id,
        caller_id="dev-agent",
        caller_role="developer",
        environment="dev",
        mcp_server="files",
        tool_name="read_file",
        raw_args_hash=AuditEvent.hash_args({"path": "notes.txt"}),
        sanitized_args={"path": "notes.txt"},
        risk_score=0.1,
        matched_policy_rule="reads-are-allowed",
        decision=Decision.ALLOW,
        latency_ms=3,
        deterministic_rationale="Reads are allowed.",
    )


async def main() -> None:
    async with GatewayStore() as store:
        event = make_event("r-1")
        # --8<-- [start:write]
        outcome = await store.audit.write(event)  # commits, and does not raise
        # --8<-- [end:write]
        assert outcome == "STORED"
        assert await store.audit.write(event) == "DUPLICATE"
        assert await store.audit.write(make_event("r-1")) == "STORED"  # another timestamp: another event
        assert "REQUEST_ID_REUSED" in (await store.audit.list_recent())[0].risk_labels

        event = make_event("r-2")
        # --8<-- [start:record]
        async with store.database.sessions() as session, session.begin():
            await session.execute(text("CREATE TABLE IF NOT EXISTS mine (id INTEGER)"))  # work of your own
            await store.audit.record(event, session=session)
        # --8<-- [end:record]
        assert await store.audit.get_by_request_id("r-2") is not None


asyncio.run(main())
