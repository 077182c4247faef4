"""Finds the tool that a call really runs: through mounts, aliases and transforms, to its own server and version."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastmcp import FastMCP
from fastmcp.exceptions import NotFoundError, ToolError
from fastmcp.server.context import Context
from fastmcp.server.dependencies import extract_version_spec
from fastmcp.server.middleware.tool_injection import ToolInjectionMiddleware
from fastmcp.server.providers import Provider
from fastmcp.server.providers.addressing import parse_hashed_backend_name
from fastmcp.server.providers.aggregate import AggregateProvider
from fastmcp.server.providers.fastmcp_provider import FastMCPProvider, FastMCPProviderTool
from fastmcp.server.providers.proxy import ProxyProvider, ProxyTool
from fastmcp.server.transforms.catalog import CatalogTransform
from fastmcp.tools import Tool
from fastmcp.tools.tool_transform import TransformedTool
from fastmcp.utilities.tasks import TASKS_EXTENSION_ID
from fastmcp.utilities.types import NotSet
from fastmcp.utilities.versions import VersionSpec
from mcp_types import CallToolRequestParams

from agent_gateway_store.encoding.canonical import hash_json
from agent_gateway_store.integrations.fastmcp.pinning import Hop, PinningMiddleware, pin_lookups
from agent_gateway_store.models.values import ToolCall

VERSION = "@version"
INPUT_RESPONSES = "@input_responses"
REQUEST_STATE = "@request_state"
RESERVED = frozenset({VERSION, INPUT_RESPONSES, REQUEST_STATE})

_RESERVED_NAME = f"The arguments {', '.join(sorted(RESERVED))} belong to the gateway: call without them."
_TOO_DEEP = "The arguments are nested too deeply to be judged, so the call was not run: nest them less."
_UNKNOWN_ARGUMENT = "The tool does not take one of the arguments, so the call was not run: read the tool's schema."
# Members of a JSON schema whose own members are names of a tool's, those that hold values, and those for readers alone.
_NAMES = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas", "dependentRequired")
_VALUES = ("default", "const", "enum")
_WORDS = ("description", "title", "examples")
_TASK = (
    "This tool would run as a background task, whose end cannot be recorded, so it was not run: call it without the"
    " tasks extension, or ask its operator to register it with task=False."
)
_TWO_SERVERS = "Two servers behind this one have the same name, so the call was not run: tell their operator."
_UNSEEN = (
    "This tool calls other tools of a mounted server, which nobody would judge, so it was not run: ask its operator to"
    " add the gateway's middleware to that server."
)
_TWO_TOOLS = "Two tools of the server have the same name of their own, so the call was not run: tell its operator."

# Chosen: a host that makes a server for each request reads one line for each, and no set grows without end.
_WARNED = 1000
_logger = logging.getLogger("agent_gateway_store.integrations")


@dataclass(frozen=True)
class ResolvedTool:
    """What runs if a call is allowed.

    Attributes:
        call: By the tool's own server and name, with the arguments that it receives and those of `RESERVED`.
        hops: The lookups that lead to the tool; to run what the first one returned is to run the call.
        code: Equal for two lookups that end in the same code and schema.
        parameters: The JSON schema of what the tool takes.
        message: A copy, to be run: whoever changes the original, or its arguments, changes neither it nor `call`.
    """

    call: ToolCall
    hops: tuple[Hop, ...]
    code: object
    parameters: Mapping[str, Any]
    message: CallToolRequestParams

    @property
    def schema_hash(self) -> str:
        """The hash of what the tool takes, defaults included and words for readers left out."""
        return hash_json(_shape(self.parameters))


async def resolve(context: Context, message: CallToolRequestParams, *, server: str) -> ResolvedTool:
    """Return what the call would run if it ran now; `server` names the called server in the record.

    Raises:
        NotFoundError: There is no such tool, or the caller may not see it.
        ToolError: What would run cannot be determined in advance.
    """
    try:
        message = message.model_copy(deep=True)
        arguments = deepcopy(message.arguments or {})
    except RecursionError:
        raise ToolError(_TOO_DEEP) from None
    if arguments.keys() & RESERVED:
        raise ToolError(_RESERVED_NAME)
    # Names and versions are for FastMCP to interpret: the lookups are its own, in the order of `FastMCP.call_tool`.
    asked, at = message.name, context.fastmcp
    tool = await _look_up(at, asked, _requested_version(message))
    hops = [Hop(at, asked, tool)]
    while True:
        if tool.task_config.mode == "required" or (
            tool.task_config.supports_tasks() and context.client_extension_settings(TASKS_EXTENSION_ID) is not None
        ):
            raise ToolError(_TASK)
        if isinstance(tool, TransformedTool) and is_alias(tool):
            arguments = _parent_arguments(tool, arguments)
            tool = tool.parent_tool
        elif isinstance(tool, FastMCPProviderTool):
            # No public name of FastMCP leads from such a tool to its server.
            at, asked = tool._server, str(tool.get_span_attributes()["fastmcp.delegate.original_name"])
            async with Context(fastmcp=at):
                tool = await _look_up(at, asked, VersionSpec(eq=tool.version) if tool.version else None)
            pin_lookups(at)
            hops.append(Hop(at, asked, tool))
        else:
            break
    version = tool.version
    if isinstance(tool, ProxyTool):
        # A proxy passes the `_meta` of the request on, so the server behind it chooses the version.
        meta = context.request_context.meta if context.request_context else None
        version = extract_version_spec(meta) or version
    name = await own_name(at, tool, asked)
    label = require_own_server_name(context.fastmcp, at, server)
    await require_seen_calls(context.fastmcp, at, tool)
    arguments.update(_inputs(context), **({VERSION: version} if version is not None else {}))
    call = ToolCall(server=label, tool=name, arguments=arguments)
    return ResolvedTool(call, tuple(hops), _code(tool), tool.parameters, message)


def _shape(schema: Any, *, holds_names: bool = False) -> Any:
    """Return a JSON schema without its words for readers, which may change with each lookup."""
    if isinstance(schema, list):
        return [_shape(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    shape = {}
    for name, each in schema.items():
        if holds_names:
            shape[name] = _shape(each)
        elif name in _VALUES:
            shape[name] = each
        elif name not in _WORDS:
            shape[name] = _shape(each, holds_names=name in _NAMES)
    return shape


def _requested_version(message: CallToolRequestParams) -> VersionSpec | None:
    ours = (message.meta or {}).get("fastmcp")
    version = ours.get("version") if isinstance(ours, Mapping) else None
    if isinstance(version, Mapping):
        return VersionSpec(**version)
    return VersionSpec(eq=version) if version else None


async def _look_up(server: FastMCP[Any], name: str, version: VersionSpec | None) -> Tool:
    tool = await server.get_tool(name, version)
    hashed = parse_hashed_backend_name(name) if tool is None else None
    if hashed is not None:
        tool = await server.get_tool_by_hash(*hashed)
    if tool is None:
        raise NotFoundError(f"Unknown tool: {name!r}")
    return tool


def _parent_arguments(tool: TransformedTool, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments as the parent receives them. Defaults of the parent itself are left to it."""
    if not arguments.keys() <= tool.parameters.get("properties", {}).keys():
        raise ToolError(_UNKNOWN_ARGUMENT)
    names, values = {}, {}
    for name, change in (tool.transform_args or {}).items():
        if not change.hide and change.name is not NotSet and change.name is not None:
            names[change.name] = name
        if change.default is not NotSet:
            # A tool that edits what it receives edits this object, so it must not be what it is compared with.
            values[name] = deepcopy(change.default)
    return values | {names.get(name, name): value for name, value in arguments.items()}


