"""Altair charts of what the store holds, which can be changed, layered and saved.

Each takes a result (`Page`, `Stats`), a DataFrame (pandas, Polars) or Arrow table of one, or a `SyncGatewayStore` with
the filters of `store.audit.search`. Everything is counted before it is drawn, so a million events make a small chart.
Times are UTC. What comes from the data cannot become markup, a script or an expression.
"""

from agent_gateway_store.notebook.counts import calls, risk, timeline
from agent_gateway_store.notebook.durations import latency, waiting

__all__ = ["calls", "latency", "risk", "timeline", "waiting"]
