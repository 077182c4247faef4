"""The pages of the console: what they show and to whom it matters, whatever is stored, sent or away."""

from __future__ import annotations

import asyncio
import html
import logging
import random
import re
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import console_helpers
import httpx
import pytest
from console_helpers import Visitor, key_of, signed_in, waiting

from agent_gateway_store import GatewayStore, ToolCall, clock
from agent_gateway_store._text import CUT_CALL
from agent_gateway_store.console.audit import FILTERS
from agent_gateway_store.console.inbox import Watch
from agent_gateway_store.console.sessions import COOKIE
from agent_gateway_store.results import Page
from builders import make_event, make_request
from xss import PAYLOADS

url, store, app = console_helpers.url, console_helpers.store, console_helpers.app


# What nobody sees on a screen, or what reorders it.
HIDDEN = ("\u202e", "\u200b", "\u2066", "\ufeff", "\u00ad", "\U000e0041", "\u3164", "\x1b")


async def test_arguments_and_reasons_of_several_lines_are_shown_as_such(store: GatewayStore, app: Any) -> None:
    """In the inbox and on the page of the approval; and the charts say how long approvals waited for a decision."""
    call = ToolCall(server="files", tool="write", arguments={"path": "/srv/a", "text": "one\ntwo"})
    request = await waiting(store, tool_call=call, risk_explanation="writes a file\nwithout a copy")
    denied = await waiting(store, tool_call=call, request_id="other")
    await store.approvals.deny(approval_id=denied.approval_id, approver_id="bob")
    alice = await signed_in(store, app)

    inbox, page, charts = [
        (await alice.get(path)).text for path in ("/approvals", f"/approvals/{request.approval_id}", "/charts")
    ]

    assert "<pre>{\n  &#34;path&#34;: &#34;/srv/a&#34;,\n  &#34;text&#34;: &#34;one\\ntwo&#34;\n}</pre>" in inbox
    for each in (inbox, page):
        assert "writes a file\nwithout a copy" in each
    [row] = re.findall(r"<h2[^>]*>Approvals</h2>.*?<tbody><tr>(.*?)</tr>", charts, re.DOTALL)
    assert re.findall(r"<td[^>]*>(.*?)</td>", row)[:4] == ["2", "1", "1", "0"]
    assert re.search(r'<td class="num">[0-9]+\.[0-9]</td>', row)


async def test_nothing_becomes_markup_and_nothing_is_hidden(store: GatewayStore, app: Any) -> None:
    """Every payload in every text of a request and an event: no page holds a tag of it, or an unseen character."""
    alice = await signed_in(store, app)
    texts_of = [*PAYLOADS, *(f"a{hidden}b" for hidden in HIDDEN)]
    # Several in one text, which is short enough to be shown whole as an id.
    for number in range(0, len(texts_of), 3):
        payload = " ".join(texts_of[number : number + 3])
        call = ToolCall(server=payload, tool=payload, arguments={payload: payload, "nested": [{payload: payload}]})
        request = await waiting(
            store, request_id=f"{number}{payload}", caller_id=payload, tool_call=call, risk_explanation=payload
        )
        texts = ("caller_id", "mcp_server", "tool_name", "matched_policy_rule", "deterministic_rationale")
        await store.audit.write(
            make_event(
                **dict.fromkeys((*texts, "llm_explanation", "environment", "session_id", "caller_role"), payload),
                request_id=request.request_id,
                sanitized_args={payload: payload},
                risk_labels=[payload],
                extra={payload: payload},
            )
        )
        [event] = await store.audit.search(request_id=request.request_id)
        await alice.decide(request.approval_id, "deny", payload)
        for path in (f"/approvals/{request.approval_id}", f"/audit/{event.id}"):
            harmless(await text_of(alice, path))
        harmless(
            await text_of(alice, f"/audit?{httpx.QueryParams({'caller_id': payload, 'text': payload})}"), typed=True
        )
    for path in ("/approvals?status=ALL", "/audit"):
        harmless(await text_of(alice, path))


