"""The worker when its store, its event loop or its database ends under it: no notice is lost, and no task stays."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from contract_helpers import POSTGRES, until
from delivery_helpers import Post, quiet, rows

from agent_gateway_store import GatewayStore, Notice, StoreSettings, errors, hookimpl
from agent_gateway_store.delivery import DeliveryWorker, worker
from builders import make_request

pytestmark = [POSTGRES, pytest.mark.usefixtures("no_plugins")]


def store_with(url: str, *plugins: object, settings: StoreSettings | None = None) -> GatewayStore:
    return GatewayStore(url, redis_url="", settings=settings or StoreSettings(), plugins=plugins)


def away(_purpose: Any) -> Any:
    raise errors.StoreUnavailableError("The database is away.")


async def what_is_left(url: str) -> list[tuple[Any, ...]]:
    async with store_with(url, settings=quiet()) as other:
        return await rows(other, "event, status, attempts")


async def test_what_arrived_is_written_though_every_task_was_cancelled(database_url: str) -> None:
    """An event loop that ends cancels all tasks; whoever closes the store then still records the results."""
    post, failed = Post(), asyncio.Event()
    store = await store_with(database_url, post, settings=StoreSettings(notification_poll_seconds=600)).open()
    connection = store.database.connection

    def away_once(_purpose: Any) -> Any:
        failed.set()
        return away(_purpose)

    async def cut_off(_: Notice) -> None:
        store.database.connection = away_once  # type: ignore[method-assign]

    post.act = cut_off
    await store.approvals.issue_token(make_request())
    await failed.wait()  # the result cannot be recorded yet
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    store.database.connection = connection  # type: ignore[method-assign]
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


async def test_what_is_asked_while_the_store_closes_is_sent_by_another(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row is written as any other, is due at once, and nothing here goes on trying to send it."""
    before = asyncio.all_tasks()
    close, is_closed = DeliveryWorker.close, asyncio.Event()

    async def closing_worker(worker: DeliveryWorker, timeout_s: float) -> None:
        await close(worker, timeout_s)
        is_closed.set()

    monkeypatch.setattr(DeliveryWorker, "close", closing_worker)
    post, listener = Post(), SlowListener()
    store = await store_with(database_url, post, listener).open()
    await store.approvals.issue_token(make_request())
    await until(lambda: listener.is_called)
    closing = asyncio.create_task(store.close())
    await is_closed.wait()
    await store.approvals.issue_token(make_request())
    await closing

    assert await what_is_left(database_url) == [("pending", "DELIVERED", 1), ("pending", "DUE", 0)]
    assert asyncio.all_tasks() == before


async def test_what_is_asked_after_the_outbox_was_closed_is_sent_as_well(database_url: str) -> None:
    store = await store_with(database_url, Post()).open()
    close = store.database.close

    async def ask_and_close() -> None:
        await store.approvals.issue_token(make_request())
        await close()

    store.database.close = ask_and_close  # type: ignore[method-assign]
    await store.close()

    assert await what_is_left(database_url) == [("pending", "DUE", 0)]


async def test_a_claim_that_outlives_its_worker_is_not_recorded_for_ever(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = asyncio.all_tasks()
    claim, claimed, late = worker.claim, asyncio.Event(), asyncio.Event()

    async def claim_late(*args: Any, **options: Any) -> Any:
        found = await claim(*args, **options)
        claimed.set()
        await late.wait()
        return found

    monkeypatch.setattr(worker, "claim", claim_late)
    post = Post()
    store = await store_with(database_url, post, settings=quiet()).open()
    await store.approvals.issue_token(make_request())
    sending = asyncio.create_task(store.notifications.run())
    await claimed.wait()
    await store.close()
    late.set()

    assert await sending == 0
    await until(lambda: asyncio.all_tasks() == before)
    assert post.tried == []
    assert await what_is_left(database_url) == [("pending", "DUE", 1)]
