"""`approvals.acquire`: whether this very run of a call may go, asked before each run."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import redis.asyncio
from contract_helpers import EACH, WITH_REDIS, column, seen, topics, until

from agent_gateway_store import (
    ApprovalResult,
    ApprovalScope,
    GatewayStore,
    StoreSettings,
    ToolCall,
    clock,
    errors,
)
from agent_gateway_store.approval import acquiring
from agent_gateway_store.testing import RecordingNotifier
from builders import CALL, make_request
from cases import cases

OTHER_CALL = CALL.model_copy(update={"arguments": {"path": "/tmp/other.txt"}})
HOUR = timedelta(hours=1)


async def acquire(store: GatewayStore, *, bind: str = "", wait_s: float = 0.0, **fields: Any) -> ApprovalResult:
    """Acquire the one call; `fields` are those of the request."""
    return await store.approvals.acquire(make_request(**fields), bind=bind, wait_s=wait_s)


async def approve(store: GatewayStore, asked: ApprovalResult, approver_id: str = "approver-1") -> ApprovalResult:
    return await store.approvals.approve(approval_id=asked.approval_id, approver_id=approver_id)


@EACH
async def test_a_call_is_asked_once_and_runs_once(store: GatewayStore, other: GatewayStore) -> None:
    """PENDING for everybody until the decision; then one run, and the next one is asked anew."""
    asked = await acquire(store)
    again = await acquire(other, request_id="another")
    assert (asked.status, asked.token, again) == ("PENDING", None, asked)
    assert await acquire(store, wait_s=0.05) == asked
    await approve(other, asked)

    used = await acquire(store)
    assert (used.status, used.approval_id, used.approver_id) == ("USED", asked.approval_id, "approver-1")
    await store.approvals.record_outcome(approval_id=used.approval_id, outcome="SUCCESS")
    following = await acquire(other)
    assert (following.status, following.approval_id != asked.approval_id) == ("PENDING", True)
    assert (await store.approvals.get(approval_id=following.approval_id)).risk_explanation == "deletes a file"


async def test_one_of_many_callers_uses_an_approval(store: GatewayStore, other: GatewayStore) -> None:
    """Forty at once in two stores: one runs, and the others share the one approval that is asked next."""
    asked = await acquire(store)
    await approve(store, asked)

    results = await asyncio.gather(*(acquire((store, other)[number % 2]) for number in range(40)))
    assert Counter(str(result.status) for result in results) == {"USED": 1, "PENDING": 39}
    assert len({result.approval_id for result in results}) == 2


@cases(
    "difference",
    [{"caller_id": "other-agent"}, {"org_id": "acme"}, {"tool_call": OTHER_CALL}, {"bind": "session-2"}],
)
async def test_another_call_is_not_released(store: GatewayStore, difference: dict[str, Any]) -> None:
    asked = await acquire(store)
    await approve(store, asked)

    assert (await acquire(store, **difference)).status == "PENDING"
    assert (await acquire(store)).status == "USED"


@pytest.mark.parametrize("pair", [("a\0", "a\u2400"), ("\ud800", "\udfff")], ids=ascii)
async def test_what_is_bound_to_is_compared_as_it_is(store: GatewayStore, pair: tuple[str, str]) -> None:
    await approve(store, await acquire(store, bind=pair[0]))

    assert (await acquire(store, bind=pair[1])).status == "PENDING"
    assert (await acquire(store, bind=pair[0])).status == "USED"


async def test_the_shown_call_may_hide_what_the_run_call_tells(store: GatewayStore) -> None:
    """The permission binds to the call as it runs; another one that is shown alike is another call."""
    shown = CALL.model_copy(update={"arguments": {"path": "[hidden]"}})

    async def run(call: ToolCall) -> ApprovalResult:
        return await store.approvals.acquire(make_request(tool_call=shown), call=call)

    await approve(store, await run(CALL))
    assert [str((await run(call)).status) for call in (OTHER_CALL, CALL)] == ["PENDING", "USED"]


@EACH
async def test_tokens_and_acquired_approvals_do_not_meet(store: GatewayStore) -> None:
    """What was asked by token releases no `acquire`, and the other way round, for the same request id."""
    token = await store.approvals.issue_token(make_request(request_id="r-1"))
    asked = await acquire(store, request_id="r-1")
    await store.approvals.approve(token, "approver-1")
    assert (await acquire(store, request_id="r-1")) == asked

    await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    for _ in range(2):
        await store.approvals.issue_token(make_request(request_id="r-1"))
    assert (await acquire(store)).approval_id == asked.approval_id


async def test_a_denial_answers_for_a_while(store: GatewayStore) -> None:
    """Asked again within APPROVAL_DENIAL_SECONDS the call is denied without a question; afterwards it is asked anew."""
    asked = await acquire(store)
    await store.approvals.deny(approval_id=asked.approval_id, approver_id="approver-1", note="not today")

    denied = await acquire(store)
    assert (denied.status, denied.approval_id, denied.note) == ("DENIED", asked.approval_id, "not today")
    assert (await acquire(store, tool_call=OTHER_CALL)).status == "PENDING"
    clock.move(timedelta(seconds=299))
    assert (await acquire(store, required_approvals=2)).status == "DENIED"
    clock.move(timedelta(seconds=2))
    assert (await acquire(store)).status == "PENDING"


@pytest.mark.parametrize(
    "terms",
    [{"required_approvals": 2}, {"tool_call": CALL}],
    ids=["a higher quorum", "another shown call"],
)
@pytest.mark.parametrize("is_approved", [False, True], ids=["pending", "approved"])
async def test_other_terms_cancel_what_stands(store: GatewayStore, terms: dict[str, Any], is_approved: bool) -> None:
    """No vote for other terms releases the call; what stood is cancelled, an approved one too."""
    shown = CALL.model_copy(update={"arguments": {"path": "[hidden]"}})
    recorder = RecordingNotifier()
    asked = await store.approvals.acquire(make_request(tool_call=shown), call=CALL)
    if is_approved:
        await approve(store, asked)

    anew = await store.approvals.acquire(make_request(**({"tool_call": shown} | terms)), call=CALL)
    assert (anew.status, anew.approval_id != asked.approval_id) == ("PENDING", True)
    assert (await store.approvals.get(approval_id=asked.approval_id)).status == "CANCELLED"
    assert recorder.notices == []


async def test_lower_quorums_later_deadlines_and_other_words_change_nothing(store: GatewayStore) -> None:
    asked = await acquire(store, required_approvals=2)
    later = clock.utc_now() + 30 * HOUR
    again = await acquire(store, required_approvals=1, expires_at=later, risk_explanation="harmless")
    assert again == asked
    await approve(store, asked, "ann")
    assert (await acquire(store)).status == "PENDING"
    await approve(store, asked, "bob")
    assert (await acquire(store)).status == "USED"


async def test_a_day_to_decide_and_an_hour_to_use(store: GatewayStore) -> None:
    """Without `expires_at`: ACQUIRE_DECISION_SECONDS, then APPROVAL_TOKEN_TTL_SECONDS from the decision."""
    asked = await acquire(store)
    clock.move(23 * HOUR)
    await approve(store, asked)
    clock.move(HOUR - timedelta(minutes=1))
    found = await store.approvals.get(approval_id=asked.approval_id)
    assert (found.status, found.use_before is not None) == ("APPROVED", True)
    clock.move(timedelta(minutes=2))
    assert (await store.approvals.get(approval_id=asked.approval_id)).status == "EXPIRED"

    anew = await acquire(store)
    assert (anew.status, anew.approval_id != asked.approval_id) == ("PENDING", True)
    assert await column(store, "status", "approval_requests") == ["EXPIRED", "PENDING"]
    clock.move(24 * HOUR)
    with pytest.raises(errors.ApprovalExpiredError):
        await approve(store, anew)


async def test_given_deadlines_stand(store: GatewayStore) -> None:
    now = clock.utc_now()
    first = await acquire(store, expires_at=now + 2 * HOUR)
    second = await acquire(store, tool_call=OTHER_CALL, expires_at=now + HOUR, use_before=now + 9 * HOUR)
    for asked in (first, second):
        await approve(store, asked)
    clock.move(3 * HOUR)
    assert (await acquire(store)).status == "PENDING"
    assert (await acquire(store, tool_call=OTHER_CALL)).status == "USED"


async def test_a_use_of_unknown_outcome_is_told_to_the_next_approver(store: GatewayStore) -> None:
    """A run that ended without a word may have run: who decides about the next one reads that."""
    asked = await acquire(store)
    await approve(store, asked)
    used = await acquire(store)
    anew = await acquire(store)

    found = await store.approvals.get(approval_id=anew.approval_id)
    assert used.used_at is not None
    at = f"{used.used_at:%Y-%m-%d %H:%M:%S}"
    assert found.risk_explanation == (
        f"deletes a file It was approved and used before, at {at} UTC: it still runs, or its outcome is unknown."
    )


@EACH
async def test_notifiers_hear_once_of_each_question(database_url: str, redis_setting: str) -> None:
    recorder = RecordingNotifier()
    async with GatewayStore(database_url, redis_url=redis_setting, plugins=[recorder]) as store:
        asked = await acquire(store)
        for _ in range(3):
            await acquire(store)
        await approve(store, asked)
        await acquire(store)
        await until(lambda: len(recorder.notices) == 2)
    assert seen(recorder) == [("decision", "APPROVED"), ("pending", "PENDING")]


@EACH
@pytest.mark.parametrize(("verb", "status"), [("approve", "USED"), ("deny", "DENIED")])
async def test_waiting_ends_with_the_decision(store: GatewayStore, other: GatewayStore, verb: str, status: str) -> None:
    """`wait_s` waits for a decision by another process; cancelling a waiter cancels no approval."""
    gone = asyncio.create_task(acquire(store, wait_s=60))
    await until(lambda: store.approvals.list_requests())
    gone.cancel()
    waiting = asyncio.create_task(acquire(store, wait_s=60))
    (asked,) = await store.approvals.list_requests()
    decide = getattr(other.approvals, verb)
    await decide(approval_id=asked.approval_id, approver_id="approver-1")
    async with asyncio.timeout(10):
        assert (await waiting).status == status


async def test_of_two_who_wait_one_runs_and_the_other_asks_anew(store: GatewayStore, other: GatewayStore) -> None:
    waiting = [asyncio.create_task(acquire(each, wait_s=60)) for each in (store, other)]
    # Who asked only after the decision would wait for another one.
    await until(lambda: topics(store) == topics(other) == 1)
    (asked,) = await store.approvals.list_requests()
    await store.approvals.approve(approval_id=asked.approval_id, approver_id="approver-1")
    async with asyncio.timeout(20):
        found = {str(each.status): each.approval_id for each in await asyncio.gather(*waiting)}
    assert (set(found), found["USED"]) == ({"USED", "PENDING"}, asked.approval_id)
    assert found["PENDING"] != asked.approval_id


@pytest.mark.parametrize("is_cancelled", [True, False], ids=["cancelled", "expired"])
async def test_who_waited_for_what_can_no_longer_be_used_asks_anew(
    database_url: str, other: GatewayStore, is_cancelled: bool
) -> None:
    settings = StoreSettings(acquire_decision_seconds=600 if is_cancelled else 1)
    async with GatewayStore(database_url, redis_url="", settings=settings) as store:
        waiting = asyncio.create_task(acquire(store, wait_s=60))
        await until(lambda: other.approvals.list_requests())
        (asked,) = await other.approvals.list_requests()
        if is_cancelled:
            await other.approvals.cancel(approval_id=asked.approval_id, approver_id="approver-1")
        async with asyncio.timeout(20):
            found = await waiting
    assert (found.status, found.approval_id != asked.approval_id) == ("PENDING", True)


async def test_outputs_are_not_acquired(store: GatewayStore) -> None:
    with pytest.raises(ValueError, match="issue_token"):
        await acquire(store, scope=ApprovalScope.OUTPUT_RELEASE, output_payload={"rows": 1})
    with pytest.raises(TypeError, match="wait_s"):
        await acquire(store, wait_s="long")  # type: ignore[arg-type]
    assert not await store.approvals.list_requests()


@WITH_REDIS
async def test_no_acquired_approval_is_in_redis(store: GatewayStore, client: redis.asyncio.Redis) -> None:
    await approve(store, await acquire(store))
    assert (await acquire(store)).status == "USED"
    assert await client.keys("approval*") == []


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_denial_that_comes_while_it_is_asked_again_counts(
    store: GatewayStore, other: GatewayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One caller finds nothing; another asks and is denied; then the first asks: the denial answers it."""
    insert = acquiring.insert

    async def later(*args: Any) -> Any:
        monkeypatch.setattr(acquiring, "insert", insert)
        asked = await acquire(other)
        await other.approvals.deny(approval_id=asked.approval_id, approver_id="approver-1")
        return await insert(*args)

    monkeypatch.setattr(acquiring, "insert", later)
    assert (await acquire(store)).status == "DENIED"
    assert await column(store, "status", "approval_requests") == ["DENIED"]


