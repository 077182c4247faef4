"""Erasing where several calls rest on one approval.

A hold on any of them keeps it, and evidence of the others stays true.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
from contract_helpers import POSTGRES, store_sealed_by_hand
from erasure_helpers import BEFORE, MARK, OLD, everything, used_approval

from agent_gateway_store import AuditEvent, GatewayStore, clock
from agent_gateway_store.archive import Archive
from agent_gateway_store.errors import EventHeldError
from agent_gateway_store.evidence import check
from agent_gateway_store.models.approval import hash_approval
from builders import make_event

pytestmark = POSTGRES
store = store_sealed_by_hand


async def asked_and_run(store: GatewayStore, *, asked: AuditEvent, run: AuditEvent, **others: AuditEvent) -> UUID:
    """Write the call that asked for an approval, and the one that the approval released under another id."""
    approval_id = await used_approval(store, asked.request_id)
    [request] = await store.approvals.search(request_id=asked.request_id)
    named = {"approval_id": approval_id, "extra": {"approval_sha256": hash_approval(request, request.votes or ())}}
    await store.audit.write_many([asked, run.model_copy(update=named), *others.values()])
    await store.audit.write(make_event(request_id="newest"))
    await store.evidence.seal()
    return approval_id


async def archive(store: GatewayStore, folder: Path) -> None:
    """Move the old events to an archive, and the approvals that no event in the table needs."""
    await store.retention.prune(BEFORE, by="ops", archive=folder)
    clock.move(timedelta(days=200))
    await store.retention.prune_approvals("190d", by="ops", archive=folder)


async def test_approvals_are_not_discarded_while_archived_events_may_be_held(
    store: GatewayStore, tmp_path: Path
) -> None:
    """A hold that comes after the prune covers what only the archive has: its approval is archived, not discarded."""
    await asked_and_run(
        store, asked=make_event(request_id="r-1", timestamp=OLD), run=make_event(request_id="r-2", timestamp=OLD)
    )
    await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
    clock.move(timedelta(days=200))
    await store.retention.hold("suit", reason="r", by="counsel", request_id="r-1")

    with pytest.raises(ValueError, match="archive=FOLDER"):
        await store.retention.prune_approvals("190d", by="ops", discard=True)

    assert len(await store.approvals.search(request_id="r-1")) == 1
    assert (await store.retention.prune_approvals("190d", by="ops", archive=tmp_path / "a")).approvals == 1


async def test_an_approval_that_an_archived_event_may_need_is_not_erased_unseen(
    store: GatewayStore, tmp_path: Path
) -> None:
    """The call that asked for it is archived and held; the one that ran is in the table."""
    asked, run = make_event(request_id="r-1", timestamp=OLD), make_event(request_id="r-2")
    await asked_and_run(store, asked=asked, run=run)
    await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
    await store.retention.hold("suit", reason="r", by="counsel", request_id="r-1")
    await store.evidence.seal()
    before = await everything(store, tmp_path / "a")

    for view in (store, store.for_org("default")):
        with pytest.raises(ValueError, match="archive=FOLDER"):
            await view.retention.erase("r-2", reason="r", by="dpo")

    assert await everything(store, tmp_path / "a") == before
    await store.retention.release_hold("suit", by="counsel")
    assert (await store.retention.erase("r-2", reason="r", by="dpo")).approvals == 1


async def test_approvals_are_discarded_beside_a_hold_where_nothing_was_archived(store: GatewayStore) -> None:
    """Then the table tells which approvals are those of held events."""
    await used_approval(store, "r-1")
    clock.move(timedelta(days=200))
    await store.retention.hold("suit", reason="r", by="counsel", caller_id="somebody")

    assert (await store.retention.prune_approvals("190d", by="ops", discard=True)).approvals == 1


@pytest.mark.parametrize(
    ("archived", "held"), [("none", "r-1"), ("none", "r-2"), ("other", "r-1"), ("all", "r-1"), ("all", "r-2")]
)
async def test_an_approval_of_a_held_call_is_not_erased_with_another_call(
    store: GatewayStore, tmp_path: Path, archived: str, held: str
) -> None:
    """The call that asked for it, and the one that ran: in the table, and in the archive."""
    erased = {"r-1": "r-2", "r-2": "r-1"}[held]
    now = make_event().timestamp
    times = {erased: OLD if archived == "all" else now, held: now if archived == "none" else OLD}
    asked, run = (make_event(request_id=each, timestamp=times[each]) for each in ("r-1", "r-2"))
    await asked_and_run(store, asked=asked, run=run)
    folder = tmp_path / "a"
    if archived != "none":
        await archive(store, folder)
        assert len(list(folder.glob("approvals-*"))) == (archived == "all")
    await store.retention.hold("suit", reason="r", by="counsel", request_id=held)
    await store.evidence.seal()
    before = await everything(store, folder)

    with pytest.raises(EventHeldError, match="suit") as raised:
        await store.retention.erase(erased, reason="r", by="dpo", archive=folder if archived != "none" else None)

    assert raised.value.holds == ("suit",)
    assert await everything(store, folder) == before
    assert MARK in before
    await store.retention.release_hold("suit", by="counsel")
    await store.retention.erase(erased, reason="r", by="dpo", archive=folder if archived != "none" else None)
    assert MARK not in await everything(store, folder)


async def test_a_hold_on_a_call_that_has_nothing_to_do_with_it_keeps_nothing(store: GatewayStore) -> None:
    """Neither one of another organisation, under the same id or of the same approval, nor an event of retention."""
    asked, run = make_event(request_id="r-1"), make_event(request_id="r-2")
    same_id = make_event(request_id="r-1", org_id="globex")
    approval_id = await asked_and_run(store, asked=asked, run=run, same_id=same_id)
    await store.audit.write(make_event(approval_id=approval_id, org_id="globex"))
    await store.retention.hold("globex", reason="r", by="c", org_id="globex")
    await store.retention.hold("doors", reason="r", by="c", mcp_server="gateway-store")
    assert (await store.for_org("default").retention.erase("r-1", reason="r", by="dpo")).approvals == 1
    assert (await store.retention.erase("r-2", reason="r", by="dpo")).approvals == 1


async def test_evidence_of_a_call_whose_approval_was_erased_is_without_it(store: GatewayStore) -> None:
    """It is that of the event alone, and says so: it was honest, and does not look altered."""
    await asked_and_run(store, asked=make_event(request_id="r-1"), run=make_event(request_id="r-2"))
    before = await store.evidence.prove("r-2")
    assert before.approval is not None
    await store.retention.erase("r-1", reason="r", by="dpo")

    after = await store.evidence.prove("r-2")

    found = check(after.to_json())
    assert (after.approval, after.votes) == (None, ())
    assert (found.ok, found.findings) == (True, ())
    assert "The event names an approval, which is not in this text." in found.remarks
    assert not any("are those that the event names" in remark for remark in found.remarks)
    assert (await store.evidence.prove("r-1")).approval is None
    assert not check((await store.evidence.prove("r-1")).to_json()).ok
    # What was kept from before goes on to show both.
    assert check(before.to_json()).ok
    verified = await store.evidence.verify()
    assert (verified.ok, verified.erased) == (True, 1)


@pytest.mark.parametrize("archived", [False, True], ids=["table", "archive"])
async def test_an_approval_that_only_says_it_was_erased_was_not(
    store: GatewayStore, tmp_path: Path, archived: bool
) -> None:
    """Its explanation is the gateway's to choose: it is shown in evidence, and is erased like any other."""
    approval_id = await used_approval(store, "r-1", "[ERASED]")
    [request] = await store.approvals.search(request_id="r-1")
    named = {"approval_id": approval_id, "extra": {"approval_sha256": hash_approval(request, request.votes or ())}}
    await store.audit.write_many([make_event(request_id="r-1", timestamp=OLD, **named), make_event()])
    await store.evidence.seal()
    assert (await store.evidence.prove("r-1")).approval is not None
    if archived:
        await archive(store, tmp_path / "a")
    erased = await store.retention.erase("r-1", reason="r", by="dpo", archive=tmp_path / "a" if archived else None)
    assert erased.approvals == 1
    assert "fine for" not in await everything(store, tmp_path / "a")
    if archived:
        assert Archive(tmp_path / "a").verify().ok
