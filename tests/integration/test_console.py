"""The console: who may enter and until when, what a page shows, what a form does, and what is refused."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import console_helpers
import pytest
from console_helpers import URL, Visitor, console, key_of, signed_in, status, waiting
from starlette.applications import Starlette
from starlette.routing import Mount

from agent_gateway_store import GatewayStore, clock
from agent_gateway_store.evidence import check
from builders import make_event

url, store, app = console_helpers.url, console_helpers.store, console_helpers.app


async def test_a_person_signs_in_decides_and_finds_it_in_the_audit_log(store: GatewayStore, app: Any) -> None:
    request = await waiting(store)
    call = {"mcp_server": request.tool_call.server, "tool_name": request.tool_call.tool, "caller_id": request.caller_id}
    await store.audit.write(make_event(request_id=request.request_id, risk_labels=["deletes"], risk_score=0.75, **call))
    alice = await signed_in(store, app)
    inbox = (await alice.get("/")).headers["location"]

    listed = (await alice.get(inbox)).text
    detail = (await alice.get(f"/approvals/{request.approval_id}")).text
    decided = await alice.decide(request.approval_id, "deny", "Still needed.")

    assert f"/approvals/{request.approval_id}" in listed
    for shown in ("files.delete_file", "/tmp/report.txt", "dev-agent", "deletes", "0.75", "allow-reads"):
        assert shown in detail
    assert (decided.status_code, decided.headers["location"]) == (303, f"/approvals/{request.approval_id}")
    found = await store.approvals.get(approval_id=request.approval_id)
    assert (found.status, found.approver_id, found.approver_note) == ("DENIED", "alice", "Still needed.")
    votes = [row for row in await store.approvals.history(request.approval_id) if row["event"] == "vote"]
    assert [vote["channel"] for vote in votes] == ["console"]
    event = (await store.audit.search(request_id=request.request_id))[0]
    page = (await alice.get(f"/audit?request_id={request.request_id}&decision=ALLOW")).text
    assert f"/audit/{event.id}" in page
    shown = (await alice.get(f"/audit/{event.id}")).text
    assert f"/approvals/{request.approval_id}" in shown
    assert "Still needed." in shown


async def test_another_organisation_is_not_there(store: GatewayStore, app: Any) -> None:
    """Its approvals, events and evidence look absent, and cannot be decided or found by a filter."""
    request = await waiting(store, org_id="globex", caller_id="globex-agent")
    await store.audit.write(make_event(org_id="globex", caller_id="globex-agent"))
    [event] = await store.audit.search(caller_id="globex-agent")
    alice, globe = await signed_in(store, app), await signed_in(store, app, "gina", org_id="globex")

    for path in (f"/approvals/{request.approval_id}", f"/audit/{event.id}", f"/audit/{event.id}/evidence.json"):
        assert await status(alice, path) == 404
    answer = await alice.decide(request.approval_id, "approve", "my note")
    assert (answer.status_code, "my note</textarea>" in answer.text) == (404, True)
    for path in ("/approvals?status=ALL", "/audit?org_id=globex", "/audit"):
        assert "globex-agent" not in (await alice.get(path)).text
    assert await status(globe, f"/approvals/{request.approval_id}") == 200
    assert (await store.approvals.get(approval_id=request.approval_id)).status == "PENDING"


async def test_an_event_is_shown_as_sealed_once_it_is(store: GatewayStore, app: Any) -> None:
    await store.audit.write(make_event(request_id="r-1"))
    [event] = await store.audit.search(request_id="r-1")
    alice = await signed_in(store, app)
    path = f"/audit/{event.id}/evidence.json"

    before = await status(alice, path), "Not sealed." in (await alice.get(f"/audit/{event.id}")).text
    await store.evidence.seal()
    after = await alice.get(path)

    assert before == (404, True)
    assert path in (await alice.get(f"/audit/{event.id}")).text
    assert check(after.text).ok


async def test_a_form_of_another_site_or_session_does_nothing(store: GatewayStore, app: Any) -> None:
    """Without the session's own secret, or with the marks of another site, a decision is refused."""
    request = await waiting(store)
    alice, bob = await signed_in(store, app), await signed_in(store, app, "bob")
    path, right = f"/approvals/{request.approval_id}/decision", await alice.csrf()
    form = {"decision": "approve", "csrf": right}

    answers = [
        await alice.post(path, form | {"csrf": "", "note": "kept <b>"}),
        await alice.post(path, form | {"csrf": await bob.csrf()}),
        await alice.post(path, {"decision": "approve"}),
        await alice.post(path, form, headers={"Origin": "https://evil.example"}),
        await alice.post(path, form, headers={"Origin": "null"}),
        await alice.post(path, form, headers={"Sec-Fetch-Site": "cross-site"}),
        await alice.post("/logout", {}),
        await alice.client.post("/login", data={"key": "x"}, headers={"Origin": "https://evil.example"}),
    ]

    assert [answer.status_code for answer in answers] == [403] * 8
    assert "kept &lt;b&gt;</textarea>" in answers[0].text
    assert (await store.approvals.get(approval_id=request.approval_id)).status == "PENDING"
    assert (await alice.post(path, form, headers={"Origin": URL})).status_code == 303


