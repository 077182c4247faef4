"""The worker when its store, its event loop or its database ends under it: no notice is lost, and no task stays."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from contract_helpers import make_request
from delivery_helpers import Post, quiet, rows, until

from agent_gateway_store import GatewayStore, Notice, StoreSettings, errors, hookimpl
from agent_gateway_store.delivery.claims import Delivery

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _no_bundled_notifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_GATEWAY_STORE_LOAD_PLUGINS", "")


@pytest.fixture(autouse=True)
def _failures_are_not_printed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="agent_gateway_store")


def store_with(url: str, *plugins: object, settings: StoreSettings | None = None) -> GatewayStore:
    return GatewayStore(url, redis_url="", settings=settings or StoreSettings(), plugins=plugins)


def away(_purpose: Any) -> Any:
    raise errors.StoreUnavailableError("The database is away.")


async def what_is_left(url: str) -> list[tuple[Any, ...]]:
    async with store_with(url, settings=quiet()) as other:
        return await rows(other, "event, status, attempts")


async def test_what_arrived_is_written_though_every_task_was_cancelled(database_url: str) -> None:
    """An event loop that ends cancels all tasks; whoever closes the store then still writes how the tries went."""
    post = Post()
    store = await store_with(database_url, post).open()
    await store.approvals.issue_token(make_request())
    await until(lambda: not store._core.outbox.worker._marks.is_empty)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    async with asyncio.timeout(4):
        await store.close()

    assert await what_is_left(database_url) == [("pending", "DELIVERED", 1)]


async def test_running_once_says_that_the_database_is_away(database_url: str) -> None:
    """Also if it goes away between a claim and how the try went, which is written once it is back."""
    post = Post()
    async with store_with(database_url, post, settings=quiet()) as store:
        await store.approvals.issue_token(make_request())
        connection = store.database.connection

        async def cut_off(_: Notice) -> None:
            store.database.connection = away  # type: ignore[method-assign]

        post.act = cut_off
        async with asyncio.timeout(5):
            with pytest.raises(errors.StoreUnavailableError):
                await store.notifications.run(once=True)
        store.database.connection = connection  # type: ignore[method-assign]

    assert await what_is_left(database_url) == [("pending", "DELIVERED", 1)]
    assert len(post.tried) == 1


class SlowListener:
    """An event hook that takes its time."""

    name = "slow-listener"

    def __init__(self) -> None:
        self.is_called = False

    @hookimpl
    async def gateway_store_approval_event(self, notice: Notice) -> None:
        self.is_called = True
        await asyncio.sleep(0.5)


async def test_what_is_asked_while_the_store_closes_is_sent_by_another(database_url: str) -> None:
    """Its row is written as any other, is due at once, and nothing here goes on trying to send it."""
    before = asyncio.all_tasks()
    post, listener = Post(), SlowListener()
    store = await store_with(database_url, post, listener).open()
    await store.approvals.issue_token(make_request())
    await until(lambda: listener.is_called)
    closing = asyncio.create_task(store.close())
    await until(lambda: store._core.outbox.worker._is_closed)
    await store.approvals.issue_token(make_request())
    await closing

    assert await what_is_left(database_url) == [("pending", "DELIVERED", 1), ("pending", "DUE", 0)]
    assert asyncio.all_tasks() == before


async def test_what_is_asked_after_the_outbox_was_closed_is_told_as_well(database_url: str) -> None:
    """The database is closed last: until then a change is not written without the rows that tell of it."""
    store = await store_with(database_url, Post()).open()
    await store._core.outbox.close()
    await store.approvals.issue_token(make_request())
    await store._core.database.close()

    assert await what_is_left(database_url) == [("pending", "DUE", 0)]


async def test_a_claim_that_outlives_its_worker_is_not_marked_for_ever(database_url: str) -> None:
    """What it brings is left to its lease once the store is closed."""
    before = asyncio.all_tasks()
    store = await store_with(database_url, Post(), settings=quiet()).open()
    await store.approvals.issue_token(make_request())
    worker = store._core.outbox.worker
    await store.close()
    target = worker._targets["post"]
    async with store_with(database_url, settings=quiet()) as other:
        (row,) = await other.notifications.list()
    notice = Notice.model_validate({**row.payload, "delivery_id": row.delivery_id})
    target.put([Delivery(row.delivery_id, "post", row.approval_id, 1, notice, 0.0)])
    await until(lambda: asyncio.all_tasks() == before)

    assert worker._marks.is_empty
