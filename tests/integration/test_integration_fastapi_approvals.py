"""The approvals router of the FastAPI integration."""

from __future__ import annotations

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

bench = fastapi_helpers.bench


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


async def test_only_other_approvers_decide_in_time(bench: Bench) -> None:
    """The host's dependency stands before every route; who asked may not approve, and after the deadline nobody."""
    developer, own = await bench.key("dev-agent-2"), await bench.key("dev-agent", role="approver")
    approval_id, _ = await bench.ask()

    for headers, status in ((developer, 403), ({}, 401)):
        answers = [
            await bench.client.get("/approvals", headers=headers),
            await bench.client.get(f"/approvals/{approval_id}", headers=headers),
            await bench.decide(approval_id, headers, decision="approve"),
        ]
        assert [answer.status_code for answer in answers] == [status] * 3
    answer = await bench.decide(approval_id, own, decision="approve")
    assert answer.status_code == 403
    assert answer.json()["detail"] == "dev-agent asked for this call and may not approve it: let somebody else decide."
    assert (await bench.store.approvals.get(approval_id=approval_id)).status == "PENDING"
    async with bench.store.database.write() as connection:
        await connection.execute(text("UPDATE approval_requests SET expires_at = created_at"))
    late = await bench.decide(approval_id, await bench.key("alice", role="approver"), decision="approve")
    assert late.status_code == 410
    assert late.json()["detail"].startswith("The approval has expired")


async def test_what_is_no_decision_decides_nothing(bench: Bench) -> None:
    """Also not what a form of a foreign page could send with the approver's cookies; and a listing needs its terms."""
    alice = await bench.key("alice", role="approver")
    approval_id, _ = await bench.ask()
    as_json = {"headers": {"Content-Type": "application/json"}}
    bodies: list[dict[str, Any]] = [
        {"content": b'{"decision": "approve"}', "headers": {"Content-Type": "text/plain"}},
        {"data": {"decision": "approve"}},
        {"content": b""},
        {"json": {"decision": "perhaps"}},
        {"json": {"decision": "approve", "approver_id": "mallory"}},
        {"json": {"decision": "approve", "note": "x" * 2001}},
        {"json": {"decision": "approve", "note": {"a": 1}}},
        {"content": b'{"decision": "approve"', **as_json},
        {"content": b"[" * 60_000, **as_json},
        {"content": b'{"decision": "approve", "note": "\\ud800"}', **as_json},
        {"content": b'{"decision": "approve", "note": NaN}', **as_json},
        {"content": b'{"decision": -Infinity}', **as_json},
        {"content": b'{"decision": "approve", "\\ud800": 1}', **as_json},
    ]
    for body in bodies:
        options = body | {"headers": alice | body.get("headers", {})}
        answer = await bench.client.post(f"/approvals/{approval_id}/decision", **options)
        assert answer.status_code in (400, 422), body
    huge = await bench.decide(approval_id, alice, decision="approve", note="x" * 100_000)
    questions: list[dict[str, Any]] = [{"cursor": "nonsense"}, {"limit": 0}, {"limit": 501}, {"status": "MAYBE"}]
    listed = [(await bench.client.get("/approvals", headers=alice, params=each)).status_code for each in questions]

    assert (huge.status_code, listed) == (413, [400, 422, 422, 422])
    assert (await bench.store.approvals.get(approval_id=approval_id)).status == "PENDING"


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