async def test_every_answer_carries_the_headers_that_protect_it(store: GatewayStore, app: Any) -> None:
    """No frame, no cache, no script but our own, on errors and redirects, too; no page holds inline script or style."""
    request = await waiting(store)
    alice = await signed_in(store, app)

    for path in (
        "/",
        "/login",
        "/approvals",
        f"/approvals/{request.approval_id}",
        "/audit",
        "/charts",
        "/no",
        "/healthz",
    ):
        answer = await alice.get(path)
        policy = answer.headers["content-security-policy"]
        assert all(each in policy for each in ("default-src 'none'", "frame-ancestors 'none'"))
        assert "unsafe" not in policy
        assert (answer.headers["cache-control"], answer.headers["x-frame-options"]) == ("no-store", "DENY")
        assert not re.search(r"<style|<script(?! src=)|\son\w+=|\sstyle=|javascript:|https?://", answer.text), path


async def test_it_works_under_a_path(store: GatewayStore, app: Any) -> None:
    request = await waiting(store)
    visitor = Visitor(Starlette(routes=[Mount("/ops/console", app)]), base="/ops/console")
    await visitor.sign_in(await key_of(store))

    pages = [(await visitor.get(path)).text for path in ("/approvals", f"/approvals/{request.approval_id}", "/audit")]
    links = [link for page in pages for link in re.findall(r'(?:href|src|action|data-events)="(/[^"]*)"', page)]

    assert len(links) > 20
    assert all(link.startswith("/ops/console/") for link in links)
    assert await visitor.decide(request.approval_id, "approve")
    assert (await store.approvals.get(approval_id=request.approval_id)).status == "APPROVED"


async def test_after_sign_in_it_leads_back_and_nowhere_else(store: GatewayStore, app: Any) -> None:
    """A link to an approval survives the sign-in, refused keys too; a link to another site does not."""
    key = await key_of(store)
    stranger = Visitor(app)
    asked = (await stranger.get("/approvals?status=ALL")).headers["location"]
    form = (await stranger.get(asked)).text

    assert 'name="next" value="/approvals?status=ALL"' in form
    for wish, reached in (
        ("/approvals?status=ALL", "/approvals?status=ALL"),
        ("//evil.example", "/approvals"),
        ("https://evil.example", "/approvals"),
        ("/\\evil.example", "/approvals"),
        ("/approvals//evil.example\r\nX: y", "/approvals"),
        ("/logout", "/approvals"),
        ("/approvals/../../x", "/approvals"),
        ("/approvals/%2e%2e/x", "/approvals"),
        ("/audit?text=a..b", "/audit?text=a..b"),
        ("/audit?text=a,b(c)", "/audit?text=a,b(c)"),
    ):
        answer = await Visitor(app).post("/login", {"key": key, "next": wish})
        assert answer.headers["location"] == reached
    refused = [await stranger.post("/login", {"key": "agw_typo", "next": "/audit?tool=rm"}) for _ in range(11)]
    foreign = await stranger.post("/login", {"key": "agw_typo", "next": "//evil.example"})
    assert [answer.status_code for answer in refused] == [403] * 10 + [429]
    assert all('name="next" value="/audit?tool=rm"' in answer.text for answer in refused)
    assert "evil" not in foreign.text


