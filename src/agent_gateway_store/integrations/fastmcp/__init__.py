"""For MCP servers and proxies on FastMCP: every tool call judged, approved and recorded. Extra: `fastmcp`."""

from __future__ import annotations

from agent_gateway_store.errors import MissingExtraError

try:
    import fastmcp  # noqa: F401  asked for here, so that its absence is told by the extra
except ImportError as exc:
    raise MissingExtraError("agent_gateway_store.integrations.fastmcp", extra="fastmcp") from exc

from agent_gateway_store.integrations.fastmcp.middleware import GatewayMiddleware
from agent_gateway_store.integrations.fastmcp.verdict import Verdict, argument_names

__all__ = ["GatewayMiddleware", "Verdict", "argument_names"]