def _inputs(context: Context) -> dict[str, Any]:
    """Return what the client answered to the tool."""
    # As the tool reads it: from the request, not from the message, which a middleware before us may have changed.
    answers, state = context.input_responses, context.request_state
    inputs: dict[str, Any] = {} if state is None else {REQUEST_STATE: state}
    if answers is not None:
        inputs[INPUT_RESPONSES] = {
            name: answer.model_dump(mode="json", by_alias=True) for name, answer in answers.items()
        }
    return inputs


def _code(tool: Tool) -> object:
    # Providers may build a tool, closure included, for each lookup; only the code stays the same.
    function = getattr(tool, "fn", None)
    return type(tool), getattr(function, "__code__", type(function)), tool.parameters


def is_alias(tool: TransformedTool) -> bool:
    """Return False if it adds code, which makes it a tool of its own."""
    has_factory = any(change.default_factory is not NotSet for change in (tool.transform_args or {}).values())
    return tool.fn is tool.forwarding_fn and not has_factory


def require_own_server_name(root: FastMCP[Any], server: FastMCP[Any], root_name: str) -> str:
    """Return the name of `server`, which is `root` (`root_name`) or mounted below it and no namesake of another."""
    name = root_name if server is root else server.name
    namesakes = {id(other) for other in _servers(root, set()) if (root_name if other is root else other.name) == name}
    if namesakes - {id(server)}:
        raise ToolError(_TWO_SERVERS)
    # As `FastMCP.generate_name` makes them. Nothing marks such a name.
    if name == server.name and re.fullmatch(rf"{re.escape(type(server).__name__)}-[0-9a-f]{{4}}", name):
        _warn_of_random_name(name)
    return name


@lru_cache(_WARNED)
def _warn_of_random_name(name: str) -> None:
    _logger.warning(
        "The FastMCP server %s has a name that FastMCP made up, another one in each process: an approval of its tools "
        "releases nothing after a restart or in another worker. Name the server: FastMCP(name), create_proxy(..., "
        "name=name).",
        name,
    )


async def own_name(server: FastMCP[Any], tool: Tool, asked: str) -> str:
    """Return the name under which `tool` was registered, before any namespace; no other of its version may have it."""
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
    """Refuse a tool that calls others of a mounted server by name, as search transforms add: `root` does not see it."""
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