@pytest.mark.parametrize(("proxies", "seen"), [("192.0.2.0/24", "203.0.113.9"), ("198.51.100.1", "192.0.2.1")])
async def test_forwarded_headers_are_believed_from_named_proxies_alone(url: str, proxies: str, seen: str) -> None:
    """The address of a sign-in is the one that a trusted proxy names, else that of the connection."""
    async with console(url, console_trusted_proxies=proxies) as (store, app):
        visitor = Visitor(app)
        headers = {"X-Forwarded-For": "10.9.9.9, 203.0.113.9", "X-Forwarded-Proto": "https"}
        answer = await visitor.post("/login", {"key": await key_of(store)}, headers=headers)
        [event] = await store.audit.search(tool_name="console.sign_in")

    assert event.sanitized_args == {"address": seen}
    assert ("secure" in answer.headers["set-cookie"].lower()) == (seen == "203.0.113.9")


async def test_large_and_foreign_forms_are_refused(store: GatewayStore, app: Any) -> None:
    alice = await signed_in(store, app)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"key=" + b"x" * 10_000

    form = {"Content-Type": "application/x-www-form-urlencoded"}
    named = await alice.post("/login", {"key": "x" * 210_000})
    streamed = await alice.client.post("/login", content=endless(), headers=form)
    fields = await alice.client.post("/login", content="&".join(f"k{n}=1" for n in range(100)), headers=form)
    other = await alice.client.post("/login", json={"key": "x"})

    assert [each.status_code for each in (named, streamed, fields, other)] == [413, 413, 400, 415]


async def test_of_two_approvers_the_second_reads_who_was_first(store: GatewayStore, app: Any) -> None:
    request = await waiting(store)
    people = [await signed_in(store, app, name) for name in ("alice", "bob")]

    answers = await asyncio.gather(
        people[0].decide(request.approval_id, "approve", "fine"), people[1].decide(request.approval_id, "deny", "no")
    )

    assert sorted(answer.status_code for answer in answers) == [303, 409]
    [(late, note)] = [each for each in zip(answers, ("fine", "no"), strict=True) if each[0].status_code == 409]
    winner = (await store.approvals.get(approval_id=request.approval_id)).approver_id
    assert f"{winner} was first" in late.text
    assert f"readonly>\n{note}</textarea>" in late.text


@pytest.mark.parametrize(
    ("form", "code", "said"),
    [
        ({"decision": "deny", "note": " \u200b"}, 400, "needs a note"),
        ({"decision": "maybe"}, 400, "approve or deny"),
        ({"decision": "approve", "note": "x" * 20_001}, 400, "xx</textarea>"),
        ({"decision": "approve", "note": "own"}, 403, "may not"),
    ],
    ids=["no note", "no decision", "long note", "own call"],
)
async def test_a_decision_that_cannot_be_is_explained(url: str, form: dict[str, str], code: int, said: str) -> None:
    async with console(url, console_require_note=True) as (store, app):
        request = await waiting(store, caller_id="alice" if code == 403 else "dev-agent")
        alice = await signed_in(store, app)
        answer = await alice.post(f"/approvals/{request.approval_id}/decision", form | {"csrf": await alice.csrf()})
        found = await store.approvals.get(approval_id=request.approval_id)

    assert (answer.status_code, found.status) == (code, "PENDING")
    assert said in answer.text


async def test_an_approval_that_expired_says_so(store: GatewayStore, app: Any) -> None:
    """Or was withdrawn for other terms: a form that was open is answered with the reason, and none is offered."""
    request = await waiting(store, expires_at=clock.utc_now() + timedelta(minutes=1))
    alice, withdrawn = await signed_in(store, app), await waiting(store, request_id="r-2")
    await waiting(store, request_id="r-2", risk_explanation="milder")

    other = await alice.decide(withdrawn.approval_id, "approve")
    clock.move(timedelta(minutes=2))
    answer = await alice.decide(request.approval_id, "approve", "late <b>")

    assert (other.status_code, "withdrew this request" in other.text, "was first" in other.text) == (409, True, False)
    assert (answer.status_code, "expired" in answer.text) == (409, True)
    assert "readonly>\nlate &lt;b&gt;</textarea>" in answer.text
    assert 'value="approve"' not in answer.text
