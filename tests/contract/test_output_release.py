"""An approval releases what it was asked for: a call runs, or an output is handed out, once."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
import redis.asyncio
from contract_helpers import EACH, approved, column
from sqlalchemy import text

from agent_gateway_store import (
    ApprovalScope,
    AuditEvent,
    GatewayStore,
    StoreSettings,
    errors,
)
from builders import CALL, make_request
from cases import cases

RELEASE = ApprovalScope.OUTPUT_RELEASE
OUTPUT: dict[str, Any] = {"rows": [{"name": "Ada \u2603", "n": 1.5}, None, True], "total": 2}


async def change(store: GatewayStore, assignment: str) -> None:
    """Change the approvals behind the store's back."""
    async with store.database.engine.begin() as connection:
        await connection.execute(text(f"UPDATE approval_requests SET {assignment}"))


async def test_approved_output_runs_no_call(store: GatewayStore) -> None:
    """An approval to release an output does not release the call that made it, and is not used up by the attempt."""
    token = await approved(store, scope=RELEASE, output_payload=OUTPUT)

    with pytest.raises(
        errors.ApprovalMismatchError, match="is for the scope OUTPUT_RELEASE, not for EXECUTION: ask"
    ) as caught:
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    assert caught.value.approval_id is not None
    assert (await store.approvals.check_token(token, fresh=True)).status == "APPROVED"
    used = await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL, scope=RELEASE)
    assert (used.status, used.scope) == ("USED", RELEASE)


async def test_approved_call_releases_no_output(store: GatewayStore) -> None:
    token = await approved(store, output_payload=OUTPUT)

    with pytest.raises(errors.ApprovalMismatchError, match="is for the scope EXECUTION, not for OUTPUT_RELEASE"):
        await store.approvals.release_output(token, caller_id="dev-agent")
    with pytest.raises(errors.ApprovalMismatchError, match="is for the scope EXECUTION, not for OUTPUT_RELEASE"):
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL, scope=RELEASE)
    assert (await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)).status == "USED"


@cases("payload", [OUTPUT, "text", "", 0, False, [], {}, "\0\ud800", [float("nan"), 2**64]])
async def test_output_is_given_as_it_was_stored(store: GatewayStore, payload: Any) -> None:
    token = await approved(store, scope=RELEASE, output_payload=payload)
    (shown,) = await store.approvals.list_requests("APPROVED")
    output = await store.approvals.release_output(token, caller_id="dev-agent")

    assert output == shown.output_payload
    assert type(output) in (dict, list, str, int, bool)
    assert shown.output_hash == AuditEvent.hash_args(output)
    assert (await store.approvals.check_token(token)).status == "USED"
    await store.approvals.record_outcome(token, "handed out")


async def test_one_of_twenty_gets_the_output(store: GatewayStore, other: GatewayStore) -> None:
    """Of twenty concurrent releases one returns; the others are told that it has been used."""
    token = await approved(store, scope=RELEASE, output_payload=OUTPUT)
    both = [store, other]
    answers = await asyncio.gather(
        *(both[number % 2].approvals.release_output(token, caller_id="dev-agent") for number in range(20)),
        return_exceptions=True,
    )

    assert Counter(type(answer) for answer in answers) == {dict: 1, errors.ApprovalAlreadyUsedError: 19}
    assert OUTPUT in answers


async def test_output_is_released_by_approval_only(store: GatewayStore) -> None:
    """Pending, denied, expired, unknown, another caller's, another organisation's: nothing is handed out."""
    release = store.approvals.release_output
    token = await store.approvals.issue_token(make_request(scope=RELEASE, output_payload=OUTPUT))
    with pytest.raises(errors.ApprovalNotApprovedError, match="stands at PENDING"):
        await release(token, caller_id="dev-agent")
    await store.approvals.approve(token, "approver-1")
    with pytest.raises(errors.ApprovalMismatchError, match="is for another caller"):
        await release(token, caller_id="mallory")
    for unknown in ("", "no-such-token"):
        with pytest.raises(errors.ApprovalNotFoundError):
            await release(unknown, caller_id="dev-agent")
    with pytest.raises(errors.ApprovalNotFoundError):
        await store.for_org("acme").approvals.release_output(token, caller_id="dev-agent")
    denied = await store.approvals.issue_token(make_request(scope=RELEASE, output_payload=OUTPUT))
    await store.approvals.deny(denied, "approver-1")
    with pytest.raises(errors.ApprovalNotApprovedError, match="stands at DENIED"):
        await release(denied, caller_id="dev-agent")

    assert await store.for_org("default").approvals.release_output(token, caller_id="dev-agent") == OUTPUT


@pytest.mark.parametrize(
    ("assignment", "why"),
    [
        ("output_payload = '\"SECRET\"'", "holds an output that does not match its hash"),
        ("output_hash = NULL", "holds an output that does not match its hash"),
        ("output_payload = NULL", "holds no output"),
    ],
)
async def test_output_that_was_changed_is_not_released(store: GatewayStore, assignment: str, why: str) -> None:
    token = await approved(store, scope=RELEASE, output_payload="harmless")
    await change(store, assignment)

    with pytest.raises(errors.ApprovalMismatchError, match=f"The approval {why}, so nothing was released"):
        await store.approvals.release_output(token, caller_id="dev-agent")
    assert (await store.approvals.check_token(token, fresh=True)).status == "APPROVED"
    assert await column(store, "used_at", "approval_requests") == [None]


async def test_hash_of_another_output_is_refused_when_it_is_asked(store: GatewayStore) -> None:
    """A given hash must be that of the output as it is stored; one sentence says so, and nothing is written."""
    with pytest.raises(errors.ApprovalMismatchError, match="output_hash is not that of the output_payload as it is"):
        await store.approvals.issue_token(
            make_request(scope=RELEASE, output_payload="SECRET", output_hash=AuditEvent.hash_args({"a": "harmless"}))
        )
    assert await store.approvals.list_requests() == []
    for given in (AuditEvent.hash_args(OUTPUT), AuditEvent.hash_args(OUTPUT).upper()):
        token = await approved(store, scope=RELEASE, output_payload=OUTPUT, output_hash=given)
        assert await store.approvals.release_output(token, caller_id="dev-agent") == OUTPUT


async def test_hash_follows_the_hash_key(database_url: str) -> None:
    """With HASH_KEY the hash of an output is keyed, as that of the arguments is; without the key it does not match."""
    keyed = StoreSettings(hash_key="k" * 32)
    async with GatewayStore(database_url, redis_url="", settings=keyed) as store:
        token = await approved(store, scope=RELEASE, output_payload=OUTPUT)
        async with GatewayStore(database_url, redis_url="") as unkeyed:
            with pytest.raises(errors.ApprovalMismatchError, match="does not match its hash"):
                await unkeyed.approvals.release_output(token, caller_id="dev-agent")

        assert await store.approvals.release_output(token, caller_id="dev-agent") == OUTPUT


@EACH
async def test_output_is_in_no_notice_and_no_entry(store: GatewayStore, client: redis.asyncio.Redis | None) -> None:
    secret = "the-output-5d1c"
    token = await approved(store, scope=RELEASE, output_payload={"rows": [secret]})
    texts = [repr(await store.approvals.check_token(token))]
    await store.approvals.release_output(token, caller_id="dev-agent")
    notices = list(await store.notifications.list())
    texts += [json.dumps(notice.payload) for notice in notices]
    if client is not None:
        entries = [str(await client.get(key)) for key in await client.keys()]
        assert entries
        texts += entries

    assert notices
    assert not [each for each in texts if secret in each]
