"""What tests of the agent frameworks share: a caller, a policy, a store in a file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_gateway_store import (
    ApprovalRequest,
    AuditEvent,
    CallerIdentity,
    Decision,
    GatewayStore,
    ToolCall,
    TrustLevel,
)
from agent_gateway_store.integrations.guard import Verdict

CALLER = CallerIdentity(caller_id="a", role="r", trust_level=TrustLevel.LOW, environment="test")


def judge(_caller: CallerIdentity, call: ToolCall) -> Verdict:
    """Only what is named `free` needs no human."""
    decision = Decision.ALLOW if call.tool.startswith("free") else Decision.APPROVAL_REQUIRED
    return Verdict(decision=decision, rule="r", reason="why")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[GatewayStore]:
    """An open one."""
    async with GatewayStore(f"sqlite:///{tmp_path}/gateway.db", redis_url="") as opened:
        yield opened


async def approve(store: GatewayStore) -> list[ApprovalRequest]:
    """Approve whatever waits, and return it."""
    asked = await store.approvals.list_requests("PENDING")
    for each in asked:
        await store.approvals.approve(approval_id=each.approval_id, approver_id="alice")
    return list(asked)


async def events(store: GatewayStore) -> list[AuditEvent]:
    """Oldest first."""
    return list(reversed(await store.audit.list_recent()))
