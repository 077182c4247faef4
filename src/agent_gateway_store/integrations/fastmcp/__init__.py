"""For MCP servers and proxies on FastMCP: every tool call is judged, approved and recorded. Extra: `fastmcp`."""

from __future__ import annotations

from agent_gateway_store.errors import MissingExtraError

# Imported here first, so that the error where it is missing names the extra.
try:
    import fastmcp  # noqa: F401
except ImportError as exc:
    raise MissingExtraError("agent_gateway_store.integrations.fastmcp", extra="fastmcp") from exc

from agent_gateway_store.audit.calls import argument_names
from agent_gateway_store.integrations.fastmcp.middleware import GatewayMiddleware
from agent_gateway_store.integrations.guard import Verdict

__all__ = ["GatewayMiddleware", "Verdict", "argument_names"]
