"""The tool that was judged is the tool that runs, whatever is registered under its name meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastmcp import FastMCP
from fastmcp.exceptions import ToolError
from fastmcp.server.dependencies import get_server
from fastmcp.server.middleware import CallNext, MiddlewareContext
from fastmcp.server.middleware.tool_injection import ToolInjectionMiddleware
from fastmcp.tools import Tool, ToolResult
from mcp_types import CallToolRequestParams

_CHANGED = "Another middleware changed the call after it was judged, so it was not run: tell the operator."
_REPEATED = (
    "The call ran, and a middleware of a mounted server began it again, which one approval does not release, so it was "
    "not run again: tell the operator."
)


class CallChangedError(ToolError):
    """Another call was about to run than was judged."""


@dataclass
class Hop:
    """One lookup of `tool` by `name`, in the server that was called or in one mounted below it."""

    server: FastMCP[Any]
    name: str
    tool: Tool
    was_passed: bool = False
    was_found: bool = False
    has_ended: bool = False


class Pins:
    """The lookups of one run; `once`: no middleware of a mounted server may begin it again once the tool has begun."""

    def __init__(self, hops: Sequence[Hop], *, once: bool) -> None:
        self._hops = {id(hop.server): hop for hop in hops}
        self._once, self.is_active = once, True

    @property
    def has_begun(self) -> bool:
        """True once the last tool was found, which then runs."""
        return all(hop.was_found for hop in self._hops.values())

    @property
    def is_over(self) -> bool:
        """True once nothing may begin it again."""
        return self._once and self.has_begun

    def at(self, server: FastMCP[Any]) -> Hop | None:
        """Return the lookup in `server` while the run lasts."""
        return self._hops.get(id(server)) if self.is_active else None


_pins: ContextVar[Pins | None] = ContextVar("agent_gateway_store_fastmcp_pins", default=None)


@contextmanager
def pinned(hops: Sequence[Hop], *, once: bool) -> Iterator[Pins]:
    """Let the lookups of `hops` return their tools, for one run; `once` as for `Pins`."""
    pins = Pins([Hop(hop.server, hop.name, hop.tool) for hop in hops], once=once)
    before = _pins.set(pins)
    try:
        yield pins
    finally:
        # A task that the tool left behind has a copy of the context, and must not find the pins in it.
        pins.is_active = False
        _pins.reset(before)


@contextmanager
def unpinned() -> Iterator[None]:
    """Let lookups find what is registered, also where a tool calls another one."""
    before = _pins.set(None)
    try:
        yield
    finally:
        _pins.reset(before)


class PinningMiddleware(ToolInjectionMiddleware):
    """Makes a server's lookup of a name return the tool that was judged.

    Attributes:
        judges_calls: False for one that a mounted server was given for this purpose alone.
    """

    judges_calls = False

    # Injected tools are the one public way to tell FastMCP which object a name stands for.
    def __init__(self) -> None:
        super().__init__([])

    async def on_call_tool(
        self,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        """Let the judged call pass to its tool, once if a human approved it; its own calls find what is registered."""
        pins = _pins.get()
        hop = pins.at(get_server()) if pins is not None else None
        if pins is not None and hop is not None and hop.has_ended and pins.is_over and context.message.name == hop.name:
            raise CallChangedError(_REPEATED)
        if hop is None or hop.was_passed:
            with unpinned():
                return await call_next(context)
        hop.was_passed = True
        try:
            return await call_next(context)
        finally:
            hop.has_ended = True

    def get_injected_tool(self, name: str) -> Tool | None:
        """Return the pinned tool; CallChangedError if the first lookup after the call was judged has another name."""
        pins = _pins.get()
        hop = pins.at(get_server()) if pins is not None else None
        if hop is None:
            return None
        if hop.name == name:
            hop.was_found = True
            return hop.tool
        if not hop.was_found:
            raise CallChangedError(_CHANGED)
        return None


def pin_lookups(server: FastMCP[Any]) -> None:
    """Let `server`, which is mounted somewhere, find what is pinned. What it lists and runs otherwise is the same."""
    if not any(isinstance(middleware, PinningMiddleware) for middleware in server.middleware):
        server.add_middleware(PinningMiddleware())
