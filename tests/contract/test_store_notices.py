"""`GatewayStore` and its notifiers: told in the background, after the commit, and never waited for."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from contract_helpers import GatedNotifier, approved, seen

from agent_gateway_store import GatewayStore, Notice, StoreSettings, errors
from agent_gateway_store.testing import RecordingNotifier
from builders import CALL, make_request


async def test_notifier_hears_of_asking_and_deciding(database_url: str) -> None:
    """One notice for the question, one for each decision, none for asking again or for a use; never a token."""
    recorder = RecordingNotifier()
    async with GatewayStore(database_url, plugins=[recorder]) as store:
        tokens = [await approved(store)]
        await store.approvals.consume_token(tokens[0], caller_id="dev-agent", tool_call=CALL)
        await store.approvals.record_outcome(tokens[0], "done")
        for _ in range(2):
            tokens.append(await store.approvals.issue_token(make_request(request_id="r-1")))
        await store.approvals.deny(tokens[-1], "approver-1", "no")
        with pytest.raises(errors.ApprovalAlreadyDecidedError):
            await store.approvals.approve(tokens[-1], "approver-2")

    decided = ("decision", "APPROVED"), ("decision", "DENIED")
    assert seen(recorder) == [*decided, ("pending", "PENDING"), ("pending", "PENDING")]
    told = "".join(notice.model_dump_json() + repr(notice) for notice in recorder.notices)
    assert not any(token in told for token in tokens)
    assert len({notice.delivery_id for notice in recorder.notices}) == 4


async def test_notices_go_out_in_the_background(database_url: str) -> None:
    """Asking and deciding wait for no notifier; closing waits until the notices have arrived."""
    gate = threading.Event()
    recorder = GatedNotifier(gate)
    async with GatewayStore(database_url, plugins=[recorder]) as store:
        token = await approved(store)
        assert (await store.approvals.check_token(token)).status == "APPROVED"
        assert recorder.notices == []
        gate.set()

    assert seen(recorder) == [("decision", "APPROVED"), ("pending", "PENDING")]


async def test_notice_is_sent_after_the_commit(database_url: str) -> None:
    """What a notifier is told stands in the database, as another connection sees it."""
    found: list[str] = []

    class Reader(RecordingNotifier):
        async def notify_pending(self, notice: Notice) -> None:
            async with GatewayStore(database_url, plugins=[]) as own:
                found.append((await own.approvals.get(approval_id=notice.approval_id)).request_id)

    async with GatewayStore(database_url, plugins=[Reader()]) as store:
        await store.approvals.issue_token(make_request(request_id="r-1"))

    assert found == ["r-1"]


async def test_broken_and_hanging_notifiers_hold_nothing_up(database_url: str) -> None:
    """One that raises and one that never returns cost the gateway nothing, and closing no more than their timeout."""
    recorder = RecordingNotifier()

    class Broken(RecordingNotifier):
        async def notify_pending(self, notice: Notice) -> None:
            raise RuntimeError("no network")

    class Hanging(RecordingNotifier):
        async def notify_pending(self, notice: Notice) -> None:
            await asyncio.Event().wait()

    settings = StoreSettings(plugin_timeout_seconds=0.2)
    plugins = [Broken("broken"), Hanging("hanging"), recorder]
    async with GatewayStore(database_url, settings=settings, plugins=plugins) as store:
        await store.approvals.issue_token(make_request())
        started = time.monotonic()

    assert time.monotonic() - started < 10
    assert seen(recorder) == [("pending", "PENDING")]


async def test_refused_request_notifies_nobody(database_url: str) -> None:
    """No notice tells of what was not committed."""
    recorder = RecordingNotifier()
    async with GatewayStore(database_url, plugins=[recorder]) as store:
        with pytest.raises(errors.ApprovalMismatchError):
            await store.for_org("acme").approvals.issue_token(make_request(org_id="globex"))
        with pytest.raises(errors.ApprovalNotFoundError):
            await store.approvals.approve("no-such-token", "approver-1")

    assert recorder.notices == []