async def text_of(visitor: Visitor, path: str) -> str:
    answer = await visitor.get(path)
    assert answer.status_code == 200, (path, answer.text[:500])
    return answer.text


def tags(text: str) -> set[str]:
    return set(re.findall(r"<(\w+)", text))


OURS = """html head meta title link script body a header span nav form b small input button main p h1 h2 h3 section
    div ol ul li dl dt dd pre code details summary time table thead tbody tr th td blockquote label
    fieldset legend textarea"""


def harmless(text: str, *, typed: bool = False) -> None:
    """Check that a page holds our elements and attributes alone, and no character that is not seen."""
    assert tags(text) <= set(OURS.split())
    assert len(re.findall("<script", text)) == 1
    assert not re.search(r"<[^>]*\s(?:on\w+|style|srcdoc|formaction)=", re.sub(r'"[^"]*"', '""', text))
    # A field of a form holds what was typed, as it was typed.
    shown = html.unescape(re.sub(r'value="[^"]*"', "", text) if typed else text)
    assert all(each.isprintable() or each == "\n" for each in shown), [each for each in shown if not each.isprintable()]


async def test_long_values_are_whole_on_the_page_of_their_approval_alone(store: GatewayStore, app: Any) -> None:
    alice = await signed_in(store, app)
    arguments = {"body": "x" * 30_000 + "THE-END", "lines": [f"line {number}" for number in range(2_000)]}
    call = ToolCall(server="s", tool="t", arguments=arguments)
    first = await waiting(store, tool_call=call, risk_explanation="why " * 10_000)
    await alice.decide(first.approval_id, "deny")
    many = call.model_copy(update={"arguments": {f"name {number}": number for number in range(101)}})
    second = await waiting(store, tool_call=many)
    await waiting(store, tool_call=call.model_copy(update={"tool": "t" * 60_000}))
    own = f"/approvals/{first.approval_id}"

    page, inbox, later = [
        await text_of(alice, path) for path in (own, "/approvals?status=ALL", f"/approvals/{second.approval_id}")
    ]

    for word in ("THE-END", "line 1999", "why " * 10_000, "<details><summary><code>", "show all"):
        assert word in page, word[:20]
    assert len(inbox) < 10_000
    assert CUT_CALL not in page + inbox
    for each in (inbox, later):
        assert "THE-END" not in each
        assert re.search(rf'<code>[^<]+xxx…</code> <a href="{own}">show all [0-9,]+ characters</a>', each)
    # A browser takes half a minute to lay out the most names that can be stored.
    assert "name 100" in later
    assert "<dt><code>name 100" not in later


async def test_a_call_that_was_not_stored_whole_says_so(store: GatewayStore, app: Any) -> None:
    arguments = {"sql": "SELECT 1; -- " + "harmless " * 8_000 + "\nDROP TABLE customers;"}
    request = await waiting(store, tool_call=ToolCall(server="db", tool="query", arguments=arguments))
    alice = await signed_in(store, app)

    for path in ("/approvals", f"/approvals/{request.approval_id}"):
        text = (await alice.get(path)).text
        assert CUT_CALL in text
        assert "show what is stored of it, " in text
        assert "show all" not in text


async def test_no_token_key_or_session_is_on_a_page_in_a_log_or_in_a_url(
    store: GatewayStore, app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "agent_gateway_store.console")
    request = make_request()
    token = await store.approvals.issue_token(request)
    key = await key_of(store)
    alice = Visitor(app)
    await alice.sign_in("agw_" + "w" * 55)
    await alice.sign_in(key)
    pages = [
        await alice.get(path) for path in ("/approvals", f"/approvals/{request.approval_id}", "/audit", "/audit/1")
    ]
    pages.append(await alice.decide(request.approval_id, "approve"))

    written = caplog.text + "".join(f"{each.text}{each.url}{each.headers.get('location')}" for each in pages)
    for secret in (key, token, alice.client.cookies[COOKIE], "w" * 20):
        assert secret not in written
    for words in ("refused", "alice signed in", f"alice decided to approve {request.approval_id}"):
        assert words in caplog.text


