"""A lease keeps a row for one worker; when it has ended, what that worker says of the row counts no more."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from delivery_helpers import Post, quiet, rows, settled

from agent_gateway_store import GatewayStore, clock
from agent_gateway_store.delivery.attempts import AttemptResult, Delivery, claim, claim_next, record
from agent_gateway_store.delivery.policy import Policy
from agent_gateway_store.delivery.worker import NotifierQueue
from agent_gateway_store.models.delivery import DeliveryStatus
from agent_gateway_store.storage.statements import Statement
from builders import make_request

pytestmark = pytest.mark.usefixtures("no_plugins")

POLICY = Policy.of(quiet())
STATE = "status, attempts, next_attempt_at, last_error, delivered_at"


def quiet_store(url: str) -> GatewayStore:
    return GatewayStore(url, redis_url="", settings=quiet(), plugins=[Post()])


async def claimed_twice(store: GatewayStore) -> tuple[Delivery, Delivery]:
    """One row as a worker claimed it that outlived its lease, and as the next one has claimed it."""
    await store.approvals.issue_token(make_request())
    (late,) = await claim(store.database, "post", 10, POLICY)
    assert await claim(store.database, "post", 10, POLICY) == []
    clock.move(timedelta(seconds=POLICY.lease_s + 1))
    (held,) = await claim(store.database, "post", 10, POLICY)
    assert (late.delivery_id, late.attempt, held.attempt) == (held.delivery_id, 1, 2)
    return late, held


def results(delivery: Delivery) -> list[AttemptResult]:
    """What a worker may say of an attempt, but that it was delivered."""
    return [
        AttemptResult.untried(delivery),
        AttemptResult(delivery, DeliveryStatus.DUE, delivery.attempt, 60.0, "OSError: late"),
        AttemptResult(delivery, DeliveryStatus.DEAD, delivery.attempt, error="OSError: late"),
    ]


async def say_late(store: GatewayStore, delivery: Delivery) -> None:
    """Let a worker say each of these, and require that the row stays as it is."""
    before = await rows(store, STATE)
    for result in results(delivery):
        await record(store.database, [result], POLICY)
        assert await rows(store, STATE) == before


async def test_a_late_result_takes_no_row_from_the_worker_that_has_it(database_url: str) -> None:
    """The lease of the second worker stands, and so does its own result afterwards."""
    async with quiet_store(database_url) as store:
        late, held = await claimed_twice(store)
        await say_late(store, late)
        await record(store.database, [AttemptResult(held, DeliveryStatus.DELIVERED, 2)], POLICY)

        assert [row[:2] for row in await rows(store, "status, attempts")] == [("DELIVERED", 2)]


async def test_a_late_result_is_none_of_a_dead_letter_that_is_sent_again(database_url: str) -> None:
    """Its attempts count from 1 again, so that a worker that outlived its lease may have had the same number."""
    async with quiet_store(database_url) as store:
        late, held = await claimed_twice(store)
        # The clock was moved, and this machine's was not.
        late = replace(late, leased_at=late.leased_at - POLICY.lease_s - 1)
        await record(store.database, [AttemptResult(held, DeliveryStatus.DEAD, 2)], POLICY)
        assert await store.notifications.redrive() == 1
        (again,) = await claim(store.database, "post", 10, POLICY)
        assert again.attempt == late.attempt
        await say_late(store, late)
        await record(store.database, [AttemptResult(again, DeliveryStatus.DEAD, 1)], POLICY)

        assert [row[:2] for row in await rows(store, "status, attempts")] == [("DEAD", 1)]


@pytest.mark.parametrize("status", list(DeliveryStatus))
async def test_a_late_result_overwrites_no_other(database_url: str, status: DeliveryStatus) -> None:
    async with quiet_store(database_url) as store:
        late, held = await claimed_twice(store)
        await record(store.database, [AttemptResult(held, status, 2, 5.0, "OSError: second")], POLICY)
        await say_late(store, late)


async def test_a_late_delivery_counts_once(database_url: str) -> None:
    """What was delivered was delivered, also after the lease; a second time changes nothing."""
    async with quiet_store(database_url) as store:
        late, held = await claimed_twice(store)
        await record(store.database, [AttemptResult(late, DeliveryStatus.DELIVERED, 1)], POLICY)
        delivered = await rows(store, STATE)
        assert delivered[0][:2] == ("DELIVERED", 1)
        clock.move(timedelta(seconds=5))
        await say_late(store, held)
        await record(store.database, [AttemptResult(held, DeliveryStatus.DELIVERED, 2)], POLICY)

        assert await rows(store, STATE) == delivered


async def test_no_claim_takes_a_leased_row_or_one_behind_it(database_url: str) -> None:
    """Neither by notifier nor by approval; once the first has ended, the next one is claimed, and only that."""
    async with quiet_store(database_url) as store:
        request = make_request()
        token = await store.approvals.issue_token(request)
        await store.approvals.approve(token, "alice")
        await store.approvals.cancel(token, "bob")
        about = [("post", request.approval_id)]
        before = time.monotonic()
        events = []
        for _ in range(3):
            (delivery,) = await claim_next(store.database, about, POLICY)
            assert before < delivery.leased_at < time.monotonic()
            assert await claim_next(store.database, about, POLICY) == []
            assert await claim(store.database, "post", 10, POLICY) == []
            await record(store.database, [AttemptResult(delivery, DeliveryStatus.DELIVERED, delivery.attempt)], POLICY)
            assert delivery.notice is not None
            events.append((delivery.notice.event, delivery.notice.status.value))

        assert events == [("pending", "PENDING"), ("decision", "APPROVED"), ("decision", "CANCELLED")]


async def test_a_lease_counts_from_before_its_row_is_written(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from the commit, which may come when most of the lease has passed."""
    written: list[float] = []
    begun: list[float] = []
    wrote_before: list[float] = []
    rows_of, put = Statement.rows, NotifierQueue.put

    async def writing(statement: Statement, connection: Any, values: Any) -> Any:
        if re.search("(INSERT INTO|UPDATE) notification_deliveries", statement.compiled(connection.dialect).text):
            written.append(time.monotonic())
        return await rows_of(statement, connection, values)

    def putting(queue: NotifierQueue, delivery: Delivery) -> None:
        begun.append(delivery.leased_at)
        wrote_before.append(written[-1])
        put(queue, delivery)

    monkeypatch.setattr(Statement, "rows", writing)
    monkeypatch.setattr(NotifierQueue, "put", putting)
    async with GatewayStore(database_url, redis_url="", plugins=[Post()]) as store:
        approvals = store.approvals
        for required, decide in ((1, approvals.approve), (2, approvals.approve), (1, approvals.deny)):
            token = await approvals.issue_token(make_request(required_approvals=required))
            for voter in range(required):
                await decide(token, f"approver-{voter}")
        await settled(store, 6)

    assert len(begun) == 6
    # The statement that leased the row, by an insert or a claim, is the last one or was sent before that.
    assert all(since <= wrote for since, wrote in zip(begun, wrote_before, strict=True))
