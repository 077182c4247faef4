"""How-to: find events, count them, follow them, take them elsewhere."""

import asyncio
from contextlib import aclosing
from datetime import datetime, timedelta

from agent_gateway_store import ApprovalRequest, AuditEvent, GatewayStore, ToolCall


def make_event(number: int) -> AuditEvent:
    return AuditEvent(
        request_id=f"r-{number}",
        caller_id=f"agent-{number % 3}",
        caller_role="developer",
        environment="prod",
        mcp_server="files",
        tool_name="delete_file" if number % 4 == 0 else "read_file",
        raw_args_hash=AuditEvent.hash_args({"n": number}),
        sanitized_args={"n": number},
        risk_labels=["PII"] if number % 5 == 0 else [],
        risk_score=0.1,
        matched_policy_rule="deletes-are-denied" if number % 4 == 0 else "reads-are-allowed",
        decision="DENY" if number % 4 == 0 else "ALLOW",
        latency_ms=number,
        deterministic_rationale="By rule.",
    )


async def main() -> None:
    async with GatewayStore() as store:
        await store.audit.write_many(map(make_event, range(200)))

        # --8<-- [start:search]
        page = await store.audit.search(
            caller_id=["agent-0", "agent-1"],  # any of these
            decision="DENY",  # and this
            since="24h",  # a datetime, a timedelta, or text such as "7d" or "2026-05-01T12:00Z"
            limit=20,
        )
        # --8<-- [end:search]
        assert len(page) == 20

        # --8<-- [start:pages]
        filters = {"decision": "DENY", "since": "24h"}
        page = await store.audit.search(**filters, limit=20)
        while page.next_cursor:
            page = await store.audit.search(**filters, limit=20, cursor=page.next_cursor)
        # --8<-- [end:pages]
        assert len(page) == 10

        # --8<-- [start:stream]
        slowest = 0
        async with aclosing(store.audit.stream(tool_name="read_file")) as events:
            async for event in events:
                slowest = max(slowest, event.latency_ms)
        # --8<-- [end:stream]
        assert slowest == 199

        # --8<-- [start:stats]
        by_hour = await store.audit.stats(["tool_name", "decision"], bucket="1h", since="7d")
        busiest = await store.audit.stats("caller_id", risk_label="PII")
        # --8<-- [end:stats]
        assert sum(row["calls"] for row in by_hour) == 200
        assert sum(row["calls"] for row in busiest) == 40

        # --8<-- [start:frames]
        table = await store.audit.to_arrow(since="7d")
        frame = await store.audit.to_pandas(since="7d")
        # --8<-- [end:frames]
        assert table.num_rows == len(frame) == 200

        # --8<-- [start:export]
        await store.audit.export("denied.csv", decision="DENY")
        await store.audit.export("events.jsonl.gz", since="7d")
        await store.audit.export("events", partition_by="day")  # events/day=2026-05-01/part-0.parquet, ...
        # --8<-- [end:export]

        async with GatewayStore("sqlite:///copy.db", redis_url="") as other:
            # --8<-- [start:import]
            outcomes = await other.audit.import_file("events.jsonl.gz")
            # --8<-- [end:import]
        assert outcomes["STORED"] == 200

        # --8<-- [start:changes]
        cursor = (await store.audit.changes(decision="DENY")).next_cursor  # now; keep it where it survives a restart
        await store.audit.write(make_event(1_000))
        page = await store.audit.changes(cursor, decision="DENY")
        cursor = page.next_cursor
        # --8<-- [end:changes]
        assert [event.request_id for event in page] == ["r-1000"]

        call = ToolCall(server="files", tool="delete_file")
        asked = ApprovalRequest(request_id="r-1", caller_id="agent-1", tool_call=call, risk_explanation="Deletes.")
        await store.approvals.issue_token(asked)
        # --8<-- [start:approvals]
        waiting = await store.approvals.search(tool="delete_file", status=["PENDING", "EXPIRED"], since="7d")
        story = await store.approvals.history(waiting[0].approval_id)
        # --8<-- [end:approvals]
        assert story[0]["event"] == "asked"
        assert datetime.now(story[0]["at"].tzinfo) - story[0]["at"] < timedelta(minutes=5)


asyncio.run(main())
