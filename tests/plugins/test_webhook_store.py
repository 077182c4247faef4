"""The notifier `webhook` and a real store: the outbox does what the receiver asks for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from notifier_helpers import OK, Server, serving, status
from webhook_helpers import SECRET, notifier_for

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.plugins.webhook import WebhookReceiver
from builders import make_request

pytestmark = pytest.mark.integration


def store_with(server: Server) -> GatewayStore:
    """A store that tells a test's server."""
    settings = StoreSettings(redis_url="", notification_poll_seconds=0.1)
    return GatewayStore("sqlite:///gateway.db", plugins=[notifier_for(server)], settings=settings)


async def settled(store: GatewayStore, count: int) -> list[Any]:
    """Wait until no delivery to the webhook is due."""
    async with asyncio.timeout(20):
        while True:
            rows = [row for row in await store.notifications.list() if row.notifier == "webhook"]
            if len(rows) == count and all(row.status != "DUE" for row in rows):
                return rows
            await asyncio.sleep(0.02)


async def test_comes_again_when_the_receiver_says_so() -> None:
    """503 and Retry-After: the same comes again after that time, by the same id and at a new time, and counts once."""
    async with serving(status("503 Unavailable", "Retry-After: 1"), OK) as server, store_with(server) as store:
        await store.approvals.issue_token(make_request())
        (row,) = await settled(store, 1)

    first, second = server.requests
    receiver = WebhookReceiver([SECRET])
    received = [receiver.verify(request.body, request.headers) for request in (first, second)]
    assert (row.status, row.attempts) == ("DELIVERED", 2)
    assert {request.headers["webhook-id"] for request in server.requests} == {str(row.delivery_id)}
    assert first.body == second.body
    assert int(second.headers["webhook-timestamp"]) - int(first.headers["webhook-timestamp"]) >= 1
    assert [each.is_repeat for each in received if each] == [False, True]


async def test_request_and_decision() -> None:
    async with serving(OK) as server, store_with(server) as store:
        token = await store.approvals.issue_token(make_request())
        await store.approvals.approve(token, approver_id="ann", note="fine")
        await settled(store, 2)

    told = {request.json["type"]: request.json["data"] for request in server.requests}
    assert told["approval.requested"]["status"] == "PENDING"
    assert (told["approval.decided"]["status"], told["approval.decided"]["approver_id"]) == ("APPROVED", "ann")
    assert told["approval.requested"]["approval_id"] == told["approval.decided"]["approval_id"]
    assert token not in str([request.body for request in server.requests])
