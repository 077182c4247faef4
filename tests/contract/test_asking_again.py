"""Asking again for a pending call: the same approval on the same terms, a new one on others."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

import pytest
from contract_helpers import EACH, column, counted_statements, seen, until

from agent_gateway_store import (
    ApprovalRequest,
    ApprovalResult,
    ApprovalScope,
    ApprovalStatus,
    GatewayStore,
    clock,
    errors,
)
from agent_gateway_store.store import parts_of
from agent_gateway_store.testing import RecordingNotifier
from builders import CALL, make_request
from cases import cases

LATER = clock.utc_now() + timedelta(hours=9)
TERMS: dict[str, Any] = {
    "scope": ApprovalScope.OUTPUT_RELEASE,
    "output_payload": {"rows": [1, 2]},
    "required_approvals": 2,
    "expires_at": LATER,
    "use_before": LATER + timedelta(hours=1),
    "tool_call": CALL.model_copy(update={"arguments": {"path": "[redacted]", "size": 1}}),
    "risk_explanation": "deletes\0 a file",
}
OTHER_TERMS: dict[str, dict[str, Any]] = {
    "scope": {"scope": ApprovalScope.EXECUTION},
    "output": {"output_payload": {"rows": [1, 2.0]}},
    "no output": {"output_payload": None},
    "output hash": {"output_payload": None, "output_hash": "0" * 64},
    "more approvals": {"required_approvals": 3},
    "fewer approvals": {"required_approvals": 1},
    "deadline": {"expires_at": LATER - timedelta(microseconds=1)},
    "deadline of use": {"use_before": LATER + timedelta(hours=2)},
    "shown call": {"tool_call": CALL.model_copy(update={"arguments": {"path": "[redacted]", "size": 1.0}})},
    "explanation": {"risk_explanation": "deletes every file"},
}


def ask(**fields: Any) -> ApprovalRequest:
    """The same call each time; `fields` are its terms."""
    return make_request(**({"request_id": "r-1"} | fields))


@EACH
async def test_asking_again_binds_the_new_token_to_the_same_approval(store: GatewayStore) -> None:
    old = await store.approvals.issue_token(make_request(request_id="r-1"))
    asked = await store.approvals.check_token(old)
    clock.move(timedelta(milliseconds=5))  # so that a deadline set anew would be another one
    new = await store.approvals.issue_token(make_request(request_id="r-1"))

    assert new != old
    assert (await store.approvals.check_token(new)).approval_id == asked.approval_id
    for fresh in (False, True):
        with pytest.raises(errors.ApprovalNotFoundError):
            await store.approvals.check_token(old, fresh=fresh)
    with pytest.raises(errors.ApprovalNotFoundError):
        await store.approvals.approve(old, "approver-1")
    await store.approvals.approve(approval_id=asked.approval_id, approver_id="approver-1")
    assert (await store.approvals.check_token(new)).status == "APPROVED"
    rows = await store.approvals.list_requests()
    assert [(row.risk_explanation, row.expires_at) for row in rows] == [("deletes a file", asked.expires_at)]


@cases(
    "other",
    [
        {"request_id": "r-2"},
        {"caller_id": "other-agent"},
        {"org_id": "acme"},
        {"tool_call": CALL.model_copy(update={"arguments": {"path": "/tmp/other.txt"}})},
    ],
)
@EACH
async def test_asking_for_another_call_is_another_approval(store: GatewayStore, other: dict[str, Any]) -> None:
    first = await store.approvals.issue_token(make_request(request_id="r-1"))
    second = await store.approvals.issue_token(make_request(**({"request_id": "r-1"} | other)))

    results: list[ApprovalResult] = [await store.approvals.check_token(token) for token in (first, second)]
    assert results[0].approval_id != results[1].approval_id


@EACH
async def test_same_object_can_be_asked_again_while_pending(store: GatewayStore) -> None:
    """Issuing a request object twice gives its token twice; after the decision it says to build a new one."""
    request = make_request()
    token = await store.approvals.issue_token(request)

    assert await store.approvals.issue_token(request) == token
    await store.approvals.deny(token, "approver-1")
    with pytest.raises(errors.ApprovalError, match="build a new ApprovalRequest") as caught:
        await store.approvals.issue_token(request)
    assert caught.value.approval_id == request.approval_id


async def test_token_of_another_approval_is_not_taken(store: GatewayStore) -> None:
    taken = await store.approvals.issue_token(make_request(request_id="r-1"))
    pending = await store.approvals.issue_token(make_request(request_id="r-2"))

    for request_id in ("r-2", "r-3"):
        with pytest.raises(errors.ApprovalError, match="build a new ApprovalRequest"):
            await store.approvals.issue_token(make_request(request_id=request_id, token=taken))
    for token in (taken, pending):
        assert (await store.approvals.check_token(token, fresh=True)).status == "PENDING"
    assert len(await store.approvals.list_requests()) == 2


@cases(("name", "changed"), OTHER_TERMS.items())
@EACH
async def test_other_terms_are_another_approval(store: GatewayStore, name: str, changed: dict[str, Any]) -> None:
    """Whatever differs that is shown or decided: the old approval is cancelled, the new one has the new terms."""
    terms = TERMS | {"request_id": name}
    old = await store.approvals.issue_token(ask(**terms), call=CALL)
    before = await store.approvals.check_token(old)
    new = await store.approvals.issue_token(ask(**(terms | changed)), call=CALL)
    after = await store.approvals.check_token(new)
    rows = [row for row in await store.approvals.list_requests() if row.request_id == name]

    assert [row.status for row in rows] == ["PENDING", "CANCELLED"]
    assert [row.approval_id for row in rows] == [after.approval_id, before.approval_id]
    for fresh in (False, True):
        ended = await store.approvals.check_token(old, fresh=fresh)
        told = (ended.status, ended.approver_id, ended.note)
        assert told == ("CANCELLED", "dev-agent", "Asked again with other terms.")
        assert ended.decided_at is not None
    for field, value in changed.items():
        assert getattr(rows[0], field) == value
    assert rows[0].version == 1


async def test_vote_for_the_old_terms_does_not_count_for_the_new(store: GatewayStore) -> None:
    """A quorum of one, asked again as three, is not reached by a vote that was cast before."""
    old = await store.approvals.issue_token(ask(required_approvals=2))
    await store.approvals.approve(old, "approver-1")
    new = await store.approvals.issue_token(ask(required_approvals=3))
    found = (await store.approvals.check_token(new)).approval_id
    answers = [await store.approvals.approve(approval_id=found, approver_id=f"approver-{each}") for each in (1, 2, 3)]

    assert [answer.status for answer in answers] == ["PENDING", "PENDING", "APPROVED"]
    with pytest.raises(errors.ApprovalAlreadyDecidedError, match="already decided: CANCELLED by dev-agent"):
        await store.approvals.approve(old, "approver-2")
    with pytest.raises(errors.ApprovalNotApprovedError, match="stands at CANCELLED"):
        await store.approvals.consume_token(old, caller_id="dev-agent", tool_call=CALL)


@pytest.mark.parametrize("left_out", [(), ("expires_at",), ("use_before",), ("expires_at", "use_before")])
async def test_same_terms_are_the_same_approval(store: GatewayStore, left_out: tuple[str, ...]) -> None:
    """A retry in the same words is bound to the approval that stands; a deadline left out keeps the one it has."""
    old = await store.approvals.issue_token(ask(**TERMS), call=CALL)
    asked = await store.approvals.check_token(old)
    await store.approvals.approve(old, "approver-1")
    retried = {name: value for name, value in TERMS.items() if name not in left_out}
    new = await store.approvals.issue_token(ask(**retried), call=CALL)
    decided = await store.approvals.approve(new, "approver-2")

    assert (decided.approval_id, decided.status) == (asked.approval_id, "APPROVED")
    (row,) = await store.approvals.list_requests()
    assert (row.expires_at, row.use_before) == (TERMS["expires_at"], TERMS["use_before"])


@EACH
async def test_asking_costs_as_few_statements_as_before(store: GatewayStore) -> None:
    with counted_statements(store) as first:
        await store.approvals.issue_token(ask(**TERMS), call=CALL)
    with counted_statements(store) as second:
        await store.approvals.issue_token(ask(**TERMS), call=CALL)

    # Not those of the worker, which sends the first notice meanwhile.
    first, second = ([each for each in ran if "UPDATE notification_deliveries" not in each] for ran in (first, second))
    assert (len(first), len(second)) == (2 if store.database.dialect == "sqlite" else 1, 2)


async def test_changed_object_is_refused_and_changes_nothing(store: GatewayStore) -> None:
    """One id cannot name two approvals: the pending one stands, its cancellation is taken back."""
    request = make_request()
    token = await store.approvals.issue_token(request)
    request.required_approvals = 3

    with pytest.raises(errors.ApprovalError, match=r"has other terms .*: build a new ApprovalRequest"):
        await store.approvals.issue_token(request)
    assert (await store.approvals.check_token(token, fresh=True)).status == "PENDING"
    assert [row.required_approvals for row in await store.approvals.list_requests()] == [1]
    assert (await store.approvals.approve(token, "approver-1")).status == "APPROVED"


async def cancelled_after(steps: int, asking: Coroutine[Any, Any, str]) -> str | None:
    """Cancel `asking` after so many turns of the loop; return the token if it was through before."""
    task = asyncio.create_task(asking)
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    return None if task.cancelled() else task.result()


@EACH
async def test_what_a_cancelled_task_asked_is_withdrawn(store: GatewayStore) -> None:
    """At whatever moment it is cancelled: nothing waits that nobody has the token of."""
    tokens = [
        await cancelled_after(steps, store.approvals.issue_token(make_request(request_id=f"r-{steps}")))
        for steps in [*range(0, 60, 3), 100_000]
    ]
    kept = {(await store.approvals.check_token(token)).approval_id for token in tokens if token}

    async def is_over() -> bool:
        return {each.approval_id for each in await store.approvals.list_requests("PENDING")} == kept

    await until(is_over)
    assert tokens[0] is None
    assert len(kept) < len(tokens)


@EACH
async def test_a_withdrawal_leaves_what_a_retry_has_acknowledged(store: GatewayStore) -> None:
    """An ApprovalError says that the first call was withdrawn already; a token that is returned stays good."""
    kept = []
    for steps in range(0, 60, 3):
        request = make_request(request_id=f"r-{steps}")
        await cancelled_after(steps, store.approvals.issue_token(request))
        with contextlib.suppress(errors.ApprovalError):
            kept.append(await store.approvals.issue_token(request))
    await until(lambda: not parts_of(store).approvals.background)
    assert kept
    assert {(await store.approvals.check_token(token, fresh=True)).status for token in kept} == {"PENDING"}


async def test_a_token_that_was_returned_outlives_a_repetition_that_is_cancelled(store: GatewayStore) -> None:
    request = make_request()
    token = await store.approvals.issue_token(request)
    for steps in range(0, 60, 3):
        await cancelled_after(steps, store.approvals.issue_token(request))
    await until(lambda: not parts_of(store).approvals.background)
    assert (await store.approvals.check_token(token, fresh=True)).status == "PENDING"


async def test_both_notices_are_written(database_url: str) -> None:
    notifier = RecordingNotifier()
    async with GatewayStore(database_url, redis_url="", plugins=[notifier]) as store:
        for required in (1, 1, 2):
            token = await store.approvals.issue_token(ask(required_approvals=required))
        new = (await store.approvals.check_token(token)).approval_id
        await notifier.wait_for(3)
        kept = await store.notifications.list(notifier="recording")

    assert Counter(row.event for row in kept) == {"pending": 2, "decision": 1}
    assert seen(notifier) == [("decision", "CANCELLED"), ("pending", "PENDING"), ("pending", "PENDING")]
    (cancelled,) = notifier.decisions
    assert (cancelled.approver_id, cancelled.note) == ("dev-agent", "Asked again with other terms.")
    assert cancelled.approval_id != new


@EACH
@pytest.mark.parametrize("required", [1, 2], ids=["same terms", "other terms"])
async def test_overdue_one_expires_and_the_new_one_is_asked(store: GatewayStore, required: int) -> None:
    """What is overdue is neither bound to the new token nor cancelled, though no sweep has met it."""
    old = await store.approvals.issue_token(ask())
    clock.move(timedelta(hours=2))
    new = await store.approvals.issue_token(ask(required_approvals=required))

    for fresh in (False, True):
        assert (await store.approvals.check_token(old, fresh=fresh)).status == "EXPIRED"
        assert (await store.approvals.check_token(new, fresh=fresh)).status == "PENDING"
    assert await column(store, "status", "approval_requests") == ["EXPIRED", "PENDING"]


async def test_many_who_ask_on_different_terms_leave_one_pending(store: GatewayStore, other: GatewayStore) -> None:
    both = [store, other]

    async def asking(number: int) -> str:
        return await both[number % 2].approvals.issue_token(ask(required_approvals=number + 1))

    tokens = await asyncio.gather(*map(asking, range(20)))
    results = [await store.approvals.check_token(token, fresh=True) for token in tokens]

    assert Counter(result.status for result in results) == {"CANCELLED": 19, "PENDING": 1}
    assert len({result.approval_id for result in results}) == 20


async def test_asking_on_other_terms_races_with_the_decision(store: GatewayStore, other: GatewayStore) -> None:
    """Either it is approved as it was asked, or it is cancelled and the approver is told."""
    for number in range(10):
        name = f"r-{number}"
        old = await store.approvals.issue_token(make_request(request_id=name))
        found = (await store.approvals.check_token(old)).approval_id
        new, decided = await asyncio.gather(
            store.approvals.issue_token(make_request(request_id=name, required_approvals=2)),
            other.approvals.approve(approval_id=found, approver_id="approver-1"),
            return_exceptions=True,
        )
        assert isinstance(new, str)
        ended = await store.approvals.check_token(old, fresh=True)
        asked = await store.approvals.check_token(new, fresh=True)

        assert asked.status == "PENDING"
        if isinstance(decided, ApprovalResult):
            assert (decided.status, ended.status) == ("APPROVED", "APPROVED")
        else:
            assert isinstance(decided, errors.ApprovalAlreadyDecidedError)
            assert (decided.status, ended.status) == ("CANCELLED", "CANCELLED")


async def test_only_the_own_organisation_is_cancelled(store: GatewayStore) -> None:
    foreign = await store.for_org("globex").approvals.issue_token(ask())
    await store.for_org("acme").approvals.issue_token(ask())
    await store.for_org("acme").approvals.issue_token(ask(required_approvals=2))

    assert (await store.approvals.check_token(foreign, fresh=True)).status == "PENDING"
    assert len(await store.approvals.list_requests(ApprovalStatus.CANCELLED)) == 1
