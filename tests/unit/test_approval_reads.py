"""What a reader is given is no older than it may be: by a shared read, and by a copy outside SQL."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import uuid4

import pytest

from agent_gateway_store import ApprovalResult, ApprovalScope, ApprovalStatus, clock
from agent_gateway_store.approval.cache import ApprovalSnapshot
from agent_gateway_store.approval.waiting import Waiting

pytestmark = pytest.mark.unit


async def test_a_read_from_before_a_change_answers_nobody_after_it() -> None:
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


@pytest.mark.parametrize(
    ("status", "is_fresh"), [("PENDING", False), ("APPROVED", True), ("EXPIRED", True)], ids=lambda value: str(value)
)
def test_a_copy_is_not_believed_past_the_deadline_of_its_status(status: str, is_fresh: bool) -> None:
    """A decision has one deadline, the use another, later one; a final status has none."""
    now = clock.utc_now()
    snapshot = ApprovalSnapshot(
        approval_id=uuid4(),
        org_id="default",
        status=ApprovalStatus(status),
        scope=ApprovalScope.EXECUTION,
        approver_id=None,
        approver_note="",
        decision_at=None,
        expires_at=now - timedelta(seconds=1),
        use_before=now + timedelta(hours=1),
        token_sha256="0" * 64,
        read_at=now - timedelta(seconds=2),
        life_ms=3_600_000,
    )

    assert snapshot.is_fresh(3_598_000, trust_s=60) is is_fresh
