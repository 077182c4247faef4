"""Approvals that are over, and that nothing cites any more, go into the archive, and are erased there."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from contract_helpers import WITH_REDIS, store_sealed_by_hand, until
from delivery_helpers import Post, raising
from erasure_helpers import BEFORE, MARK, KilledError, everything, killed, secret_call, secret_event, settle
from sqlalchemy import text

from agent_gateway_store import GatewayStore, StoreSettings, clock
from agent_gateway_store.archive import Archive
from agent_gateway_store.retention import approvals
from builders import make_event, make_request

store = store_sealed_by_hand


async def _has_dead_notices(store: GatewayStore) -> bool:
    return len(await store.notifications.list("DEAD")) == 2


async def test_approvals_go_after_their_events(store: GatewayStore, tmp_path: Path) -> None:
    """With votes and delivered notices, into lines of JSON without token; open and cited ones stay."""
    await settle(store)
    open_token = await store.approvals.issue_token(
        make_request(request_id="r-open", expires_at=datetime(2100, 1, 1, tzinfo=UTC))
    )
    clock.move(timedelta(days=200))
    folder = tmp_path / "a"
    assert (await store.retention.prune_approvals("190d", by="ops", archive=folder)).approvals == 0
    await store.retention.prune(BEFORE, by="ops", archive=folder)
    pruned = await store.retention.prune_approvals("190d", by="ops", archive=folder)

    assert (pruned.approvals, pruned.files, pruned.notices >= 1) == (1, 1, True)
    [path] = folder.glob("approvals-*.jsonl")
    [record] = [json.loads(line) for line in path.read_text().splitlines()]
    assert record["approval"]["request_id"] == "r-1"
    assert (record["votes"][0]["approver_id"], "token" in record["approval"]) == ("alice", False)
    assert len(await store.approvals.list_requests()) == 1
    assert (await store.approvals.check_token(open_token)).status == "PENDING"
    assert Archive(folder).verify().ok
    path.write_text(path.read_text().replace("alice", "mallory"))
    assert not Archive(folder).verify().ok


@WITH_REDIS
async def test_nothing_of_archived_ones_is_left_elsewhere(
    database_url: str, redis_setting: str, tmp_path: Path
) -> None:
    """Neither in Redis, where the entry of one that could have been decided longer lives on, nor in a notice that
    could not be delivered.
    """
    settings = StoreSettings(audit_seal_seconds=0, redis_timeout_seconds=5, notification_max_attempts=1)
    plugins, folder = [Post(act=raising(ConnectionError()))], tmp_path / "a"
    async with GatewayStore(database_url, redis_url=redis_setting, settings=settings, plugins=plugins) as store:
        expires_at = datetime(2100, 1, 1, tzinfo=UTC)
        request = make_request(tool_call=secret_call(), risk_explanation=MARK, expires_at=expires_at)
        token = await store.approvals.issue_token(request)
        denied = await store.approvals.deny(token, "alice", MARK)
        await until(lambda: _has_dead_notices(store))
        await store.audit.write(secret_event(approval_id=denied.approval_id))
        await store.audit.write(make_event())
        clock.move(timedelta(days=200))
        await store.retention.prune(BEFORE, by="ops", archive=folder)
        assert (await store.retention.prune_approvals("190d", by="ops", archive=folder)).approvals == 1
        assert (await everything(store)).count(MARK) > 1

        erased = await store.retention.erase("r-1", reason="r", by="dpo", archive=folder)

        assert (erased.approvals, erased.notices) == (1, 2)
        assert MARK not in await everything(store, folder)


async def test_archived_ones_are_erased_with_their_event_and_the_salts(store: GatewayStore, tmp_path: Path) -> None:
    """Their file is written anew. The hash of the old one stays in the manifest, but cannot be guessed from."""
    await settle(store)
    clock.move(timedelta(days=200))
    await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
    await store.retention.prune_approvals("190d", by="ops", archive=tmp_path / "a")
    [path] = (tmp_path / "a").glob("approvals-*.jsonl")
    salts = [json.loads(line)["salt"] for line in path.read_text().splitlines()]
    erased = await store.retention.erase("r-1", reason="r", by="dpo", archive=tmp_path / "a")
    after = await everything(store, tmp_path / "a")
    assert (erased.approvals, MARK in after, len(list((tmp_path / "a").glob("approvals-*.jsonl")))) == (1, False, 1)
    assert (await store.evidence.verify(archive=tmp_path / "a")).ok
    assert [len(bytes.fromhex(salt)) for salt in salts] == [16]
    assert [salt for salt in salts if salt in after] == []


async def test_what_two_killed_runs_have_archived_is_there_once(
    store: GatewayStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another approval, which was asked for earlier, was over by the second run."""
    expires_at = clock.utc_now() + timedelta(days=100)
    await store.approvals.issue_token(make_request(request_id="r-1", expires_at=expires_at))
    await store.approvals.deny(await store.approvals.issue_token(make_request(request_id="r-2")), "alice")

    for days in (200, 100):
        clock.move(timedelta(days=days))
        with monkeypatch.context() as patch:
            patch.setattr(approvals, "write_door", killed)
            with pytest.raises(KilledError):
                await store.retention.prune_approvals("190d", by="ops", archive=tmp_path / "a")
    pruned = await store.retention.prune_approvals("190d", by="ops", archive=tmp_path / "a")

    assert pruned.approvals == 2
    files = [path.read_text() for path in (tmp_path / "a").glob("approvals-*.jsonl")]
    archived = [json.loads(line)["approval"]["request_id"] for text in files for line in text.splitlines()]
    assert sorted(archived) == ["r-1", "r-2"]


async def test_an_approval_that_ended_otherwise_after_a_restore_is_archived_as_it_is(
    store: GatewayStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive holds how it ended before; its id alone does not say that it holds this one."""
    token = await store.approvals.issue_token(make_request(request_id="r-1"))
    denied = await store.approvals.deny(token, "alice", "before")
    clock.move(timedelta(days=200))
    with monkeypatch.context() as patch:
        patch.setattr(approvals, "write_door", killed)
        with pytest.raises(KilledError):
            await store.retention.prune_approvals("190d", by="ops", archive=tmp_path / "a")
    own = {"id": denied.approval_id.hex if store.database.dialect == "sqlite" else denied.approval_id}
    async with store.database.write() as connection:
        after = text("UPDATE approval_votes SET note = 'after' WHERE approval_id = :id")
        assert (await connection.execute(after, own)).rowcount == 1

    pruned = await store.retention.prune_approvals("190d", by="ops", archive=tmp_path / "a")

    assert pruned.approvals == 1
    files = [path.read_text() for path in (tmp_path / "a").glob("approvals-*.jsonl")]
    votes = [vote["note"] for lines in files for line in lines.splitlines() for vote in json.loads(line)["votes"]]
    assert sorted(votes) == ["after", "before"]
