"""The inbox of an approver, without a browser: what it shows, what a click does, what it says."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_gateway_store import ApprovalRequest, GatewayStore, SyncGatewayStore
from agent_gateway_store._text import CUT_CALL
from agent_gateway_store.errors import ApprovalAlreadyDecidedError, MissingExtraError
from agent_gateway_store.notebook import inbox
from builders import make_request

pytestmark = pytest.mark.unit

NASTY = "<b>x</b>\u202e"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SyncGatewayStore]:
    with SyncGatewayStore(f"sqlite:///{tmp_path}/gateway.db") as opened:
        yield opened


@pytest.fixture
async def awaited(tmp_path: Path) -> AsyncIterator[GatewayStore]:
    async with GatewayStore(f"sqlite:///{tmp_path}/awaited.db") as opened:
        yield opened


def request(name: str = "a.txt", **fields: Any) -> ApprovalRequest:
    return make_request(tool_call={"server": "files", "tool": "delete_file", "arguments": {"path": name}}, **fields)


def click(shown: Any, **message: Any) -> list[dict[str, Any]]:
    replies: list[dict[str, Any]] = []
    shown.send = replies.append
    shown._handle_custom_msg(message, [])
    return replies


def test_a_click_decides_under_the_approvers_name(store: SyncGatewayStore) -> None:
    """With the note and the channel, and the item goes; who was slower reads who won, and changes nothing."""
    token, taken = store.approvals.issue_token(request()), store.approvals.issue_token(request("b.txt"))
    shown: Any = inbox(store, approver="alice")
    late, item = shown.items
    store.approvals.deny(taken, approver_id="bob")

    replies = click(shown, do="approve", approval_id=item["id"], note="ok", approver_id="mallory", approver="mallory")
    replies += click(shown, do="approve", approval_id=late["id"])

    result = store.approvals.check_token(token, fresh=True)
    assert (result.status, result.approver_id, result.note) == ("APPROVED", "alice", "ok")
    assert store.approvals.check_token(taken, fresh=True).approver_id == "bob"
    assert replies[0] == {"answered": "approve", "approval_id": item["id"]}
    assert replies[-1] == {"answered": "approve", "approval_id": late["id"]}
    assert shown.items == []
    told, first = shown.said
    assert (first["text"], first["tone"]) == ("Approved: files.delete_file", "good")
    assert ("bob" in told["text"], told["tone"]) == (True, "wait")


def test_a_call_that_was_not_stored_whole_says_so(store: SyncGatewayStore) -> None:
    store.approvals.issue_token(request())
    store.approvals.issue_token(request("x" * 70_000))
    cut, whole = inbox(store, approver="alice").items  # type: ignore[attr-defined]

    assert cut["why"].startswith(f"{CUT_CALL} ")
    assert "characters of what is stored)" in cut["arguments"]
    assert CUT_CALL not in whole["why"]
    assert inbox(store, approver="alice", widgets=False)._repr_html_().count(CUT_CALL) == 1


def test_a_refresh_shows_what_came(store: SyncGatewayStore) -> None:
    shown, bound = (inbox(each, approver="alice") for each in (store, store.for_org("acme")))
    assert shown.items == []  # type: ignore[attr-defined]
    for name, org_id in (("a.txt", "acme"), ("b.txt", "other")):
        store.approvals.issue_token(request(name, org_id=org_id))
    a, b = (f'{{\n  "path": "{name}.txt"\n}}' for name in "ab")

    for each, found in ((shown, [b, a]), (bound, [a])):
        click(each, do="refresh")
        assert [item["arguments"] for item in each.items] == found  # type: ignore[attr-defined]
    data, _ = bound._repr_mimebundle_()  # type: ignore[attr-defined]
    assert "application/vnd.jupyter.widget-view+json" in data
    assert "store.approvals.approve(" in data["text/html"]
    assert data["text/plain"].startswith("1 waiting for alice\nstore.approvals.approve(")
    for blank in ("", " \t", "\u200b"):
        with pytest.raises(ValueError, match="approver must not be empty"):
            inbox(store, approver=blank)


def test_a_strange_message_decides_nothing(store: SyncGatewayStore) -> None:
    token = store.approvals.issue_token(request())
    shown: Any = inbox(store, approver="alice")
    strange: list[dict[str, Any]] = [{}, {"do": "drop"}, {"do": "approve"}, {"do": "approve", "approval_id": "x"}]

    for message in (*strange, {"do": "deny", "approval_id": [1]}):
        assert click(shown, **message)
    shown._handle_custom_msg("approve", [])

    assert store.approvals.check_token(token, fresh=True).status == "PENDING"


async def test_an_asynchronous_store_is_awaited_in_its_own_loop(awaited: GatewayStore) -> None:
    """JupyterLab delivers a widget's messages in another thread, with another loop: the store is not used there."""
    token = await awaited.approvals.issue_token(request())
    shown: Any = inbox(awaited, approver="alice")
    assert shown.items == []
    await shown.refresh()
    replies: list[Any] = []
    shown.send = replies.append

    async def elsewhere() -> None:
        shown._handle_custom_msg({"do": "deny", "approval_id": shown.items[0]["id"], "note": "no"}, [])

    await asyncio.to_thread(asyncio.run, elsewhere())
    async with asyncio.timeout(5):
        while not replies:
            await asyncio.sleep(0.01)

    result = await awaited.approvals.check_token(token, fresh=True)
    assert (result.status, result.approver_id, result.note) == ("DENIED", "alice", "no")
    assert shown.items == []


async def test_its_methods_work_without_a_browser(awaited: GatewayStore, store: SyncGatewayStore) -> None:
    first, second = request(), request("b.txt")
    for asked in (first, second):
        store.approvals.issue_token(asked)
        await awaited.approvals.issue_token(asked.model_copy())
    plain, waiting = (inbox(each, approver="alice", widgets=False) for each in (store, awaited))

    plain.approve(str(first.approval_id), "fine")
    await waiting.deny(str(first.approval_id))

    assert [each.approval_id for each in plain.waiting] == [each.approval_id for each in waiting.waiting]
    assert [each.approval_id for each in plain.waiting] == [second.approval_id]
    with pytest.raises(ApprovalAlreadyDecidedError, match="alice"):
        plain.deny(str(first.approval_id))


def test_the_plain_table_has_calls_to_copy(store: SyncGatewayStore) -> None:
    asked = request(caller_id=NASTY, risk_explanation=NASTY)
    token = store.approvals.issue_token(asked)
    shown = inbox(store, approver="o'neil", widgets=False)

    html, text = shown._repr_html_(), repr(shown)

    assert "<b>x" not in html
    assert "\u202e" not in html + text
    [line] = text.splitlines()[1:]
    exec(line, {"store": store})
    result = store.approvals.check_token(token, fresh=True)
    assert (result.status, result.approver_id) == ("APPROVED", "o'neil")
    assert f"store.approvals.deny(approval_id=&quot;{asked.approval_id}&quot;" in html


def test_without_widgets_the_extra_is_named(store: SyncGatewayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sys.modules["agent_gateway_store.notebook.inbox"]._widget_class.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)

    with pytest.raises(MissingExtraError, match=r"agent-gateway-store\[notebook\]"):
        inbox(store, approver="alice")
    assert inbox(store, approver="alice", widgets=False)._repr_html_()
