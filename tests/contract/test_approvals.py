"""The life of an approval: asked, decided once by as many approvers as it needs, used once."""

from __future__ import annotations

import hashlib
import itertools
from uuid import uuid4

import pytest
from contract_helpers import BY_TOKEN, EACH, approved, column

from agent_gateway_store import (
    ApprovalStatus,
    GatewayStore,
    ToolCall,
    errors,
)
from builders import CALL, make_request
from cases import cases

OTHER_CALL = CALL.model_copy(update={"arguments": {"path": "/tmp/other.txt"}})


@EACH
async def test_approved_call_is_released_once_and_its_outcome_noted(store: GatewayStore) -> None:
    """PENDING, APPROVED, USED with an outcome: each step is seen by token, by id and in the listing."""
    token = await store.approvals.issue_token(make_request(request_id="r-1"))
    asked = await store.approvals.check_token(token)
    decided = await store.approvals.approve(token, "approver-1", "looks right")
    used = await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    with pytest.raises(errors.ApprovalAlreadyUsedError, match=r"already been used at .* UTC: ask for a new") as caught:
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    unknown = await store.approvals.get(approval_id=asked.approval_id)
    results = [used, await store.approvals.record_outcome(token, "deleted")]
    results += [await store.approvals.check_token(token, fresh=is_fresh) for is_fresh in (True, False)]
    row = await store.approvals.get(approval_id=str(asked.approval_id))

    assert (asked.status, asked.approver_id, asked.decided_at) == ("PENDING", None, None)
    assert (decided.status, decided.approver_id, decided.note) == ("APPROVED", "approver-1", "looks right")
    assert decided.decided_at is not None
    assert (used.status, used.token, caught.value.status) == ("USED", token, "USED")
    assert (unknown.status, unknown.outcome) == ("USED", None)
    assert (asked.used_at, asked.outcome) == (decided.used_at, decided.outcome) == (None, None)
    assert [(each.used_at, each.outcome) for each in results] == [(row.used_at, None), *[(row.used_at, "deleted")] * 3]
    assert (row.outcome, row.version, row.token) == ("deleted", 4, None)
    assert row.created_at <= row.decision_at <= row.used_at
    assert [each.request_id for each in await store.approvals.list_requests(status="USED")] == ["r-1"]


@EACH
@pytest.mark.parametrize(("decide", "status"), [(None, "PENDING"), ("deny", "DENIED"), ("cancel", "CANCELLED")])
async def test_what_is_not_approved_is_not_released(store: GatewayStore, decide: str | None, status: str) -> None:
    """Consuming is refused, and tells how the approval stands and who decided; it stands so afterwards."""
    token = await store.approvals.issue_token(make_request())
    result = await store.approvals.check_token(token)
    if decide is not None:
        result = await getattr(store.approvals, decide)(token, "approver-1", "not today")
        assert (result.status, result.note) == (status, "not today")
    says = f"not approved: it stands at {status}" + (r" by approver-1 at .* UTC" if decide else "")

    with pytest.raises(errors.ApprovalNotApprovedError, match=says) as caught:
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    assert (caught.value.status, caught.value.approver_id) == (status, "approver-1" if decide else None)
    assert caught.value.approval_id == result.approval_id
    assert (await store.approvals.check_token(token)).status == status


@EACH
async def test_cancelling_withdraws_a_pending_and_an_approved_call(store: GatewayStore) -> None:
    pending = await store.approvals.issue_token(make_request())
    agreed = await approved(store)
    used = await approved(store)
    await store.approvals.consume_token(used, caller_id="dev-agent", tool_call=CALL)

    for token in (pending, agreed):
        assert (await store.approvals.cancel(token, "dev-agent", "no longer needed")).status == "CANCELLED"
    with pytest.raises(errors.ApprovalNotApprovedError, match="stands at CANCELLED by dev-agent"):
        await store.approvals.consume_token(agreed, caller_id="dev-agent", tool_call=CALL)
    with pytest.raises(errors.ApprovalAlreadyDecidedError, match="already decided: USED"):
        await store.approvals.cancel(used, "dev-agent")


@EACH
async def test_approval_id_decides_in_place_of_the_token(store: GatewayStore) -> None:
    """Who has the id only can decide, learns no token, and the token sees the decision at once."""
    tokens = [await store.approvals.issue_token(make_request()) for _ in range(3)]
    ids = [(await store.approvals.check_token(token)).approval_id for token in tokens]

    results = [
        await store.approvals.approve(approval_id=ids[0], approver_id="approver-1"),
        await store.approvals.deny(approval_id=str(ids[1]), approver_id="approver-1"),
        await store.approvals.cancel(approval_id=ids[2], approver_id="approver-1"),
    ]

    assert [result.token for result in results] == [None, None, None]
    seen = [(await store.approvals.check_token(token)).status for token in tokens]
    assert [result.status for result in results] == seen == ["APPROVED", "DENIED", "CANCELLED"]


