"""Tasks that read the same approval share a read, and never one that began before a change."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest

from agent_gateway_store import ApprovalResult, ApprovalStatus
from agent_gateway_store.approval.waiting import Waiting

pytestmark = pytest.mark.unit


async def test_a_read_from_before_a_change_answers_nobody_after_it() -> None:
    """Whoever came before is answered by it, as if the change had come a moment later."""
    waiting, gate = Waiting(None, trust_s=60), asyncio.Event()

    async def read(status: ApprovalStatus) -> ApprovalResult:
        await gate.wait()
        return ApprovalResult(approval_id=uuid4(), status=status)

    async def begin(status: ApprovalStatus) -> asyncio.Task[ApprovalResult]:
        task = asyncio.create_task(waiting.read(None, "token", lambda: read(status)))
        await asyncio.sleep(0)
        return task

    before = [await begin(ApprovalStatus.PENDING), await begin(ApprovalStatus.CANCELLED)]
    waiting.note_change()
    after = await begin(ApprovalStatus.APPROVED)
    gate.set()

    assert [result.status for result in await asyncio.gather(*before, after)] == ["PENDING", "PENDING", "APPROVED"]
