"""Deadlines of approvals, judged by the database clock: `expires_at` ends the wait, `use_before` the permission."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import pytest
from contract_helpers import EACH, approved, column
from delivery_helpers import settled
from pydantic import ValidationError

from agent_gateway_store import ApprovalRequest, GatewayStore, StoreSettings, clock, errors
from agent_gateway_store.testing import RecordingNotifier
from builders import CALL, make_request

MILLION_DAYS = timedelta(days=1_000_000)
SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)


async def the_only(store: GatewayStore) -> ApprovalRequest:
    """Return the one approval there is."""
    (row,) = await store.approvals.list_requests()
    return row


@EACH
async def test_default_deadline_is_the_setting(database_url: str, redis_setting: str) -> None:
    """Without `expires_at` an approval waits APPROVAL_TOKEN_TTL_SECONDS from its creation, and no longer."""
    settings = StoreSettings(approval_token_ttl_seconds=90)
    async with GatewayStore(database_url, redis_url=redis_setting, settings=settings) as store:
        token = await store.approvals.issue_token(make_request())
        row = await the_only(store)
        clock.move(80 * SECOND)
        before = await store.approvals.check_token(token)
        clock.move(11 * SECOND)
        after = await store.approvals.check_token(token)

    assert row.expires_at is not None
    assert abs(row.expires_at - row.created_at - 90 * SECOND) < SECOND
    assert (before.status, after.status) == ("PENDING", "EXPIRED")
    assert after.expires_at == row.expires_at


@EACH
async def test_nothing_is_decided_after_the_deadline(store: GatewayStore) -> None:
    """After `expires_at` the status reads EXPIRED and no decision is taken, although no sweep has run."""
    token = await store.approvals.issue_token(make_request(expires_at=clock.utc_now() + HOUR))
    clock.move(HOUR)

    for decide in (store.approvals.approve, store.approvals.deny, store.approvals.cancel):
        with pytest.raises(errors.ApprovalExpiredError, match=r"has expired at .* UTC: ask for a new one") as caught:
            await decide(token, "approver-1")
        assert (caught.value.status, caught.value.approver_id) == ("EXPIRED", None)
        assert caught.value.approval_id is not None
    with pytest.raises(errors.ApprovalExpiredError):
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    for fresh in (False, True):
        assert (await store.approvals.check_token(token, fresh=fresh)).status == "EXPIRED"
    assert [row.status for row in await store.approvals.list_requests("EXPIRED")] == ["EXPIRED"]
    assert await store.approvals.list_requests("PENDING") == []
    assert await column(store, "status", "approval_requests") == ["PENDING"]


async def test_deadline_is_met_to_the_second(store: GatewayStore) -> None:
    expires_at = clock.utc_now() + HOUR
    tokens = [await store.approvals.issue_token(make_request(expires_at=expires_at)) for _ in range(2)]

    clock.move(HOUR - 2 * SECOND)
    assert (await store.approvals.approve(tokens[0], "approver-1")).status == "APPROVED"
    clock.move(2 * SECOND)
    with pytest.raises(errors.ApprovalExpiredError):
        await store.approvals.approve(tokens[1], "approver-1")


@EACH
async def test_expires_at_ends_the_wait_and_use_before_the_use(store: GatewayStore) -> None:
    """`use_before` alone says until when an approved token can be used, on either side of `expires_at`, which says so
    where it is not given; a pending approval ends at `expires_at`, whatever `use_before` says."""
    now = clock.utc_now()
    alone = await approved(store, expires_at=now + MINUTE)
    pending = await store.approvals.issue_token(make_request(expires_at=now + MINUTE, use_before=now + HOUR))
    later = await approved(store, expires_at=now + MINUTE, use_before=now + HOUR)
    earlier = await approved(store, expires_at=now + HOUR, use_before=now + MINUTE)
    clock.move(2 * MINUTE)

    assert (await store.approvals.check_token(later)).status == "APPROVED"
    assert (await store.approvals.consume_token(later, caller_id="dev-agent", tool_call=CALL)).status == "USED"
    deadline = f"{now + MINUTE:%Y-%m-%d %H:%M:%S} UTC"
    for ended in (earlier, alone):
        with pytest.raises(errors.ApprovalExpiredError, match=f"has expired at {deadline}") as caught:
            await store.approvals.consume_token(ended, caller_id="dev-agent", tool_call=CALL)
        assert caught.value.approver_id == "approver-1"
    with pytest.raises(errors.ApprovalExpiredError):
        await store.approvals.approve(pending, "approver-2")
    for ended in (earlier, alone, pending):
        assert (await store.approvals.check_token(ended)).status == "EXPIRED"


@EACH
async def test_sweep_writes_what_has_expired(database_url: str, redis_setting: str) -> None:
    """`expire_stale` writes EXPIRED in batches, tells the notifiers once each, and leaves everything else alone."""
    recorder = RecordingNotifier()
    async with GatewayStore(database_url, redis_url=redis_setting, plugins=[recorder]) as store:
        now = clock.utc_now()
        for _ in range(5):
            await store.approvals.issue_token(make_request(expires_at=now + MINUTE))
        agreed = await approved(store, expires_at=now + MINUTE)
        denied = await store.approvals.issue_token(make_request(expires_at=now + MINUTE))
        await store.approvals.deny(denied, "approver-1")
        waiting = await store.approvals.issue_token(make_request(expires_at=now + HOUR))
        # A notice whose delivery is not recorded by then would be sent again: its lease ends meanwhile.
        await settled(store, 10)
        clock.move(MINUTE)

        assert await store.approvals.expire_stale(batch_size=2) == 6
        assert await store.approvals.expire_stale() == 0
        assert sorted(await column(store, "status", "approval_requests")) == ["DENIED", *["EXPIRED"] * 6, "PENDING"]
        assert (await store.approvals.check_token(agreed)).status == "EXPIRED"
        assert (await store.approvals.check_token(denied)).status == "DENIED"
        assert (await store.approvals.check_token(waiting)).status == "PENDING"
    told = [notice.status for notice in recorder.notices if notice.event == "decision"]
    assert sorted(told) == ["APPROVED", "DENIED", *["EXPIRED"] * 6]


async def test_sweeps_share_the_work(store: GatewayStore) -> None:
    for _ in range(30):
        await store.approvals.issue_token(make_request(expires_at=clock.utc_now() + MINUTE))
    clock.move(MINUTE)

    counts = await asyncio.gather(*(store.approvals.expire_stale(batch_size=4) for _ in range(4)))
    rest = await store.approvals.expire_stale()

    assert sum(counts) + rest == 30
    assert set(await column(store, "version", "approval_requests")) == {2}


@EACH
async def test_wall_clock_of_the_gateway_decides_nothing(store: GatewayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_now() -> datetime:
        return right_now() + 5 * HOUR

    right_now = clock.utc_now
    for module in ("clock", "approval.cache", "models.approval"):
        monkeypatch.setattr(f"agent_gateway_store.{module}.utc_now", wrong_now)
    token = await approved(store)

    assert (await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)).status == "USED"
    row = await the_only(store)
    assert abs(row.created_at - right_now()) < MINUTE
    assert row.expires_at is not None
    assert abs(row.expires_at - right_now() - HOUR) < MINUTE


@EACH
async def test_an_approval_waits_as_long_as_the_longest_setting_and_no_longer_one_is_taken(
    database_url: str, redis_setting: str
) -> None:
    longest_s = MILLION_DAYS.total_seconds()
    with pytest.raises(ValidationError, match="approval_token_ttl_seconds"):
        StoreSettings(approval_token_ttl_seconds=longest_s + 1)
    settings = StoreSettings(approval_token_ttl_seconds=longest_s)
    async with GatewayStore(database_url, redis_url=redis_setting, settings=settings) as store:
        token = await store.approvals.issue_token(make_request())
        [listed] = await store.approvals.list_requests()

        assert (await store.approvals.check_token(token)).expires_at == listed.expires_at
        assert listed.expires_at is not None
        assert listed.expires_at - listed.created_at > MILLION_DAYS - timedelta(seconds=1)
