"""How-to: the store in a notebook, by top-level await."""
# run: notebook

from agent_gateway_store import AuditEvent, GatewayStore

async with GatewayStore() as _store:
    await _store.audit.write(
        AuditEvent(
            request_id="r-1",
            caller_id="dev-agent",
            caller_role="developer",
            environment="dev",
            mcp_server="files",
            tool_name="read_file",
            raw_args_hash=AuditEvent.hash_args({}),
            sanitized_args={},
            risk_score=0,
            matched_policy_rule="reads-are-allowed",
            decision="ALLOW",
            latency_ms=1,
            deterministic_rationale="Reads are allowed.",
        )
    )

# --8<-- [start:open]
from agent_gateway_store import GatewayStore

store = await GatewayStore().open()
# --8<-- [end:open]

# --8<-- [start:look]
page = await store.audit.list_recent(limit=20)
page  # the last line of a cell is shown as a table
# --8<-- [end:look]
assert ">read_file</td>" in page._repr_html_()

# --8<-- [start:frame]
frame = page.to_pandas()
frame.groupby(["caller_id", "decision"], observed=True).size()
# --8<-- [end:frame]
assert list(frame["tool_name"]) == ["read_file"]

# --8<-- [start:close]
await store.close()
# --8<-- [end:close]
