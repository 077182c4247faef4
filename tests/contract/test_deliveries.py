"""Sending what the outbox holds: at once, again, never twice at a time, never for ever."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from typing import Any

import pytest
from contract_helpers import POSTGRES, until
from delivery_helpers import Post, quiet, raising, rows, settled

from agent_gateway_store import GatewayStore, Notice, StoreSettings, clock, errors
from agent_gateway_store.delivery import DeliveryWorker, attempts
from agent_gateway_store.delivery.policy import Policy
from agent_gateway_store.hooks.dispatch import Dispatcher
from agent_gateway_store.hooks.manager import Plugins
from builders import make_request

pytestmark = pytest.mark.usefixtures("no_plugins")

DOWN = errors.NotDeliveredError("the receiver is down")


def store_with(url: str, *notifiers: Post, settings: StoreSettings | None = None, **options: Any) -> GatewayStore:
    often = StoreSettings(notification_poll_seconds=0.05)
    return GatewayStore(url, redis_url="", settings=settings or often, plugins=notifiers, **options)


@POSTGRES
async def test_first_try_is_made_at_once(database_url: str) -> None:
    post = Post()
    async with store_with(database_url, post, settings=StoreSettings(notification_poll_seconds=600)) as store:
        token = await store.approvals.issue_token(make_request())
        await store.approvals.approve(token, "alice")
        await settled(store, 2)

        assert post.events == [("pending", "PENDING"), ("decision", "APPROVED")]
        assert await rows(store, "event, status, attempts") == [
            ("pending", "DELIVERED", 1),
            ("decision", "DELIVERED", 1),
        ]
        delivered = await store.notifications.list("DELIVERED")
        assert [str(row.delivery_id) for row in reversed(delivered)] == [str(each.delivery_id) for each in post.taken]
        assert all(row.delivered_at is not None and row.delivered_at >= row.created_at for row in delivered)


@POSTGRES
async def test_a_failed_notice_is_sent_again_under_the_same_id(database_url: str) -> None:
    """A receiver that is down for a while is told later; each try carries the same delivery id."""
    post = Post(act=raising(OSError("no route to host"), times=3))
    async with store_with(database_url, post, settings=quiet()) as store:
        await store.approvals.issue_token(make_request())
        for tried in range(1, 4):
            assert await store.notifications.run(once=True) == 0
            (row,) = await store.notifications.list()
            assert (row.status, row.attempts) == ("DUE", tried)
            assert row.last_error == "OSError: no route to host"
            clock.move(timedelta(minutes=1))
        assert await store.notifications.run(once=True) == 1
        (row,) = await store.notifications.list()

        assert (row.status, row.attempts, row.last_error) == ("DELIVERED", 4, None)
        assert {notice.delivery_id for notice in post.tried} == {row.delivery_id}
        assert await store.notifications.run(once=True) == 0
        assert len(post.tried) == 4


@POSTGRES
async def test_tries_are_spaced_by_the_databases_clock(database_url: str) -> None:
    """After each failure the wait doubles, with jitter, and not a moment before its end is it tried again."""
    post = Post(act=raising(DOWN))
    async with store_with(database_url, post, settings=quiet(notification_max_attempts=6)) as store:
        await store.approvals.issue_token(make_request())
        for tried in range(1, 6):
            await store.notifications.run(once=True)
            assert len(post.tried) == tried
            clock.move(timedelta(seconds=2 * 2 ** (tried - 1) - 1))
            await store.notifications.run(once=True)
            assert len(post.tried) == tried
            clock.move(timedelta(seconds=4))


async def test_giving_up(database_url: str) -> None:
    """After so many tries, or at once where trying again cannot help, a row is a dead letter and is left alone."""
    often = Post("often", act=raising(DOWN))
    gone = Post("gone", act=raising(errors.NotDeliveredError("410 Gone", is_permanent=True)))
    async with store_with(database_url, often, gone, settings=quiet(notification_max_attempts=3)) as store:
        await store.approvals.issue_token(make_request())
        for _ in range(5):
            await store.notifications.run(once=True)
            clock.move(timedelta(hours=2))

        assert sorted(await rows(store, "notifier, status, attempts, last_error")) == [
            ("gone", "DEAD", 1, "NotDeliveredError: 410 Gone"),
            ("often", "DEAD", 3, "NotDeliveredError: the receiver is down"),
        ]
        assert (len(often.tried), len(gone.tried)) == (3, 1)


async def test_redriven_dead_letters_arrive_under_their_old_id(database_url: str) -> None:
    posts = [Post(name, act=raising(DOWN, times=2)) for name in ("a", "b")]
    async with store_with(database_url, *posts, settings=quiet(notification_max_attempts=1)) as store:
        for _ in range(2):
            await store.approvals.issue_token(make_request())
        await store.notifications.run(once=True)
        dead = await store.notifications.list("DEAD")
        assert len(dead) == 4
        assert await store.notifications.redrive("00000000-0000-0000-0000-000000000000") == 0
        assert await store.notifications.redrive(dead[0].delivery_id) == 1
        assert await store.notifications.redrive(dead[0].delivery_id) == 0
        assert await store.notifications.redrive(notifier="a") == 2
        assert await store.notifications.redrive() == 1
        assert await store.notifications.run(once=True) == 4

        assert await rows(store, "status, attempts") == [("DELIVERED", 1)] * 4
        for post in posts:
            assert [each.delivery_id for each in post.tried[:2]] == [each.delivery_id for each in post.taken]


async def test_a_decision_stays_behind_the_notice_before_it(database_url: str) -> None:
    """While the question has not arrived the answer waits; once it was given up the answer goes."""
    post = Post(act=raising(DOWN, times=2))
    dead = Post("dead", act=raising(errors.NotDeliveredError("no", is_permanent=True)))
    async with store_with(database_url, post, dead) as store:
        for _ in range(5):
            token = await store.approvals.issue_token(make_request())
            await store.approvals.deny(token, "alice")
        await settled(store, 6 + 10)
        assert len(await rows(store)) == 20
        clock.move(timedelta(seconds=10))
        await settled(store, 20)

        for notice in post.taken:
            about = [each.event for each in post.taken if each.approval_id == notice.approval_id]
            assert about == ["pending", "decision"]
        assert len(dead.tried) == 10


@POSTGRES
async def test_a_row_whose_notifier_is_not_here_is_left_alone(database_url: str) -> None:
    here, there = Post("here"), Post("there")
    async with store_with(database_url, here, there, settings=quiet()) as store:
        await store.approvals.issue_token(make_request())
    async with store_with(database_url, here) as store:
        await settled(store, 1)
        counted = {row["notifier"]: row for row in await store.notifications.counts()}
        assert [(row["is_loaded"], row["due"]) for row in (counted["here"], counted["there"])] == [
            (True, 0),
            (False, 1),
        ]
    async with store_with(database_url, there) as store:
        await settled(store, 2)

    assert (len(here.taken), len(there.taken)) == (1, 1)


async def test_a_bound_store_sends_lists_and_redrives_its_own(database_url: str) -> None:
    post = Post(act=raising(errors.NotDeliveredError("no", is_permanent=True), times=1))
    async with store_with(database_url, post, settings=quiet()) as store:
        acme, globex = store.for_org("acme"), store.for_org("globex")
        for view in (globex, acme, acme):
            await view.approvals.issue_token(make_request())
        assert await acme.notifications.run(once=True) == 1
        assert [row.status for row in await globex.notifications.list()] == ["DUE"]
        assert [len(await view.notifications.list("DEAD")) for view in (acme, globex)] == [1, 0]
        assert [await view.notifications.redrive() for view in (globex, acme)] == [0, 1]
        assert await globex.notifications.run(once=True) == 1
        assert [await view.notifications.prune(timedelta()) for view in (globex, acme)] == [1, 1]

        assert [len(await view.notifications.list()) for view in (globex, acme, store)] == [0, 1, 1]
        assert {notice.org_id for notice in post.tried[:2]} == {"acme"}


async def test_old_records_are_pruned_and_nothing_else(database_url: str) -> None:
    post, dead = Post(), Post("dead", act=raising(errors.NotDeliveredError("no", is_permanent=True)))
    async with store_with(database_url, post, dead, settings=quiet()) as store:
        for _ in range(2):
            await store.approvals.issue_token(make_request())
            await store.notifications.run(once=True)
            clock.move(timedelta(days=5))
        await store.approvals.issue_token(make_request())
        assert await store.notifications.prune(timedelta(days=7)) == 1
        assert await store.notifications.prune(timedelta(days=7)) == 0
        with pytest.raises(ValueError, match="negative"):
            await store.notifications.prune(timedelta(days=-1))

        assert sorted(await rows(store, "notifier, status")) == [
            *[("dead", "DEAD")] * 2,
            ("dead", "DUE"),
            ("post", "DELIVERED"),
            ("post", "DUE"),
        ]


async def test_listing_pages_newest_first(database_url: str) -> None:
    """Every row once over the pages, whatever is added meanwhile; wrong arguments are refused."""
    async with store_with(database_url, Post("a"), Post("b"), settings=quiet()) as store:
        request = make_request()
        for asked in (request, make_request(), make_request()):
            await store.approvals.issue_token(asked)
        everything = await store.notifications.list()
        page = await store.notifications.list(limit=4)
        await store.approvals.issue_token(make_request())
        following = await store.notifications.list(limit=4, cursor=page.next_cursor)
        assert [row.id for row in (*page, *following)] == sorted((row.id for row in everything), reverse=True)
        assert following.next_cursor is None
        assert len(await store.notifications.list(notifier="a", status="DUE")) == 4
        assert len(await store.notifications.list(approval_id=request.approval_id)) == 2
        for refused in ({"status": "SENT"}, {"limit": 0}, {"cursor": "x"}):
            with pytest.raises(ValueError):
                await store.notifications.list(**refused)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="approval_id must be a UUID, not 'x'"):
            await store.notifications.list(approval_id="x")


@POSTGRES
async def test_a_claim_that_is_not_lived_up_to_ends(database_url: str) -> None:
    """A row that is leased to a worker is nobody else's until the lease ends, and then it is.

    How the attempt of the first worker ends later changes nothing any more.
    """
    post, woken = Post(), threading.Event()

    async def sleep(_: Notice) -> None:
        await asyncio.to_thread(woken.wait, 10)
        raise DOWN

    asleep = Post(act=sleep)
    async with store_with(database_url, asleep, settings=StoreSettings()) as lost:
        await lost.approvals.issue_token(make_request())
        await until(lambda: len(asleep.tried) == 1)
        async with store_with(database_url, post, settings=quiet()) as other:
            assert await other.notifications.run(once=True) == 0
            clock.move(timedelta(seconds=Policy.of(lost.settings).lease_s + 1))
            assert await other.notifications.run(once=True) == 1
            delivered = await rows(other, "status, attempts, last_error, delivered_at")
            woken.set()
    async with store_with(database_url, settings=quiet()) as other:
        assert await rows(other, "status, attempts, last_error, delivered_at") == delivered
        assert delivered[0][:3] == ("DELIVERED", 2, None)


@POSTGRES
async def test_a_notice_that_kills_its_worker_is_given_up(database_url: str) -> None:
    """Claims count as tries, so one of which no try ends does not go round for ever; nor does a row without notice."""
    post = Post()
    async with store_with(database_url, post, settings=quiet(notification_max_attempts=3)) as store:
        for _ in range(3):
            await store.approvals.issue_token(make_request())
        async with store.database.write() as connection:
            for change in ("attempts = 3 WHERE id = (SELECT min(id)", "payload = '[]' WHERE id = (SELECT max(id)"):
                await connection.exec_driver_sql(
                    f"UPDATE notification_deliveries SET {change} FROM notification_deliveries)"
                )
        assert await store.notifications.run(once=True) == 1

        assert await rows(store, "status, attempts, last_error") == [
            ("DEAD", 3, "given up: of 3 tries none came to an end"),
            ("DELIVERED", 1, None),
            ("DEAD", 1, "the row holds no notice"),
        ]
        assert len(post.tried) == 1


async def test_a_notice_of_a_newer_version_is_sent_without_what_this_one_does_not_know(database_url: str) -> None:
    post = Post()
    async with store_with(database_url, post, settings=quiet()) as store:
        await store.approvals.issue_token(make_request())
        async with store.database.write() as connection:
            newer = ("payload || '{\"new\": 1}'", "json_set(payload, '$.new', 1, '$.tool_call.new', 1)")
            value = newer[store.database.dialect == "sqlite"]
            await connection.exec_driver_sql(f"UPDATE notification_deliveries SET payload = {value}")
        assert await store.notifications.run(once=True) == 1

        assert await rows(store, "status, last_error") == [("DELIVERED", None)]


@POSTGRES
async def test_a_slow_notifier_takes_no_place_of_another(database_url: str) -> None:
    """With every place of one taken and more waiting, the other is told at once; places are as many as set."""
    at_once: list[int] = []
    under_way = 0
    done = threading.Event()

    async def wait(_: Notice) -> None:
        nonlocal under_way
        under_way += 1
        at_once.append(under_way)
        while not done.is_set():
            await asyncio.sleep(0.01)
        under_way -= 1

    slow, quick = Post("slow", act=wait), Post("quick")
    async with store_with(database_url, slow, quick, settings=StoreSettings(notification_concurrency=3)) as store:
        for _ in range(12):
            await store.approvals.issue_token(make_request())
        await until(lambda: len(quick.taken) == 12)
        assert not slow.taken
        done.set()
        await settled(store, 24)

        assert max(at_once) == 3


@POSTGRES
async def test_closing_lets_notices_under_way_arrive(database_url: str) -> None:
    async def slowly(_: Notice) -> None:
        await asyncio.sleep(0.05)

    post = Post(act=slowly)
    async with store_with(database_url, post, settings=StoreSettings(notification_concurrency=2)) as store:
        for _ in range(4):
            token = await store.approvals.issue_token(make_request())
            await store.approvals.approve(token, "alice")

    assert sorted(post.events) == [("decision", "APPROVED")] * 4 + [("pending", "PENDING")] * 4


@POSTGRES
async def test_closing_does_not_wait_for_ever_and_loses_nothing(database_url: str) -> None:
    """What a hanging notifier has not taken when the time is up is due at once for the next worker, as if untried."""

    async def hang(_: Notice) -> None:
        await asyncio.sleep(60)

    hanging, post = Post(act=hang), Post()
    settings = StoreSettings(plugin_timeout_seconds=20, notification_concurrency=2)
    async with store_with(database_url, post, settings=quiet()) as other:
        for _ in range(5):
            await other.approvals.issue_token(make_request())
        dispatcher = Dispatcher(Plugins([hanging]), settings)
        ending = DeliveryWorker(other.database, dispatcher, await dispatcher.open(), settings)
        sending = asyncio.create_task(ending.run(once=False))
        await until(lambda: len(hanging.tried) == 2)
        async with asyncio.timeout(8):
            await ending.close(0.2)
            assert await sending == 0
            await dispatcher.aclose()
        assert await rows(other, "status, attempts") == [("DUE", 0)] * 5
        assert await other.notifications.run(once=True) == 5


@POSTGRES
async def test_the_worker_lives_through_an_outage(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While the database is away it waits, says so once, and then goes on; how a try went is written when it can be."""
    monkeypatch.setattr(attempts, "_RETRY_S", 0.1)
    post = Post()
    settings = StoreSettings(notification_poll_seconds=0.05)
    async with store_with(database_url, post, settings=quiet()) as other:
        await other.approvals.issue_token(make_request())
        async with store_with(database_url, post, settings=settings) as store:
            connection, failed = store.database.connection, 0

            def away(purpose: Any) -> Any:
                nonlocal failed
                failed += 1
                raise errors.StoreUnavailableError("The database is away.")

            store.database.connection = away  # type: ignore[method-assign]
            await until(lambda: failed > 3)
            assert post.tried == []
            store.database.connection = connection  # type: ignore[method-assign]
            await until(lambda: len(post.taken) == 1)
            store.database.connection = away  # type: ignore[method-assign]
            await asyncio.sleep(0.1)
            store.database.connection = connection  # type: ignore[method-assign]
            await settled(other, 1)

    assert len(post.taken) == 1
    assert [caplog.text.count(words) for words in ("Notices wait", "Notices are sent again")] == [1, 1]
