"""Which rows the outbox gets: one for each notifier with the change it tells of, and never without it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from contract_helpers import BOTH, counted_statements
from delivery_helpers import Post, quiet, rows, settled
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store import ApprovalManager, GatewayStore, Notice, StoreSettings, clock, errors, hookimpl
from builders import CALL, make_request

pytestmark = pytest.mark.usefixtures("no_plugins")


def quiet_store(url: str, *notifiers: Post) -> GatewayStore:
    """A store that writes rows and sends nothing."""
    return GatewayStore(url, redis_url="", settings=quiet(), plugins=notifiers)


async def test_each_change_that_is_told_writes_one_row_for_each_notifier(database_url: str) -> None:
    """Asking, approving, denying, cancelling and expiring; not using, nor recording the outcome."""
    async with quiet_store(database_url, Post("a"), Post("b")) as store:
        tokens = [await store.approvals.issue_token(make_request()) for _ in range(4)]
        await store.approvals.approve(tokens[0], "alice")
        await store.approvals.deny(tokens[1], "alice")
        await store.approvals.cancel(tokens[2], "alice")
        used = await store.approvals.issue_token(make_request())
        await store.approvals.approve(used, "alice")
        await store.approvals.consume_token(used, caller_id="dev-agent", tool_call=CALL)
        await store.approvals.record_outcome(used, "done")
        clock.move(timedelta(hours=2))
        assert await store.approvals.expire_stale() == 2  # the approved one was not used in time
        found = await rows(store, "notifier, event, attempts")

        assert found[:8] == [(name, "pending", 0) for _ in tokens for name in ("a", "b")]
        told = ["pending", *["decision"] * 6]
        assert sorted(found[8:]) == sorted((name, event, 0) for event in told for name in ("a", "b"))


async def test_payload_is_the_notice(database_url: str) -> None:
    """A row holds the notice as JSON, under its own delivery id, with times by the database's clock and no token."""
    post = Post()
    async with quiet_store(database_url, post) as store:
        request = make_request(risk_explanation="drops \x00 the table: 'é' \u202e")
        token = await store.approvals.issue_token(request)
        await store.approvals.deny(token, "alice", "no")
        stored = await store.approvals.get(approval_id=request.approval_id)
        decision, pending = await store.notifications.list()
        notices = [Notice.model_validate(each.payload) for each in (pending, decision)]

        assert [notice.delivery_id for notice in notices] == [pending.delivery_id, decision.delivery_id]
        for notice in notices:
            assert (notice.approval_id, notice.request_id) == (request.approval_id, request.request_id)
            assert (notice.created_at, notice.expires_at) == (stored.created_at, stored.expires_at)
            assert notice.risk_explanation == stored.risk_explanation
            assert notice.tool_call == stored.tool_call
        assert (notices[0].event, notices[0].status, notices[0].decided_at) == ("pending", "PENDING", None)
        assert (notices[1].status, notices[1].approver_id, notices[1].note) == ("DENIED", "alice", "no")
        assert notices[1].decided_at == stored.decision_at
        assert token not in str(await rows(store, "*"))


@BOTH
async def test_asking_deciding_and_using_are_one_round_trip_on_postgresql(
    contract_postgres: str, redis_setting: str
) -> None:
    """The approval or the decision, the vote, the rows and the message to other processes are one statement, which
    commits itself."""
    plugins = [Post("a"), Post("b")]
    async with GatewayStore(contract_postgres, redis_url=redis_setting, settings=quiet(), plugins=plugins) as store:
        approvals = store.approvals
        tokens = [await approvals.issue_token(make_request()) for _ in range(2)]
        with counted_statements(store) as statements:
            tokens.append(await approvals.issue_token(make_request()))
        assert len(statements) == 1
        for token, decide in zip(tokens, (approvals.approve, approvals.deny, approvals.cancel), strict=True):
            with counted_statements(store) as statements:
                await decide(token, "alice")
            assert len(statements) == 1
        with counted_statements(store) as statements:
            await approvals.consume_token(tokens[0], caller_id="dev-agent", tool_call=CALL)

        assert len(statements) == 1
        assert (await rows(store, "event"))[-12:] == [("pending",)] * 6 + [("decision",)] * 6


