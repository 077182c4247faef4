"""The console, as somebody tries it who can read the log, write events, cut connections, or only clicks twice."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from typing import Any

import console_helpers
import pytest
from console_helpers import Visitor, console, key_of, signed_in, status, waiting
from pydantic import ValidationError

from agent_gateway_store import ApprovalScope, GatewayStore, StoreSettings, ToolCall
from agent_gateway_store.console import safety
from agent_gateway_store.console.sessions import COOKIE
from agent_gateway_store.models.approval import hash_approval
from builders import make_event

url, store, app = console_helpers.url, console_helpers.store, console_helpers.app


async def test_a_sign_in_that_was_written_by_somebody_else_opens_nothing(store: GatewayStore, app: Any) -> None:
    """All that the log shows of a session, under a cookie of one's own; and its ids as the cookie."""
    alice = await signed_in(store, app)
    [seen] = await store.audit.search(tool_name="console.sign_in")
    cookie = secrets.token_urlsafe(32)
    digest = hmac.new(cookie.encode(), b"console.sign_in", hashlib.sha256).hexdigest()
    same = seen.model_dump(exclude={"id", "content_hash", "request_id"})
    assert await store.audit.write(make_event(**same, request_id=f"console.sign_in-{digest}")) == "STORED"
    for forged in (cookie, seen.request_id, seen.request_id.removeprefix("console.sign_in-")):
        mallory = Visitor(app)
        mallory.client.cookies.set(COOKIE, forged)
        assert await status(mallory) == 303
    assert alice.client.cookies[COOKIE] not in seen.model_dump_json()


async def test_why_it_was_stopped_is_of_this_call(store: GatewayStore, app: Any) -> None:
    harmless = make_event(request_id="r-1", matched_policy_rule="harmless-rule", tool_name="look")
    await store.audit.write(harmless)
    request = await waiting(store, request_id="r-1", tool_call=ToolCall(server="bank", tool="pay", arguments={}))
    stopped = {
        "mcp_server": "bank",
        "tool_name": "pay",
        "caller_id": request.caller_id,
        "decision": "APPROVAL_REQUIRED",
    }
    await store.audit.write(
        make_event(request_id="r-1", matched_policy_rule="block-payments", approval_id=request.approval_id, **stopped)
    )
    alice = await signed_in(store, app)
    page = (await alice.get(f"/approvals/{request.approval_id}")).text
    [first] = await store.audit.search(tool_name="look")

    assert "block-payments" in page
    assert "harmless-rule" not in page.partition("This caller in the last 24 hours")[0]
    assert str(request.approval_id) not in (await alice.get(f"/audit/{first.id}")).text


async def test_an_approval_under_the_same_request_id_is_not_shown_as_that_of_the_call(
    store: GatewayStore, app: Any
) -> None:
    """A harmless call of the same tool was approved; another one of its request id ran, and then the same."""
    call = ToolCall(server="db", tool="query", arguments={"sql": "SELECT 1"})
    await waiting(store, request_id="r-1", tool_call=call)
    same = {"mcp_server": "db", "tool_name": "query"}
    for sql in ("DROP TABLE customers", "SELECT 1"):
        raw = store.hash_args({"sql": sql})
        await store.audit.write(make_event(request_id="r-1", raw_args_hash=raw, sanitized_args={"sql": sql}, **same))
    alice = await signed_in(store, app)
    asked_before = "Asked under the same request id, not proved to be of this call."
    other, own = [
        (await alice.get(f"/audit/{each.id}")).text
        for each in sorted(await store.audit.search(tool_name="query"), key=lambda each: each.id or 0)
    ]

    assert asked_before in other
    assert asked_before not in own


async def test_an_approval_that_was_changed_after_its_call_is_not_shown_as_sealed(
    store: GatewayStore, app: Any
) -> None:
    """By whoever may write to its table; of an event without its hash the page says that nothing proves it."""
    request = await waiting(store)
    found = await store.approvals.approve(approval_id=request.approval_id, approver_id="carol")
    named = await store.approvals.get(approval_id=found.approval_id)
    for request_id, extra in (("held", {"approval_sha256": hash_approval(named, named.votes or ())}), ("bare", {})):
        await store.audit.write(make_event(request_id=request_id, approval_id=named.approval_id, extra=extra))
    alice = await signed_in(store, app)

    async def said(request_id: str) -> list[bool]:
        [event] = await store.audit.search(request_id=request_id)
        text = (await alice.get(f"/audit/{event.id}")).text
        return [words in text for words in ("The event holds another hash", "nothing proves that it was decided")]

    before = [await said("held"), await said("bare")]
    after = []
    for change in ("approver_id = 'dave'", f"tool_call_hash = '{'0' * 64}', risk_explanation = '[ERASED]'"):
        async with store.database.engine.begin() as connection:
            await connection.exec_driver_sql(f"UPDATE approval_requests SET {change}")
        after.append(await said("held"))

    assert before == [[False, False], [False, True]]
    # What was erased is another one, too, and nobody has forged it.
    assert after == [[True, False], [False, False]]


