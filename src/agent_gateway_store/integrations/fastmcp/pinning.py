"""The tool that was judged is the tool that runs, whatever is registered under its name meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from fastmcp.exceptions import ToolError
from fastmcp.server.middleware.tool_injection import ToolInjectionMiddleware
from fastmcp.tools import Tool

_CHANGED = "Another middleware changed the call after it was judged, so it was not run: tell the operator."


class CallChangedError(ToolError):
    """Another call was about to run than was judged."""


@dataclass
class _Pin:
    name: str
    tool: Tool
    is_active: bool = True
    was_found: bool = False


_pin: ContextVar[_Pin | None] = ContextVar("agent_gateway_store_fastmcp_pin", default=None)


@contextmanager
def pinned(name: str, tool: Tool) -> Iterator[None]:
    """Let the server's lookup of `name` return `tool`, for one run."""
    pin = _Pin(name, tool)
    before = _pin.set(pin)
    try:
        yield
    finally:
        # A task that the tool left behind has a copy of the context, and must not find the pin in it.
        pin.is_active = False
        _pin.reset(before)


@contextmanager
def unpinned() -> Iterator[None]:
    """Let lookups find what is registered, also where a tool calls another one."""
    before = _pin.set(None)
    try:
        yield
    finally:
        _pin.reset(before)


class PinningMiddleware(ToolInjectionMiddleware):
    """Makes the server's lookup of a name return the tool that was judged."""

    # Injected tools are the one public way to tell FastMCP which object a name stands for.
    def __init__(self) -> None:
        super().__init__([])

    def get_injected_tool(self, name: str) -> Tool | None:
        """Return the pinned tool.

        Raises:
            CallChangedError: The first lookup after the call was judged is for another name.
        """
        pin = _pin.get()
        if pin is None or not pin.is_active:
            return None
        if pin.name == name:
            pin.was_found = True
            return pin.tool
        if not pin.was_found:
            raise CallChangedError(_CHANGED)
        return None
