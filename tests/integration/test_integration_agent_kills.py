"""Agents that are killed while a human decides, and go on in another process."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from agent_gateway_store import ApprovalStatus, GatewayStore
from commands import python_path
from forks import forks
from integration.agent_process import FRAMEWORKS, PATHS

pytestmark = pytest.mark.system

TESTS = Path(__file__).parents[1]
LOADED = {
    "pydantic_ai": ["pydantic_ai.models.function", "agent_gateway_store.integrations.pydantic_ai"],
    "openai_agents": ["agents.testing", "agent_gateway_store.integrations.openai_agents"],
    "langchain": [
        "langchain.agents.middleware",
        "langgraph.checkpoint.sqlite.aio",
        "agent_gateway_store.integrations.langchain",
    ],
}
"""What the processes share by framework; the other frameworks are langchain's."""


async def run(framework: str, url: str, verb: str, folder: Path, *, is_killed: bool = False) -> str:
    """Run one process until it says where it stands; kill it by SIGKILL then, or let it end."""
    environment = {**os.environ, "PYTHONPATH": python_path(TESTS), "AGENT_GATEWAY_STORE_LOAD_PLUGINS": ""}
    arguments = ["-m", "integration.agent_process", framework, url, verb]
    load = LOADED.get(framework, LOADED["langchain"])
    process = await forks(is_large=True).begin(arguments, folder, environment, load=load)
    try:
        async with asyncio.timeout(60):
            said = (await process.stdout.readline()).decode().strip()
            if is_killed:
                process.kill()
            assert await process.wait() == (-signal.SIGKILL if is_killed else 0)
    finally:
        process.kill()
        await process.wait()
    return said


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_a_killed_agent_goes_on_in_another_process(framework: str, tmp_path: Path) -> None:
    """Killed while two calls wait; one approval too few releases nothing; then each runs once, with one event."""
    url = f"sqlite:///{tmp_path}/gateway.db"
    assert await run(framework, url, "begin", tmp_path, is_killed=True) == "pending"
    async with GatewayStore(url, redis_url="") as store:
        asked = await store.approvals.list_requests(ApprovalStatus.PENDING)
        assert len(asked) == len(PATHS)
        first, second = asked
        await store.approvals.approve(approval_id=first.approval_id, approver_id="alice")
        if framework != "openai_agents":  # which uses up what is approved, and runs it when its state is run
            assert await run(framework, url, "resume", tmp_path) == "pending"
            assert (await store.approvals.get(approval_id=first.approval_id)).status == ApprovalStatus.APPROVED
        await store.approvals.approve(approval_id=second.approval_id, approver_id="alice")

        assert await run(framework, url, "resume", tmp_path) == "done"

        assert sorted((tmp_path / "ran").read_text().split()) == sorted(PATHS)
        for request in asked:
            events = await store.audit.search(approval_id=request.approval_id)
            assert [event.execution_status for event in events] == ["SUCCESS"]
            used = await store.approvals.get(approval_id=request.approval_id)
            assert (used.status, used.outcome) == (ApprovalStatus.USED, "SUCCESS")
        assert len(await store.audit.list_recent()) == 2 * len(PATHS)