@cases(("first", "second"), itertools.product(("approve", "deny", "cancel"), ("approve", "deny")))
async def test_second_decision_learns_of_the_first(store: GatewayStore, first: str, second: str) -> None:
    token = await store.approvals.issue_token(make_request())
    standing = await getattr(store.approvals, first)(token, "approver-1", "first")

    with pytest.raises(
        errors.ApprovalAlreadyDecidedError, match=f"already decided: {standing.status} by approver-1"
    ) as caught:
        await getattr(store.approvals, second)(token, "approver-2", "second")

    assert caught.value.status == standing.status
    assert caught.value.approver_id == "approver-1"
    assert caught.value.decided_at == standing.decided_at
    assert isinstance(caught.value, ValueError)
    assert await store.approvals.check_token(token, fresh=True) == standing


@cases(
    ("caller_id", "call", "what"),
    [
        ("other-agent", CALL, "caller"),
        ("dev-agent", OTHER_CALL, "tool call"),
        ("dev-agent", CALL.model_copy(update={"server": "mail"}), "tool call"),
        ("dev-agent", CALL.model_copy(update={"tool": "read_file"}), "tool call"),
        ("dev-agent", CALL.model_copy(update={"arguments": {**CALL.arguments, "force": True}}), "tool call"),
    ],
)
async def test_another_caller_or_call_is_not_released(
    store: GatewayStore, caller_id: str, call: ToolCall, what: str
) -> None:
    """The permission binds to the caller and to the call, to the last argument; the right one is still released."""
    token = await approved(store)

    with pytest.raises(errors.ApprovalMismatchError, match=f"is for another {what}: ask") as caught:
        await store.approvals.consume_token(token, caller_id=caller_id, tool_call=call)

    assert caught.value.approval_id is not None
    assert (await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)).status == "USED"


async def test_permission_binds_to_the_call_as_it_runs(store: GatewayStore) -> None:
    """Approvers see sanitised arguments; what is released is the call that was handed in beside them."""
    shown = CALL.model_copy(update={"arguments": {"path": "[redacted]"}})
    token = await store.approvals.issue_token(make_request(tool_call=shown), call=CALL)
    await store.approvals.approve(token, "approver-1")

    with pytest.raises(errors.ApprovalMismatchError):
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=shown)
    as_mapping = {"server": "files", "tool": "delete_file", "arguments": {"path": "/tmp/report.txt"}}
    assert (await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=as_mapping)).status == "USED"
    assert (await store.approvals.list_requests())[0].tool_call == shown


async def test_a_call_that_is_too_long_to_be_stored_whole_is_marked_and_released_whole(store: GatewayStore) -> None:
    """Also one of which a whole argument is missing; a call that only begins like it is not released."""
    calls = [
        CALL.model_copy(update={"arguments": {"text": "x" * 100_000}}),
        CALL.model_copy(update={"arguments": {**{f"p{at}": "x" * 65_000 for at in range(5)}, "cmd": "rm -rf /"}}),
    ]
    for call in calls:
        token = await store.approvals.issue_token(make_request(tool_call=call))
        await store.approvals.approve(token, "approver-1")
        stored = (await store.approvals.list_requests())[0].tool_call

        assert (call.is_cut, stored.is_cut) == (False, True)
        assert str(list(stored.arguments.values())[-1]).endswith("]")
        with pytest.raises(errors.ApprovalMismatchError):
            await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=stored)
        assert (await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=call)).status == "USED"


async def test_outcome_is_noted_once(store: GatewayStore) -> None:
    """Before the use there is none; the same again changes nothing; another one is refused."""
    token = await approved(store)
    with pytest.raises(
        errors.ApprovalNotApprovedError, match="Only a used approval has an outcome: it stands at APPROVED"
    ):
        await store.approvals.record_outcome(token, "done")
    await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    await store.approvals.record_outcome(token, "done")

    assert (await store.approvals.record_outcome(token, "done")).status == "USED"
    with pytest.raises(errors.ApprovalAlreadyUsedError, match="already been used and its outcome was recorded"):
        await store.approvals.record_outcome(token, "failed")
    assert [each.outcome for each in await store.approvals.list_requests()] == ["done"]


NAMED = [
    *BY_TOKEN,
    lambda store, token: store.approvals.get(approval_id=token),
    lambda store, token: store.approvals.approve(approval_id=token, approver_id="approver-1"),
]
STRANGE = ["no-such-token", "", "\0", "\ud800", "é" * 600, "a" * 2**20, "' OR 1=1 --", "approval:x", str(uuid4())]


@EACH
async def test_unknown_token_is_not_found(store: GatewayStore) -> None:
    """Whatever an unknown token or id looks like and is used for, the one answer is that there is none."""
    await store.approvals.issue_token(make_request())

    for ask in NAMED:
        for token in STRANGE:
            with pytest.raises(errors.ApprovalNotFoundError, match="not found") as caught:
                await ask(store, token)
            assert caught.value.approval_id is None


