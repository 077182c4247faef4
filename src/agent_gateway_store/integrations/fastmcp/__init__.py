"""For MCP servers and proxies on FastMCP: every tool call is judged, approved and recorded. Extra: `fastmcp`."""

from __future__ import annotations

from agent_gateway_store.errors import needs_extra

with needs_extra("agent_gateway_store.integrations.fastmcp", extra="fastmcp"):
    import fastmcp  # noqa: F401

from agent_gateway_store.audit.calls import argument_names
from agent_gateway_store.integrations.callbacks import Verdict
from agent_gateway_store.integrations.fastmcp.middleware import GatewayMiddleware

__all__ = ["GatewayMiddleware", "Verdict", "argument_names"]
