"""Sends the person behind a client to the page of an approval, if the client can do that (MCP 2026-07-28)."""

from __future__ import annotations

from collections.abc import MutableMapping

from fastmcp.server.context import Context
from fastmcp.tools import ToolResult
from fastmcp.tools.base import InputRequiredToolResult
from mcp_types import ElicitRequest, ElicitRequestURLParams, InputRequiredResult
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from agent_gateway_store.integrations.guard import CallPendingError

_PAGE = "agent_gateway_store_approval"


def take_answer(context: Context) -> bool:
    """Return whether the client comes back from `page_request`, and hide from the tool that it does.

    The answer releases nothing: somebody may have opened the page, and the approval is acquired anew.
    """
    answers = context.input_responses
    if answers is None or _PAGE not in answers or context.request_context is None:
        return False
    # No public name of FastMCP leads to the raw request, from which the tool and a proxy read the answers.
    params = context.request_context._srctx.params
    if isinstance(params, MutableMapping):
        params.pop("inputResponses", None)
    return True


def page_request(context: Context, pending: CallPendingError, console_url: str | None) -> ToolResult | None:
    """Return the result that asks the client to open the approval's page; None if it cannot."""
    request = context.request_context
    if console_url is None or request is None or request.protocol_version not in MODERN_PROTOCOL_VERSIONS:
        return None
    capabilities = context.session.client_capabilities
    if capabilities is None or capabilities.elicitation is None or capabilities.elicitation.url is None:
        return None
    url = f"{console_url}/approvals/{pending.approval.approval_id}"
    asked = ElicitRequest(params=ElicitRequestURLParams(message=str(pending), url=url))
    return InputRequiredToolResult(InputRequiredResult(input_requests={_PAGE: asked}))
