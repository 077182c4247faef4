"""Slack and a real store, from the question to the use of the approval."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from slack_server import CHANNEL, SIGNING_SECRET, TOKEN, Slack, click, signed, slack_running

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.plugins.slack import SlackCallback, SlackNotifier, SlackSettings
from builders import CALL, make_request

pytestmark = pytest.mark.integration


@asynccontextmanager
async def store_with_slack(url: str, slack: Slack) -> AsyncIterator[tuple[GatewayStore, SlackCallback]]:
    """A store that tells Slack, and the callback for the clicks."""
    settings = SlackSettings(  # type: ignore[call-arg]
        bot_token=TOKEN, channel=CHANNEL, signing_secret=SIGNING_SECRET, api_url=slack.api_url, approvers={"U1": "ann"}
    )
    notifier = SlackNotifier(settings)
    own = StoreSettings(redis_url="")
    async with GatewayStore(url, plugins=[notifier], settings=own) as store:
        hook = SlackCallback(store.approvals, store.plugins, settings)
        try:
            yield store, hook
        finally:
            await hook.aclose()


async def ask(store: GatewayStore) -> tuple[str, Any]:
    """Ask for an approval; return its token and id."""
    request = make_request()
    return await store.approvals.issue_token(request), request.approval_id


async def shown(slack: Slack, text: str) -> None:
    """Wait until a message in the channel holds `text`."""
    async with asyncio.timeout(10):
        while not any(text in str(message) for message in slack.messages.values()):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("action", "ending"), [("approve", "APPROVED"), ("deny", "DENIED")])
async def test_from_question_to_decision(action: str, ending: str) -> None:
    """The message appears, a click decides, the message changes; an approved call can be used, once."""
    async with slack_running() as slack, store_with_slack("sqlite:///gateway.db", slack) as (store, hook):
        token, approval_id = await ask(store)
        await shown(slack, "gateway_store_approve")
        body = click(slack, approval_id, f"gateway_store_{action}", user="U1")
        reply = await hook.handle(body, signed(body))
        await shown(slack, f"{ending.capitalize()} by `ann`")
        result = await store.approvals.check_token(token, fresh=True)
        votes = (await store.approvals.get(approval_id=approval_id)).votes
        if ending == "APPROVED":
            await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)

    assert (reply.status, reply.body, slack.said) == (200, b"", [])
    assert [vote.channel for vote in votes or ()] == ["slack"]
    assert (result.status, result.approver_id, result.note) == (ending, "ann", "Slack user U1")
    assert len(slack.messages) == 1
    assert "gateway_store_approve" not in str(slack.messages)


async def replay(url: str, count: int) -> None:
    """Send one signed click `count` times to two callbacks, as two processes behind one address would get it."""
    async with (
        slack_running() as slack,
        store_with_slack(url, slack) as (store, hook),
        store_with_slack(url, slack) as (_, other),
    ):
        _, approval_id = await ask(store)
        body = click(slack, approval_id, user="U1")
        headers = signed(body)
        durations = []

        async def send(number: int) -> int:
            started = time.monotonic()
            reply = await (hook, other)[number % 2].handle(body, headers)
            durations.append(time.monotonic() - started)
            return reply.status

        statuses = Counter(await asyncio.gather(*(send(number) for number in range(count))))
        history = await store.approvals.list_requests()

    assert statuses == {200: count}
    assert max(durations) < 3
    assert [(each.status, each.approver_id, each.version) for each in history] == [("APPROVED", "ann", 2)]


async def test_same_click_100_times() -> None:
    """One decision, every answer 200, in two processes' worth of callbacks."""
    await replay("sqlite:///gateway.db", 100)


@pytest.mark.slow
async def test_same_click_1000_times(migrated_postgres_database: Callable[[], str]) -> None:
    await replay(migrated_postgres_database(), 1000)