async def test_every_filter_of_search_is_in_the_form(store: GatewayStore, app: Any) -> None:
    from agent_gateway_store.audit.filters import Filters

    alice = await signed_in(store, app)

    form = (await alice.get("/audit")).text
    wrong = await alice.get("/audit?min_risk_score=many&caller_id=dev-agent")
    unknown = await alice.get("/audit?caller=dev-agent&tool_name=rm")

    assert sorted(FILTERS) == sorted(Filters.__annotations__)
    assert set(FILTERS) <= set(re.findall(r'name="(\w+)"', form))
    assert wrong.status_code == 400
    assert "must be a number" in wrong.text
    assert 'value="dev-agent"' in wrong.text
    assert unknown.status_code == 400
    assert "There is no filter &#39;caller&#39;." in unknown.text
    assert 'value="rm"' in unknown.text


async def test_lists_are_walked_page_by_page(store: GatewayStore, app: Any) -> None:
    """The link to older ones keeps the filters, and each event and approval is on one page."""
    await store.audit.write_many([make_event(caller_id="walker", session_id="s") for _ in range(120)])
    await store.audit.write_many([make_event(caller_id="other") for _ in range(20)])
    expires_at = clock.utc_now() + timedelta(hours=1)
    async with store.database.sessions() as session, session.begin():
        session.add_all(make_request(tool_call_hash="0" * 64, expires_at=expires_at) for _ in range(120))
    alice = await signed_in(store, app)

    async def walked(path: str, pattern: str) -> list[str]:
        found = []
        while path:
            text = await text_of(alice, path)
            found += re.findall(pattern, text)
            older = re.search(r'rel="next" href="([^"]+)"', text)
            path = html.unescape(older[1]) if older else ""
        return found

    events = await walked("/audit?caller_id=walker&decision=ALLOW&decision=DENY", r'href="/audit/(\d+)"')
    waiting_ids = await walked("/approvals", r'data-id="([\w-]+)"')

    for found in (events, waiting_ids):
        assert len(found) == len(set(found)) == 120
    middle = await text_of(alice, f"/audit/{events[60]}")
    assert set(events[56:65]) <= set(re.findall(r'href="/audit/(\d+)"', middle))


@pytest.mark.system
@pytest.mark.parametrize("count", [500, pytest.param(5_000, marks=pytest.mark.slow)])
async def test_fuzzed_requests_are_never_an_error_of_ours(store: GatewayStore, app: Any, count: int) -> None:
    request = await waiting(store)
    await store.audit.write(make_event())
    alice, dice = await signed_in(store, app), random.Random(7)
    csrf = await alice.csrf()
    pieces = ["", "0", "-1", "9" * 30, "%00", "%ff%fe", "é", "☃", "..", "%2e%2e", "'", '"', "<", "24h", "NaN", "1e999"]
    pieces += ["%F0%9F", "a" * 600, "PENDING", "ALLOW", "true", "null", "\u202e", str(request.approval_id), "=", "&"]
    paths = ["/approvals", "/approvals/{}", "/approvals/{}/decision", "/audit", "/audit/{}", "/audit/{}/evidence.json"]
    paths += ["/login", "/logout", "/charts/{}.svg", "/{}", "/static/{}/console.css", "/readyz"]
    names = [*FILTERS, "cursor", "status", "next", "decision", "note", "csrf", "key"]

    for number in range(count):
        path = dice.choice(paths).format(dice.choice(pieces))
        values = [(dice.choice(names), dice.choice(pieces)) for _ in range(dice.randrange(4))]
        query = "&".join(f"{name}={value}" for name, value in values)
        body = (query if dice.random() < 0.8 else dice.choice(pieces)).encode()
        if dice.random() < 0.7:
            answer = await alice.get(f"{path}?{query}")
        else:
            body += f"&csrf={csrf}".encode() if path != "/logout" else b""
            kind = dice.choice(
                ["application/x-www-form-urlencoded", "text/plain", "", "multipart/form-data; boundary=x"]
            )
            answer = await alice.client.post(path, content=body, headers={"Content-Type": kind})
        assert answer.status_code < 500, (number, path, query, body, answer.text[:300])