async def test_asking_again_and_votes_that_do_not_decide_tell_nobody(database_url: str) -> None:
    async with quiet_store(database_url, Post()) as store:
        request = make_request(required_approvals=2)
        await store.approvals.issue_token(request)
        token = await store.approvals.issue_token(make_request(request_id=request.request_id, required_approvals=2))
        await store.approvals.approve(token, "alice")
        with pytest.raises(errors.SelfApprovalError):
            await store.approvals.approve(token, "dev-agent")
        assert await rows(store, "event") == [("pending",)]
        await store.approvals.approve(token, "bob")
        for again in (store.approvals.approve, store.approvals.deny):
            with pytest.raises(errors.ApprovalAlreadyDecidedError):
                await again(token, "carol")

        assert await rows(store, "event") == [("pending",), ("decision",)]


async def test_asking_again_after_the_deadline_tells_everybody_once(database_url: str) -> None:
    """The end of the overdue approval, which no sweep has met, is written before the new one is asked; event hooks and
    notifiers hear of it at once, as of any other."""
    heard: list[tuple[str, str]] = []

    class Listener:
        name = "listener"

        @hookimpl
        def gateway_store_approval_event(self, notice: Notice) -> None:
            heard.append((str(notice.approval_id), notice.status.value))

    post = Post()
    settings = StoreSettings(notification_poll_seconds=600)
    async with GatewayStore(database_url, redis_url="", settings=settings, plugins=[post, Listener()]) as store:
        first = make_request()
        await store.approvals.issue_token(first)
        await settled(store, 1)
        clock.move(timedelta(hours=2))
        with pytest.raises(errors.ApprovalError, match="build a new ApprovalRequest"):
            await store.approvals.issue_token(first)
        second = make_request(request_id=first.request_id)
        await store.approvals.issue_token(second)
        await settled(store, 3)
        written = [Notice.model_validate(row.payload) for row in reversed(await store.notifications.list())]
        assert await store.approvals.expire_stale() == 0

    told = [(first.approval_id, "PENDING"), (first.approval_id, "EXPIRED"), (second.approval_id, "PENDING")]
    assert [(each.approval_id, each.status.value) for each in written] == told
    assert sorted(heard) == sorted((str(approval_id), status) for approval_id, status in told)
    assert sorted((each.approval_id, each.status.value) for each in post.taken) == sorted(told)


async def test_row_and_change_are_one_transaction(database_url: str) -> None:
    """Where the row cannot be written the decision is not made either, and the other way round."""
    async with quiet_store(database_url, Post()) as store:
        token = await store.approvals.issue_token(make_request())
        async with store.database.write() as connection:
            await connection.exec_driver_sql("ALTER TABLE notification_deliveries RENAME TO elsewhere")
        try:
            with pytest.raises(errors.GatewayStoreError):
                await store.approvals.approve(token, "alice")
            with pytest.raises(errors.GatewayStoreError):
                await store.approvals.issue_token(make_request())
        finally:
            async with store.database.write() as connection:
                await connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO notification_deliveries")

        assert (await store.approvals.check_token(token)).status == "PENDING"
        assert len(await store.approvals.list_requests()) == 1
        assert await rows(store, "event") == [("pending",)]


async def test_session_of_the_callers_writes_rows_only_if_told_to_whom(database_url: str) -> None:
    """Without `notifiers` there is no outbox; with them the rows are in the caller's transaction, due at once."""
    async with quiet_store(database_url) as store:
        with counted_statements(store) as statements:
            await store.approvals.issue_token(make_request())
        assert len(statements) == 1
        async with AsyncSession(store.database.engine) as session:
            await ApprovalManager(session).issue_token(make_request())
        assert await rows(store) == []
        async with AsyncSession(store.database.engine) as session:
            manager = ApprovalManager(session, notifiers=["webhook"])
            await manager.approve(await manager.issue_token(make_request()), "alice")

        assert await rows(store) == [("webhook", "pending", "DUE", 0), ("webhook", "decision", "DUE", 0)]


async def test_a_notice_is_sent_after_the_commit(database_url: str) -> None:
    found: list[str] = []

    async def read(notice: Notice) -> None:
        async with quiet_store(database_url) as own:
            found.append((await own.approvals.get(approval_id=notice.approval_id)).request_id)

    async with GatewayStore(database_url, redis_url="", plugins=[Post(act=read)]) as store:
        await store.approvals.issue_token(make_request(request_id="r-1"))

    assert found == ["r-1"]