class TestMostPending:
    """APPROVAL_MAX_PENDING: a caller that asks without end tires nobody out."""

    @pytest.fixture
    async def limited(self, database_url: str) -> AsyncIterator[GatewayStore]:
        async with GatewayStore(database_url, redis_url="", settings=StoreSettings(approval_max_pending=3)) as opened:
            yield opened

    async def ask(self, store: GatewayStore, number: int, **fields: Any) -> object:
        call = CALL.model_copy(update={"arguments": {"number": number}})
        if number % 2:
            return await acquire(store, tool_call=call, **fields)
        return await store.approvals.issue_token(make_request(tool_call=call, request_id=str(number), **fields))

    @pytest.mark.parametrize("kind", [0, 1], ids=["issue_token", "acquire"])
    async def test_one_more_is_refused(self, limited: GatewayStore, kind: int) -> None:
        """Both kinds count together, for each caller and organisation; what stands is returned all the same."""
        first = [await self.ask(limited, number) for number in range(3)][1]
        with pytest.raises(errors.TooManyPendingError, match="3 approvals of 'dev-agent' wait") as caught:
            await self.ask(limited, 10 + kind)
        assert (caught.value.caller_id, caught.value.pending) == ("dev-agent", 3)
        assert len(await limited.approvals.list_requests()) == 3
        assert await self.ask(limited, 1) == first
        await self.ask(limited, 0)
        await self.ask(limited, 10 + kind, caller_id="other-agent")
        await self.ask(limited, 10 + kind, org_id="acme")

    @pytest.mark.parametrize("end", ["approve", "deny", "expire"])
    async def test_what_has_ended_makes_room(self, limited: GatewayStore, end: str) -> None:
        for number in range(3):
            await self.ask(limited, number)
        pending = await limited.approvals.list_requests()
        if end == "expire":
            clock.move(25 * HOUR)
        else:
            decide = getattr(limited.approvals, end)
            await decide(approval_id=pending[0].approval_id, approver_id="approver-1")
        await self.ask(limited, 10)