async def test_the_version_of_a_list_changes_exactly_with_the_list(store: GatewayStore, app: Any) -> None:
    """Browsers compare it in place of texts, whose length agents choose: no time that is left changes it."""
    alice = await signed_in(store, app)
    elsewhere = store.for_org("elsewhere")
    paths, requests = ("/approvals", "/approvals?status=ALL"), []

    async def ask(**fields: Any) -> None:
        requests.append(await waiting(store, expires_at=clock.utc_now() + timedelta(minutes=5), **fields))

    async def vote(approver_id: str) -> None:
        await store.approvals.approve(approval_id=requests[0].approval_id, approver_id=approver_id)

    async def move(minutes: int) -> None:
        clock.move(timedelta(minutes=minutes))

    async def ask_for_more_than_a_page() -> None:
        for _ in range(51):
            await ask()

    async def versions() -> list[str]:
        return [re.findall(r'data-version="(\w+)"', await text_of(alice, path))[0] for path in paths]

    seen = await versions()
    for change, changes in (
        (partial(ask, required_approvals=2), [True, True]),
        (partial(move, 1), [False, False]),
        (partial(waiting, elsewhere, org_id="elsewhere"), [False, False]),
        (partial(vote, "bob"), [True, True]),
        (ask, [True, True]),
        (partial(vote, "carol"), [True, True]),
        (partial(move, 6), [True, True]),
        (ask_for_more_than_a_page, [True, True]),
        (partial(move, 1), [False, False]),
    ):
        await change()
        before, seen = seen, await versions()
        assert [old != new for old, new in zip(before, seen, strict=True)] == changes, change
    [script] = re.findall(r'<script src="([^"]+)"', await text_of(alice, "/approvals"))
    assert not re.search(r"\.(replace|match|matchAll|test|exec|search|split)\(", await text_of(alice, script))


async def test_a_slow_read_for_one_organisation_holds_up_no_other() -> None:
    watch, goes_on, reads = Watch(), asyncio.Event(), list[str]()

    def session(org_id: str, *, is_slow: bool) -> Any:
        async def search(**_: Any) -> list[Any]:
            reads.append(org_id)
            if is_slow:
                await goes_on.wait()
            return Page([])

        return SimpleNamespace(org_id=org_id, store=SimpleNamespace(approvals=SimpleNamespace(search=search)))

    slow = [asyncio.create_task(watch.look(session("slow", is_slow=True))) for _ in range(2)]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        _, waits = await watch.look(session("quick", is_slow=False))
    goes_on.set()

    assert [waits, *(found for _, found in await asyncio.gather(*slow))] == [0, 0, 0]
    assert reads == ["slow", "quick"]


async def test_events_tell_of_what_is_new(store: GatewayStore, app: Any) -> None:
    alice = await signed_in(store, app)
    await waiting(store)

    assert (await Visitor(app).get("/events")).status_code == 401
    scope = {"type": "http", "method": "GET", "path": "/events", "raw_path": b"/events", "query_string": b""}
    cookie = f"{COOKIE}={alice.client.cookies[COOKIE]}".encode()
    scope |= {"headers": [(b"cookie", cookie), (b"last-event-id", b"old")], "scheme": "http", "server": ("c", 80)}
    parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    hangs_up = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await hangs_up.wait()
        return {"type": "http.disconnect"}

    task = asyncio.create_task(app(scope, receive, parts.put))
    async with asyncio.timeout(10):
        start, *bodies = [await parts.get() for _ in range(3)]
    hangs_up.set()
    await task

    assert b"event: inbox\ndata: 1" in b"".join(part["body"] for part in bodies)
    # By this nginx passes it on at once.
    assert (b"x-accel-buffering", b"no") in start["headers"]
