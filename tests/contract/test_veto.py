"""Plugins may object to a decision; then nothing is decided, and whoever failed to answer has objected."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from contract_helpers import POSTGRES, column, counted_statements

from agent_gateway_store import GatewayStore, hookimpl
from agent_gateway_store.errors import ApprovalAlreadyDecidedError, ApprovalNotFoundError, DecisionVetoedError
from agent_gateway_store.models.values import PendingApproval
from agent_gateway_store.settings import StoreSettings
from builders import CALL, make_request

pytestmark = POSTGRES

SHORT_S = 0.3


class Objector:
    """A plugin that answers with what a function says of the decision."""

    def __init__(self, name: str, answer: Callable[[dict[str, Any]], Any]) -> None:
        self.name = name
        self.answer = answer
        self.asked: list[dict[str, Any]] = []

    @hookimpl
    def gateway_store_veto_decision(
        self, request: PendingApproval, decision: str, approver_id: str, note: str, channel: str
    ) -> Any:
        facts = {"request": request, "decision": decision, "approver_id": approver_id, "note": note, "channel": channel}
        self.asked.append(facts)
        return self.answer(facts)


@asynccontextmanager
async def open_with(database_url: str, *plugins: object, timeout_s: float = 20) -> AsyncIterator[GatewayStore]:
    """Open a store with these plugins."""
    settings = StoreSettings(plugin_timeout_seconds=timeout_s)
    async with GatewayStore(database_url, redis_url="", settings=settings, plugins=plugins) as store:
        yield store


async def refuses(store: GatewayStore, token: str, **options: Any) -> DecisionVetoedError:
    """Approving is refused by a plugin."""
    with pytest.raises(DecisionVetoedError) as caught:
        await store.approvals.approve(token, "approver-1", **options)
    assert (await store.approvals.check_token(token, fresh=True)).status == "PENDING"
    return caught.value


async def test_an_objection_refuses_the_decision_and_writes_nothing(database_url: str) -> None:
    """The error names plugin and reason; the approval stays pending, nobody has voted, another may decide."""
    by_day = Objector("office-hours", lambda facts: "outside office hours" if facts["channel"] == "cli" else None)
    async with open_with(database_url, by_day) as store:
        token = await store.approvals.issue_token(make_request())
        error = await refuses(store, token, note="quick", channel="cli")

        assert (error.plugin, error.reason) == ("office-hours", "outside office hours")
        assert str(error).startswith("Plugin office-hours refuses this decision: outside office hours. ")
        assert await column(store, "approver_id", "approval_votes") == []
        assert (await store.approvals.approve(token, "approver-1")).status == "APPROVED"


async def test_what_is_decided_is_told_without_its_token(database_url: str) -> None:
    """The sanitised call, the deadline, who says what and by which way; never the token."""
    plugin = Objector("curious", lambda _facts: None)
    async with open_with(database_url, plugin) as store:
        token = await store.approvals.issue_token(make_request(required_approvals=2, scope="OUTPUT_RELEASE"))
        await store.approvals.approve(token, "approver-1", "fine", channel="slack")
        await store.approvals.deny(token, "approver-2", "not fine")

    first, second = plugin.asked
    request = first.pop("request")
    assert first == {"decision": "APPROVED", "approver_id": "approver-1", "note": "fine", "channel": "slack"}
    assert (second["decision"], second["approver_id"]) == ("DENIED", "approver-2")
    assert (request.tool_call, request.caller_id, request.org_id) == (CALL, "dev-agent", "default")
    assert (request.required_approvals, request.scope) == (2, "OUTPUT_RELEASE")
    assert request.expires_at > request.created_at
    assert token not in repr(plugin.asked)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda _: 1 / 0, "ZeroDivisionError"),
        (lambda _: True, "returned bool, not a text or None"),
        (lambda _: ["no"], "returned list"),
        (lambda _: asyncio.sleep(30), "TimeoutError"),
        (lambda _: threading.Event().wait(0.8), "TimeoutError"),
        (lambda _: exec("raise SystemExit(3)"), "SystemExit"),
        (lambda _: "  \n ", "no reason given"),
    ],
    ids=["raises", "bool", "list", "hangs", "blocks", "exits", "blank"],
)
async def test_a_failure_is_a_refusal(database_url: str, answer: Callable[[Any], Any], reason: str) -> None:
    """Whatever a plugin does instead of answering, nothing is decided, and the loop is not held up."""
    async with open_with(database_url, Objector("broken", answer), timeout_s=SHORT_S) as store:
        token = await store.approvals.issue_token(make_request())
        error = await refuses(store, token)
        with pytest.raises(DecisionVetoedError):
            await store.approvals.deny(token, "approver-1")

        assert reason in (error.reason or "")
        assert error.plugin == "broken"
        assert (await store.approvals.cancel(token, "approver-1")).status == "CANCELLED"


async def test_async_answers_are_awaited_and_the_first_objection_is_named(database_url: str) -> None:
    """All are asked side by side; of several refusals the first in the order of loading is told."""

    async def slowly(_facts: Any) -> str:
        await asyncio.sleep(0.05)
        return "four eyes needed. "

    plugins = Objector("fine", lambda _: ""), Objector("slow", slowly), Objector("quick", lambda _: "no")
    async with open_with(database_url, *plugins) as store:
        error = await refuses(store, await store.approvals.issue_token(make_request()))

    assert (error.plugin, error.reason) == ("slow", "four eyes needed.")
    assert all(len(plugin.asked) == 1 for plugin in plugins)


async def test_reasons_are_one_line_without_secrets(database_url: str) -> None:
    """What a plugin says reaches an approver's screen: no key, no control byte, no page of text."""
    said = "see agw_0123456789ab_c2VjcmV0c2VjcmV0\x1b[31m\nor password=hunter2 " + "x" * 2000
    async with open_with(database_url, Objector("chatty", lambda _: said)) as store:
        text = str(await refuses(store, await store.approvals.issue_token(make_request())))

    assert "c2VjcmV0" not in text
    assert "hunter2" not in text
    assert text.isprintable()
    assert len(text) < 700


