"""The approvals router of the FastAPI integration, on both databases."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any
from uuid import uuid4

import fastapi_helpers
import httpx
import pytest
from fastapi_helpers import CALL, Bench
from sqlalchemy import text

from agent_gateway_store import GatewayStore, ToolCall, hookimpl
from agent_gateway_store._text import CUT_CALL
from builders import make_request

database_url, bench = fastapi_helpers.database_url, fastapi_helpers.bench


async def test_approver_lists_and_sees_what_is_pending(bench: Bench) -> None:
    """Newest first, by pages, with the call and the reason, without token or hash."""
    alice = await bench.key("alice", role="approver")
    asked = [await bench.ask() for _ in range(3)]
    await bench.store.approvals.deny(asked[0][1], approver_id="bob")

    first = await bench.client.get("/approvals", headers=alice, params={"status": "PENDING", "limit": 1})
    second = await bench.client.get(
        "/approvals", headers=alice, params={"status": "PENDING", "cursor": first.json()["next_cursor"]}
    )
    every = await bench.client.get("/approvals", headers=alice)
    one = await bench.client.get(f"/approvals/{asked[2][0]}", headers=alice)

    assert [item["approval_id"] for item in first.json()["items"]] == [asked[2][0]]
    assert [item["approval_id"] for item in second.json()["items"]] == [asked[1][0]]
    assert second.json()["next_cursor"] is None
    assert len(every.json()["items"]) == 3
    assert one.json() == first.json()["items"][0]
    assert one.json()["tool_call"] == CALL.model_dump()
    assert (one.json()["caller_id"], one.json()["status"], one.json()["risk_explanation"]) == (
        "dev-agent",
        "PENDING",
        "deletes a file",
    )
    for answer in (first, second, every, one):
        assert "tool_call_hash" not in answer.text
        assert "token" not in answer.text
        assert not any(token in answer.text for _, token in asked)


async def test_an_approver_sees_that_a_call_was_cut_who_voted_and_which_output_it_is(bench: Bench) -> None:
    """With the sentence that every other view has, in the list and alone."""
    alice = await bench.key("alice", role="approver")
    call = ToolCall(server="s", tool="t", arguments={"text": "x" * 100_000})
    cut = make_request(tool_call=call, required_approvals=2, scope="OUTPUT_RELEASE", output_payload={"rows": 3})
    await bench.store.approvals.issue_token(cut)
    await bench.store.approvals.approve(approval_id=cut.approval_id, approver_id="bob", note="seen", channel="cli")
    whole, _ = await bench.ask()

    one = (await bench.client.get(f"/approvals/{cut.approval_id}", headers=alice)).json()
    listed = (await bench.client.get("/approvals", headers=alice)).json()["items"]

    stored = await bench.store.approvals.get(approval_id=cut.approval_id)
    assert (one["warning"], one["output_hash"]) == (CUT_CALL, stored.output_hash)
    assert [(vote["approver_id"], vote["decision"], vote["note"]) for vote in one["votes"]] == [
        ("bob", "APPROVED", "seen")
    ]
    assert listed[1] == one
    other = listed[0]
    assert (other["approval_id"], other["warning"], other["votes"], other["output_hash"]) == (whole, "", [], None)


@pytest.mark.parametrize(("word", "status"), [("approve", "APPROVED"), ("deny", "DENIED"), ("reject", "DENIED")])
async def test_decision_is_recorded_once(bench: Bench, word: str, status: str) -> None:
    """The second approver learns who was faster."""
    alice, bob = await bench.key("alice", role="approver"), await bench.key("bob", role="approver")
    approval_id, token = await bench.ask()

    decided = await bench.decide(approval_id, alice, decision=word, note="seen")
    late = await bench.decide(approval_id, bob, decision="approve")
    stored = await bench.store.approvals.get(approval_id=approval_id)

    assert decided.json().items() >= {"approval_id": approval_id, "status": status, "approver_id": "alice"}.items()
    assert (stored.status, stored.approver_id, stored.approver_note) == (status, "alice", "seen")
    assert late.status_code == 409
    assert f"already decided: {status} by alice" in late.json()["detail"]
    assert token not in decided.text + late.text
    assert "token" not in decided.json()


async def test_race_has_one_winner(bench: Bench) -> None:
    """Of ten approvers at once one decides; the others learn who."""
    keys = [await bench.key(f"approver-{number}", role="approver") for number in range(10)]
    approval_id, _ = await bench.ask()

    answers = await asyncio.gather(*(bench.decide(approval_id, key, decision="approve") for key in keys))
    winner = (await bench.store.approvals.get(approval_id=approval_id)).approver_id

    assert Counter(answer.status_code for answer in answers) == {200: 1, 409: 9}
    assert all(f"by {winner}" in answer.json()["detail"] for answer in answers if answer.status_code == 409)


async def test_foreign_approval_looks_absent(bench: Bench) -> None:
    """Another organisation's approval, an unknown id and a malformed one get the same answer; nothing is decided."""
    alice = await bench.key("alice", role="approver", org_id="acme")
    foreign, _ = await bench.ask(org_id="globex")

    answers = [
        answer
        for approval_id in (foreign, str(uuid4()), "7", "%00", "a" * 5000)
        for answer in (
            await bench.client.get(f"/approvals/{approval_id}", headers=alice),
            await bench.decide(approval_id, alice, decision="approve"),
        )
    ]
    listed = await bench.client.get("/approvals", headers=alice)

    assert {(answer.status_code, answer.text) for answer in answers} == {
        (404, '{"detail":"Approval not found: check the token or the approval id."}')
    }
    assert listed.json() == {"items": [], "next_cursor": None}
    assert (await bench.store.approvals.get(approval_id=foreign)).status == "PENDING"


