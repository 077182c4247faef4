"""The servers and tools below a FastMCP server. One name never stands for two of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastmcp import FastMCP
from fastmcp.exceptions import ToolError
from fastmcp.server.middleware.tool_injection import ToolInjectionMiddleware
from fastmcp.server.providers import Provider
from fastmcp.server.providers.aggregate import AggregateProvider
from fastmcp.server.providers.fastmcp_provider import FastMCPProvider
from fastmcp.server.providers.proxy import ProxyProvider, ProxyTool
from fastmcp.server.transforms.catalog import CatalogTransform
from fastmcp.tools import Tool
from fastmcp.tools.tool_transform import TransformedTool
from fastmcp.utilities.types import NotSet
from fastmcp.utilities.versions import VersionSpec

from agent_gateway_store.integrations.fastmcp.pinning import PinningMiddleware

_TWO_SERVERS = "Two servers behind this one have the same name, so the call was not run: tell their operator."
_UNSEEN = (
    "This tool calls other tools of a mounted server, which nobody would judge, so it was not run: ask its operator to"
    " add the gateway's middleware to that server."
)
_TWO_TOOLS = "Two tools of the server have the same name of their own, so the call was not run: tell its operator."


def is_alias(tool: TransformedTool) -> bool:
    """Return False if it adds code, which makes it a tool of its own."""
    has_factory = any(change.default_factory is not NotSet for change in (tool.transform_args or {}).values())
    return tool.fn is tool.forwarding_fn and not has_factory


def require_own_server_name(root: FastMCP[Any], server: FastMCP[Any], root_name: str) -> str:
    """Return the name of `server`, which is `root` or mounted below it.

    Args:
        root_name: Name of `root` in the record.

    Raises:
        ToolError: Another server below `root` has the same name.
    """
    name = root_name if server is root else server.name
    namesakes = {id(other) for other in _servers(root, set()) if (root_name if other is root else other.name) == name}
    if namesakes - {id(server)}:
        raise ToolError(_TWO_SERVERS)
    return name


async def own_name(server: FastMCP[Any], tool: Tool, asked: str) -> str:
    """Return the name under which `tool` was registered, before any namespace.

    Args:
        server: The server in which the tool was looked up.
        tool: The result of the lookup: neither an alias nor a mount.
        asked: The name by which it was looked up.

    Raises:
        ToolError: Another tool of the server has the same name and version.
    """
    name = await _registered_name(server, tool)
    if name != asked:
        version = VersionSpec(eq=tool.version) if tool.version else None
        found = [await provider._get_tool(name, version) for provider, _ in _providers(server, False)]
        namesakes = [other for other in [*_injected(server), *found] if other is not None and other.name == name]
        if any(other.version == tool.version and not _is_same(_bottom(other), tool) for other in namesakes):
            raise ToolError(_TWO_TOOLS)
    return name


async def _registered_name(server: FastMCP[Any], tool: Tool) -> str:
    if isinstance(tool, ProxyTool):
        return _backend_name(tool)
    registered = {
        other.name
        for provider, is_renaming in _providers(server, bool(server.transforms))
        if is_renaming and not isinstance(provider, ProxyProvider)
        for other in await provider._list_tools()
        if _is_same(_bottom(other), tool)
    }
    if not registered or tool.name in registered:
        return tool.name
    if len(registered) > 1:
        raise ToolError(_TWO_TOOLS)
    return registered.pop()


async def require_seen_calls(root: FastMCP[Any], server: FastMCP[Any], tool: Tool) -> None:
    """Refuse a tool that calls other tools of a mounted server by names in its arguments, as search transforms add.

    Raises:
        ToolError: The middleware of `root` would not see those calls.
    """
    guards = (middleware for middleware in server.middleware if isinstance(middleware, PinningMiddleware))
    if server is root or any(guard.judges_calls for guard in guards):
        return
    transforms = [*server.transforms, *(change for provider in server.providers for change in provider.transforms)]
    if isinstance(tool, ProxyTool) or not any(isinstance(change, CatalogTransform) for change in transforms):
        return
    registered = [other for provider, _ in _providers(server, False) for other in await provider._list_tools()]
    if not any(_is_same(_bottom(other), tool) for other in registered):
        raise ToolError(_UNSEEN)


def _servers(server: FastMCP[Any], seen: set[int]) -> Iterator[FastMCP[Any]]:
    if id(server) not in seen:
        seen.add(id(server))
        yield server
        for provider, _ in _providers(server, False, mounts=True):
            if isinstance(provider, FastMCPProvider):
                yield from _servers(provider.server, seen)


def _providers(over: AggregateProvider, is_renaming: bool, *, mounts: bool = False) -> Iterator[tuple[Provider, bool]]:
    """Yield the sources below, without their wrappers, and whether a transform may rename what comes from there."""
    for provider in over.providers:
        renames = is_renaming or bool(provider.transforms)
        inner: Provider = provider
        # FastMCP wraps a provider for each transform, and has no public way to what is wrapped.
        while (wrapped := getattr(inner, "_inner", None)) is not None:
            inner = wrapped
            renames = renames or bool(inner.transforms)
        if isinstance(inner, AggregateProvider) and not isinstance(inner, FastMCP):
            yield from _providers(inner, renames, mounts=mounts)
        elif mounts or not isinstance(inner, FastMCPProvider):
            yield inner, renames


def _injected(server: FastMCP[Any]) -> list[Tool]:
    return [
        tool
        for middleware in server.middleware
        if isinstance(middleware, ToolInjectionMiddleware)
        for tool in middleware.injected_tools
    ]


def _bottom(tool: Tool) -> Tool:
    while isinstance(tool, TransformedTool) and is_alias(tool):
        tool = tool.parent_tool
    return tool


def _backend_name(tool: ProxyTool) -> str:
    """Return the name that the proxy calls."""
    return str(tool.get_span_attributes()["fastmcp.proxy.backend_name"])


def _is_same(one: Tool, other: Tool) -> bool:
    """Return True for two copies of a tool, of which one may have another name."""
    if isinstance(one, ProxyTool) and isinstance(other, ProxyTool):
        return one._client_factory is other._client_factory and _backend_name(one) == _backend_name(other)
    function = getattr(one, "fn", None)
    if function is not None:
        return function is getattr(other, "fn", None)
    return one.model_copy(update={"name": other.name}) == other
