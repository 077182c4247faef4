"""Several approvers: distinct voices, counted; one denial ends it."""

from __future__ import annotations

import pytest
from contract_helpers import CALL, RecordingNotifier, column, make_request

from agent_gateway_store import GatewayStore, errors

pytestmark = pytest.mark.integration


async def test_last_voice_decides(store: GatewayStore) -> None:
    """With three required, two leave it pending and the third approves it."""
    token = await store.approvals.issue_token(make_request(required_approvals=3))

    results = [await store.approvals.approve(token, f"approver-{number}", f"n{number}") for number in range(3)]

    assert [result.status for result in results] == ["PENDING", "PENDING", "APPROVED"]
    assert [result.approver_id for result in results] == [None, None, "approver-2"]
    assert [result.note for result in results] == ["", "", "n2"]
    assert await column(store, "approver_id", "approval_votes") == ["approver-0", "approver-1", "approver-2"]
    assert (await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)).status == "USED"


async def test_voice_counts_once(store: GatewayStore) -> None:
    """Who has voted may not vote again, neither way, and the approval still waits for others."""
    token = await store.approvals.issue_token(make_request(required_approvals=2))
    await store.approvals.approve(token, "approver-1", channel="slack")
    before = await store.approvals.list_requests()

    for vote in (store.approvals.approve, store.approvals.deny):
        with pytest.raises(errors.ApprovalAlreadyVotedError, match="approver-1 has already voted") as caught:
            await vote(token, "approver-1")
        assert (caught.value.status, caught.value.approver_id, caught.value.decided_at) == ("PENDING", None, None)
        assert caught.value.approval_id == before[0].approval_id

    after = await store.approvals.list_requests()
    assert (after[0].status, after[0].version) == ("PENDING", before[0].version)
    assert await column(store, "channel", "approval_votes") == ["slack"]
    assert (await store.approvals.approve(token, "approver-2")).status == "APPROVED"


async def test_one_denial_ends_it(store: GatewayStore) -> None:
    """A denial after an approval decides; a later voice learns of it and is not counted."""
    token = await store.approvals.issue_token(make_request(required_approvals=3))
    await store.approvals.approve(token, "approver-1")

    assert (await store.approvals.deny(token, "approver-2", "no")).status == "DENIED"
    with pytest.raises(errors.ApprovalAlreadyDecidedError, match="DENIED by approver-2"):
        await store.approvals.approve(token, "approver-3")
    assert await column(store, "decision", "approval_votes") == ["APPROVED", "DENIED"]


async def test_voter_may_cancel(store: GatewayStore) -> None:
    """Who approved may withdraw it later; the vote stays as it was cast."""
    token = await store.approvals.issue_token(make_request(required_approvals=2))
    await store.approvals.approve(token, "approver-1")

    assert (await store.approvals.cancel(token, "approver-1")).status == "CANCELLED"
    assert await column(store, "decision", "approval_votes") == ["APPROVED"]


async def test_caller_is_no_voice(store: GatewayStore) -> None:
    """The caller's approval counts for nothing."""
    token = await store.approvals.issue_token(make_request(required_approvals=2))

    with pytest.raises(errors.SelfApprovalError):
        await store.approvals.approve(token, "dev-agent")
    assert await column(store, "approver_id", "approval_votes") == []


async def test_notifiers_hear_of_the_decision_only(database_url: str, redis_setting: str) -> None:
    """A voice that leaves the approval pending is no decision."""
    recorder = RecordingNotifier()
    async with GatewayStore(database_url, redis_url=redis_setting, plugins=[recorder]) as store:
        token = await store.approvals.issue_token(make_request(required_approvals=2))
        await store.approvals.approve(token, "approver-1")
        await store.approvals.approve(token, "approver-2")

    assert recorder.seen == [("decision", "APPROVED"), ("pending", "PENDING")]