async def test_only_approvers_get_in(bench: Bench) -> None:
    """The host's dependency stands before every route."""
    developer = await bench.key("dev-agent")
    approval_id, _ = await bench.ask()

    for headers, status in ((developer, 403), ({}, 401)):
        answers = [
            await bench.client.get("/approvals", headers=headers),
            await bench.client.get(f"/approvals/{approval_id}", headers=headers),
            await bench.decide(approval_id, headers, decision="approve"),
        ]
        assert [answer.status_code for answer in answers] == [status] * 3
    assert (await bench.store.approvals.get(approval_id=approval_id)).status == "PENDING"


async def test_caller_cannot_approve_its_own_call(bench: Bench) -> None:
    """An approver that asked gets 403 with the reason."""
    own = await bench.key("dev-agent", role="approver")
    approval_id, _ = await bench.ask()

    answer = await bench.decide(approval_id, own, decision="approve")

    assert answer.status_code == 403
    assert answer.json()["detail"] == "dev-agent asked for this call and may not approve it: let somebody else decide."


async def test_expired_approval_is_gone(bench: Bench) -> None:
    """After the deadline a decision gets 410."""
    alice = await bench.key("alice", role="approver")
    approval_id, _ = await bench.ask()
    async with bench.store.database.write() as connection:
        await connection.execute(text("UPDATE approval_requests SET expires_at = created_at"))

    answer = await bench.decide(approval_id, alice, decision="approve")

    assert answer.status_code == 410
    assert answer.json()["detail"].startswith("The approval has expired")


@pytest.mark.parametrize(
    "request_options",
    [
        {"content": b'{"decision": "approve"}', "headers": {"Content-Type": "text/plain"}},
        {"data": {"decision": "approve"}},
        {"content": b""},
        {"json": {"decision": "perhaps"}},
        {"json": {"decision": "approve", "approver_id": "mallory"}},
        {"json": {"decision": "approve", "note": "x" * 2001}},
        {"json": {"decision": "approve", "note": {"a": 1}}},
        {"content": b'{"decision": "approve"', "headers": {"Content-Type": "application/json"}},
        {"content": b"[" * 60_000, "headers": {"Content-Type": "application/json"}},
        *(
            {"content": body, "headers": {"Content-Type": "application/json"}}
            for body in (
                b'{"decision": "approve", "note": "\\ud800"}',
                b'{"decision": "approve", "note": NaN}',
                b'{"decision": -Infinity}',
                b'{"decision": "approve", "\\ud800": 1}',
            )
        ),
    ],
    ids=[
        *("text", "form", "empty", "word", "extra", "long", "type", "cut", "deep"),
        *("surrogate", "not a number", "infinity", "name"),
    ],
)
async def test_what_is_no_decision_decides_nothing(bench: Bench, request_options: dict[str, Any]) -> None:
    """Also not what a form of a foreign page could send with the approver's cookies."""
    alice = await bench.key("alice", role="approver")
    approval_id, _ = await bench.ask()
    headers = alice | request_options.get("headers", {})

    answer = await bench.client.post(f"/approvals/{approval_id}/decision", **request_options | {"headers": headers})

    assert answer.status_code in (400, 422)
    assert (await bench.store.approvals.get(approval_id=approval_id)).status == "PENDING"


async def test_huge_body_is_refused(bench: Bench) -> None:
    """Reading stops at the limit."""
    alice = await bench.key("alice", role="approver")
    approval_id, _ = await bench.ask()

    answer = await bench.decide(approval_id, alice, decision="approve", note="x" * 100_000)

    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("params", "status"),
    [({"cursor": "nonsense"}, 400), ({"limit": 0}, 422), ({"limit": 501}, 422), ({"status": "MAYBE"}, 422)],
    ids=["cursor", "none", "many", "status"],
)
async def test_bad_question_is_refused(bench: Bench, params: dict[str, Any], status: int) -> None:
    """A foreign cursor and a limit out of range are the asker's fault."""
    alice = await bench.key("alice", role="approver")

    answer = await bench.client.get("/approvals", headers=alice, params=params)

    assert answer.status_code == status


async def test_plugin_may_refuse_a_decision() -> None:
    """A veto is 403 with the plugin's reason, and the approval stays pending."""

    class Office:
        @hookimpl
        def gateway_store_veto_decision(self) -> str:
            return "Outside office hours."

    store = GatewayStore(plugins=[Office()])
    app = fastapi_helpers.build_app(store)
    async with fastapi_helpers.running(app) as client:
        bench = Bench(store, client, app)
        alice = await bench.key("alice", role="approver")
        approval_id, _ = await bench.ask()
        answer: httpx.Response = await bench.decide(approval_id, alice, decision="approve")
        stored = await store.approvals.get(approval_id=approval_id)

    assert answer.status_code == 403
    assert "Outside office hours." in answer.json()["detail"]
    assert stored.status == "PENDING"
