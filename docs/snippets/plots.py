"""How-to: plots."""

from datetime import timedelta
from pathlib import Path

from agent_gateway_store import AuditEvent, SyncGatewayStore
from agent_gateway_store.clock import utc_now

with SyncGatewayStore() as _store:
    for _number in range(40):
        _store.audit.write(
            AuditEvent(
                request_id=f"r-{_number}",
                timestamp=utc_now() - timedelta(hours=_number),
                caller_id="dev-agent",
                caller_role="developer",
                environment="dev",
                mcp_server="files",
                tool_name="read_file",
                raw_args_hash=AuditEvent.hash_args({}),
                sanitized_args={},
                risk_labels=["FILE_READ"],
                risk_score=0.1,
                matched_policy_rule="reads-are-allowed",
                decision="DENY" if _number % 7 == 0 else "ALLOW",
                execution_status="SUCCESS",
                latency_ms=5 + _number,
                deterministic_rationale="Reads are allowed.",
            )
        )

# --8<-- [start:store]
from agent_gateway_store import SyncGatewayStore
from agent_gateway_store.notebook import plot

store = SyncGatewayStore().open()
plot.timeline(store, since="7d")
plot.calls(store, since="7d")
plot.latency(store, since="7d", environment="dev")
plot.risk(store, since="7d")
plot.waiting(store)
# --8<-- [end:store]

# --8<-- [start:result]
denied = store.audit.search(decision="DENY", since="7d", limit=10_000)
plot.timeline(denied, title="Denied calls")
plot.latency(denied.to_pandas())
plot.latency(store.audit.stats(by="caller_id"), title="Latency of each caller")
# --8<-- [end:result]

# --8<-- [start:save]
chart = plot.timeline(store, since="7d").properties(width=900)
chart.save("week.svg")
# --8<-- [end:save]
assert Path("week.svg").read_text().startswith("<svg")

# --8<-- [start:offline]
import altair

altair.renderers.enable("jupyter", offline=True)  # live, with tooltips
altair.renderers.enable("svg")  # still; also for pages made of notebooks
# --8<-- [end:offline]
assert "image/svg+xml" in chart._repr_mimebundle_()
store.close()