async def test_wrong_use_is_refused(store: GatewayStore) -> None:
    """An approval is named by token or by id, and somebody decides; a wrong status, limit or cursor is no listing."""
    token = await store.approvals.issue_token(make_request())
    found = (await store.approvals.check_token(token)).approval_id

    with pytest.raises(TypeError, match="either by its token or by approval_id"):
        await store.approvals.approve(approver_id="approver-1")
    with pytest.raises(TypeError, match="either by its token or by approval_id"):
        await store.approvals.approve(token, "approver-1", approval_id=found)
    for decide in (store.approvals.approve, store.approvals.deny, store.approvals.cancel):
        for blank in ("", " ", "\t\n\u2003", "\u200b\u3164\u2800", "\0", None):
            with pytest.raises(TypeError, match="approver_id is required"):
                await decide(token, blank)  # type: ignore[arg-type]
    assert (await store.approvals.check_token(token, fresh=True)).status == "PENDING"
    assert (await store.approvals.approve(token, " ann ", None)).note == ""  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MAYBE"):
        await store.approvals.list_requests(status="MAYBE")
    for limit in (0, -1, 2**31, 2**63, 10**5000):
        with pytest.raises(ValueError, match="limit must be 1 to 2,147,483,647: for more approvals"):
            await store.approvals.list_requests(limit=limit)
    for batch_size in (0, 10_001, 2**63):
        with pytest.raises(ValueError, match="batch_size must be 1 to 10,000: "):
            await store.approvals.expire_stale(batch_size=batch_size)
    assert len(await store.approvals.list_requests(limit=2**31 - 1)) == len(await store.approvals.list_requests())
    for cursor in ("x", "", "é", "MDAwMS0wMS0wMVQwMDowMDowMCsyMzowMHwx", "MjAyNi0wMS0wMVQwMDowMDowMHwx"):
        with pytest.raises(errors.InvalidCursorError, match="start again without one"):
            await store.approvals.list_requests(cursor=cursor)


async def test_self_approval_is_refused(store: GatewayStore) -> None:
    token = await store.approvals.issue_token(make_request())

    with pytest.raises(
        errors.SelfApprovalError, match="dev-agent asked for this call and may not approve it"
    ) as caught:
        await store.approvals.approve(token, "dev-agent")

    assert caught.value.approval_id == (await store.approvals.check_token(token)).approval_id
    assert await column(store, "approver_id", "approval_votes") == []
    assert (await store.approvals.deny(token, "dev-agent")).status == "DENIED"


@EACH
async def test_request_that_claims_a_decision_is_still_pending(store: GatewayStore) -> None:
    """The row is asked for, not believed: status, approver, use and version in the request count for nothing."""
    request = make_request(
        status=ApprovalStatus.APPROVED, approver_id="dev-agent", approver_note="mine", version=7, outcome="done"
    )
    token = await store.approvals.issue_token(request)

    assert (await store.approvals.check_token(token)).status == "PENDING"
    with pytest.raises(errors.ApprovalNotApprovedError):
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    row = (await store.approvals.list_requests())[0]
    assert (row.status, row.approver_id, row.approver_note, row.version) == ("PENDING", None, "", 1)
    assert (row.outcome, row.used_at, row.decision_at) == (None, None, None)
    assert request.status == "APPROVED"


@EACH
async def test_token_is_stored_as_its_digest_only(store: GatewayStore) -> None:
    """SQL holds the SHA-256; objects read back and results by id hold no token; no repr shows one."""
    token = await store.approvals.issue_token(make_request())
    row = (await store.approvals.list_requests())[0]
    result = await store.approvals.check_token(token)

    assert await column(store, "token", "approval_requests") == [hashlib.sha256(token.encode()).hexdigest()]
    assert row.token is None
    assert result.token == token
    assert token not in repr(result) + str(result) + repr(row)


@EACH
async def test_text_that_no_database_holds_is_scrubbed(store: GatewayStore) -> None:
    """NUL and lone surrogates in what is asked, said and noted cost nobody an approval."""
    call = CALL.model_copy(update={"arguments": {"pa\0th": "\ud800"}})
    request = make_request(caller_id="a\0b", tool_call=call, risk_explanation="\udfff", request_id="r" * 3000)
    token = await store.approvals.issue_token(request)
    await store.approvals.approve(token, "appr\0over", "no\ud800te", channel="\0")

    used = await store.approvals.consume_token(token, caller_id="a\0b", tool_call=call)

    assert (used.status, used.approver_id, used.note) == ("USED", "appr\u2400over", "no\ufffdte")
    await store.approvals.record_outcome(token, "\0")


async def test_last_voice_decides(store: GatewayStore) -> None:
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
    token = await store.approvals.issue_token(make_request(required_approvals=2))
    await store.approvals.approve(token, "approver-1")

    assert (await store.approvals.cancel(token, "approver-1")).status == "CANCELLED"
    assert await column(store, "decision", "approval_votes") == ["APPROVED"]
