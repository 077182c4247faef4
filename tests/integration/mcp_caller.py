"""Calls of one tool by a client; `python mcp_caller.py fastmcp|sdk URL_OR_COMMAND TOOL ARGUMENTS` makes one."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any


async def fastmcp(target: list[str], tool: str, arguments: dict[str, Any], times: int) -> list[Any]:
    from fastmcp import Client
    from fastmcp.client.transports import StdioTransport

    transport: Any = (
        target[0] if len(target) == 1 else StdioTransport(target[0], target[1:], env=dict(os.environ), keep_alive=False)
    )
    async with Client(transport) as client:
        return [await client.call_tool(tool, arguments, raise_on_error=False) for _ in range(times)]


async def sdk(target: list[str], tool: str, arguments: dict[str, Any], times: int) -> list[Any]:
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client
    from mcp.client.streamable_http import streamable_http_client

    if len(target) == 1:
        transport: Any = streamable_http_client(target[0])
    else:
        transport = stdio_client(StdioServerParameters(command=target[0], args=target[1:], env=dict(os.environ)))
    async with transport as streams, ClientSession(streams[0], streams[1]) as session:
        await session.initialize()
        return [await session.call_tool(tool, arguments) for _ in range(times)]


CLIENTS = {"fastmcp": fastmcp, "sdk": sdk}


async def answers(client: str, target: list[str], tool: str, arguments: dict[str, Any], times: int) -> list[Any]:
    """Call so often over one connection; return of each answer whether it is an error, and its text."""
    results = await CLIENTS[client](target, tool, arguments, times)
    return [(bool(each.is_error), "".join(getattr(part, "text", "") for part in each.content)) for each in results]


if __name__ == "__main__":
    asyncio.run(answers(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]), 1))