async def test_one_plugin_cannot_change_what_another_sees(database_url: str) -> None:
    def spoil(facts: dict[str, Any]) -> None:
        facts["request"].tool_call.arguments["path"] = "/etc/passwd"

    spoiler, witness = Objector("spoiler", spoil), Objector("witness", lambda _: None)
    async with open_with(database_url, spoiler, witness) as store:
        token = await store.approvals.issue_token(make_request())
        await store.approvals.approve(token, "approver-1")
        found = await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)

    assert witness.asked[0]["request"].tool_call == CALL
    assert found.status == "USED"


async def test_plugins_are_not_asked_about_what_cannot_be_decided(database_url: str) -> None:
    """What is not there, is another organisation's, or is decided gets the usual answer."""
    plugin = Objector("strict", lambda _: None)
    async with open_with(database_url, plugin) as store:
        token = await store.approvals.issue_token(make_request())
        await store.approvals.approve(token, "approver-1")
        with pytest.raises(ApprovalAlreadyDecidedError):
            await store.approvals.deny(token, "approver-2")
        with pytest.raises(ApprovalNotFoundError):
            await store.for_org("other").approvals.approve(token, "approver-2")

    assert len(plugin.asked) == 1


async def test_no_lock_is_held_while_a_plugin_thinks(database_url: str) -> None:
    asked, answer = threading.Event(), threading.Event()

    def think(facts: dict[str, Any]) -> None:
        if facts["approver_id"] == "slow":
            asked.set()
            assert answer.wait(10)

    async with open_with(database_url, Objector("thinker", think), timeout_s=10) as store:
        token = await store.approvals.issue_token(make_request())
        slow = asyncio.create_task(store.approvals.approve(token, "slow"))
        await asyncio.to_thread(asked.wait, 10)
        cancelled = await store.approvals.cancel(token, "quick")
        answer.set()
        with pytest.raises(ApprovalAlreadyDecidedError):
            await slow

    assert cancelled.status == "CANCELLED"


async def test_without_such_a_plugin_nothing_more_is_read(database_url: str) -> None:
    counts = []
    for plugins in ((), (Objector("calm", lambda _: None),)):
        async with open_with(database_url, *plugins) as store:
            token = await store.approvals.issue_token(make_request())
            with counted_statements(store) as statements:
                await store.approvals.approve(token, "approver-1")
            counts.append(len([text for text in statements if "notification" not in text]))

    assert counts[1] == counts[0] + 1
