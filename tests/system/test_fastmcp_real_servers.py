"""Servers from PyPI behind the middleware, and real clients that are killed while a human decides."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import servers
from agent_gateway_store import ApprovalRequest, ApprovalStatus, GatewayStore, clock
from integration.mcp_caller import answers

pytestmark = pytest.mark.system

HERE = Path(__file__).parents[1] / "integration"
LATER = timedelta(hours=5)


@asynccontextmanager
async def started(*arguments: str, folder: Path, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start a program of this folder; whatever is left of it is killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(HERE / arguments[0]),
        *arguments[1:],
        cwd=folder,
        env={**os.environ, "AGENT_GATEWAY_STORE_LOAD_PLUGINS": "", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def pending(store: GatewayStore) -> ApprovalRequest:
    async with asyncio.timeout(60):
        while not (found := await store.approvals.list_requests(ApprovalStatus.PENDING)):
            await asyncio.sleep(0.05)
    return found[0]


@asynccontextmanager
async def gateway(transport: str, command: list[str], folder: Path, **environment: str) -> AsyncIterator[list[str]]:
    """Yield how a client reaches the proxy: a URL, or the command that starts it."""
    if transport == "stdio":
        yield [sys.executable, str(HERE / "gateway_proxy.py"), "stdio", *command]
        return
    port = servers.free_port()
    async with started("gateway_proxy.py", str(port), *command, folder=folder, **environment):
        async with asyncio.timeout(60):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    break
                except OSError:
                    await asyncio.sleep(0.05)
        writer.close()
        yield [f"http://127.0.0.1:{port}/mcp"]


@pytest.mark.parametrize(
    ("client", "transport", "server"),
    [
        ("fastmcp", "stdio", "git"),
        ("fastmcp", "http", "time"),
        ("sdk", "stdio", "time"),
        ("sdk", "http", "git"),
    ],
)
async def test_a_killed_client_comes_back_hours_later(
    client: str, transport: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that is approved meanwhile runs once, on the real server; again, it is asked for again."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    arguments: dict[str, Any] = {"timezone": "Europe/Paris"}
    command, tool, expected = ["mcp_server_time"], "get_current_time", "Europe/Paris"
    if server == "git":
        arguments = {"repo_path": str(tmp_path)}
        command, tool, expected = ["mcp_server_git", "--repository", str(tmp_path)], "git_status", "No commits yet"
    url = f"sqlite+aiosqlite:///{tmp_path}/gateway.db"
    environment = {"DATABASE_URL": url, "WAIT_S": "60", "CLOCK_HOURS": "0"}
    async with GatewayStore(url, redis_url="") as store:
        async with gateway(transport, command, tmp_path, **environment) as target:
            call = ("mcp_caller.py", client, json.dumps(target), tool, json.dumps(arguments))
            async with started(*call, folder=tmp_path, **environment) as process:
                asked = await pending(store)
                process.kill()

        clock.move(LATER)
        await store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
        environment |= {"WAIT_S": "0", "CLOCK_HOURS": str(LATER.total_seconds() / 3600)}
        async with gateway(transport, command, tmp_path, **environment) as target:
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            async with asyncio.timeout(120):
                said = await answers(client, target, tool, arguments, times=2)

        assert [is_error for is_error, _ in said] == [False, True]
        assert expected in said[0][1]
        assert "call again with the same arguments" in said[1][1]
        (event,) = await store.audit.search(approval_id=asked.approval_id)
        assert (event.mcp_server, event.tool_name, event.execution_status) == (command[0], tool, "SUCCESS")
        used = await store.approvals.get(approval_id=asked.approval_id)
        assert (used.status, used.outcome) == (ApprovalStatus.USED, "SUCCESS")