@pytest.mark.parametrize(("is_cut", "answer"), [(True, 413), (False, 408)], ids=["cut", "slow"])
async def test_a_form_that_ends_too_early_decides_nothing(
    store: GatewayStore, app: Any, monkeypatch: pytest.MonkeyPatch, is_cut: bool, answer: int
) -> None:
    """A connection that is cut in the middle of the note; one on which the rest never comes is not held for long."""
    monkeypatch.setattr(safety, "BODY_S", 30.0 if is_cut else 0.05)
    request = await waiting(store)
    alice = await signed_in(store, app)
    form = f"decision=approve&csrf={await alice.csrf()}&note=on+condi".encode()
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": form, "more_body": True}]
    messages += [{"type": "http.disconnect"}] * is_cut
    sent: list[dict[str, Any]] = []
    cookie = f"{COOKIE}={alice.client.cookies[COOKIE]}"
    headers = {"host": "console.test", "cookie": cookie, "content-type": "application/x-www-form-urlencoded"}
    path = f"/approvals/{request.approval_id}/decision"
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("192.0.2.1", 1),
        "server": ("console.test", 80),
    }

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async with asyncio.timeout(10):
        await app(scope, receive, send)

    assert sent[0]["status"] == answer
    assert ((b"connection", b"close") in sent[0]["headers"]) == (not is_cut)
    assert (await store.approvals.get(approval_id=request.approval_id)).status == "PENDING"


async def test_forms_come_from_where_a_browser_says(url: str) -> None:
    for console_url, origin in (
        ("https://gateway.example:443/console", "https://gateway.example"),
        ("http://gateway.example:80", "http://gateway.example"),
        ("https://gateway.example:8443", "https://gateway.example:8443"),
        ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example"),
        ("http://my_host:8000", "http://my_host:8000"),
        ("http://[::1]:8765", "http://[::1]:8765"),
    ):
        async with console(url, console_url=console_url) as (store, app):
            key = await key_of(store, origin)
            answer = await Visitor(app).post("/login", {"key": key}, headers={"Origin": origin})
            assert answer.status_code == 303, console_url
    for wrong in ("bücher.example", "host:99999", "host:0", "host/con%20sole", "host//x"):
        with pytest.raises(ValidationError):
            StoreSettings(console_url=f"https://{wrong}")


async def test_the_second_click_is_no_conflict(store: GatewayStore, app: Any) -> None:
    """Of the same person with the same decision; another decision is one. A long note of any alphabet is kept."""
    request, note = await waiting(store), "批准" * 10_000
    alice = await signed_in(store, app)
    answers = [await alice.decide(request.approval_id, each, note) for each in ("approve", "approve", "deny")]

    assert [each.status_code for each in answers] == [303, 303, 409]
    assert (await store.approvals.get(approval_id=request.approval_id)).approver_note == note


async def test_odd_addresses_are_not_there(store: GatewayStore, app: Any) -> None:
    alice = await signed_in(store, app)
    host = {"Host": "internal:8765"}
    paths = [f"/audit/{'9' * 5_000}", f"/audit/{'9' * 19}", "/audit/x", "/audit/-1", "/audit/1/evidence.json"]
    answers = [await alice.get(path, headers=host) for path in paths]
    slash = await alice.get("/approvals/", headers=host)

    assert [each.status_code for each in answers] == [404] * 5
    assert (slash.status_code, slash.headers["location"]) == (307, "/approvals")


async def test_an_output_that_is_to_be_released_is_shown(store: GatewayStore, app: Any) -> None:
    request = await waiting(store, scope=ApprovalScope.OUTPUT_RELEASE, output_payload={"rows": ["the secret row"]})
    alice = await signed_in(store, app)
    page, inbox = (await alice.get(f"/approvals/{request.approval_id}")).text, (await alice.get("/approvals")).text

    assert "the secret row" in page
    assert "What will be released" in page
    assert "releases the output of the call" in inbox
