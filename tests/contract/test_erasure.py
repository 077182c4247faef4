"""Erasing: nothing of an event is left by which it could be known or guessed, and the log still verifies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from contract_helpers import WITH_REDIS
from sqlalchemy import text

from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings, ToolCall, clock
from agent_gateway_store.archive import Archive
from agent_gateway_store.errors import AuditEventNotFoundError, EventHeldError
from agent_gateway_store.models.evidence import FindingKind
from agent_gateway_store.models.tables import metadata
from builders import make_event, make_request
from tampering import tamper

OLD = datetime(2025, 3, 1, 12, tzinfo=UTC)
BEFORE = OLD + timedelta(days=60)
MARK = "belongs-to-ada"
CALL = ToolCall(server="files", tool="delete_file", arguments={"path": f"/home/{MARK}"})


@pytest.fixture
async def store(database_url: str, redis_setting: str) -> AsyncIterator[GatewayStore]:
    """An open store that seals when it is told to."""
    settings = StoreSettings(audit_seal_seconds=0, redis_timeout_seconds=5)
    async with GatewayStore(database_url, redis_url=redis_setting, settings=settings) as opened:
        yield opened


def secret_event(**fields: Any) -> AuditEvent:
    """An event whose mark is everywhere that is erased."""
    return make_event(
        **{
            "request_id": "r-1",
            "timestamp": OLD,
            "sanitized_args": {"path": MARK},
            "raw_args_hash": AuditEvent.hash_args({"path": MARK}),
            "risk_labels": [MARK],
            "output_hash": AuditEvent.hash_args({"out": MARK}),
            "output_policy_rationale": MARK,
            "llm_explanation": MARK,
            "deterministic_rationale": MARK,
            "redaction_flags": [{"field": MARK, "reason": "PII", "original_hash": AuditEvent.hash_args({"was": MARK})}],
            "extra": {"error": MARK},
        }
        | fields
    )


async def everything(store: GatewayStore, folder: Path | None = None) -> str:
    """Every value of every table, of the archive, and of Redis, as text."""
    parts: list[str] = []
    async with store.database.engine.connect() as connection:
        for table in metadata.sorted_tables:
            for row in await connection.execute(text(f"SELECT * FROM {table.name}")):
                parts += [value.hex() if isinstance(value, bytes) else str(value) for value in row]
    if folder is not None:
        parts.append((folder / "manifest.jsonl").read_text())
        parts += [path.read_text() for path in folder.glob("*.jsonl")]
        parts += [str(event.model_dump()) for event in Archive(folder).events()]
        parts += [str(batch.to_pylist()) for _, batch in Archive(folder).batches({}, ("salt", "content_hash"))]
    return "\n".join(parts)


async def hashes_of(store: GatewayStore, folder: Path | None = None) -> list[str]:
    """What must not be found again: the mark, every hash of content, and the salts."""
    event = secret_event()
    stored = await store.audit.get_by_request_id("r-1") or next(Archive(folder or "").events(request_id="r-1"))
    async with store.database.read() as connection:
        salts = [bytes(row[0]).hex() for row in await connection.execute(
            text("SELECT salt FROM audit_leaves WHERE event_id = :id"), {"id": stored.id})]  # fmt: skip
    flags = [flag.original_hash or "" for flag in event.redaction_flags]
    return [MARK, event.raw_args_hash, event.output_hash or "", stored.content_hash or "", *flags, *salts]


async def settle(store: GatewayStore) -> None:
    """Write the event, an approval of its request that was used, and its notices; and a neighbour."""
    token = await store.approvals.issue_token(make_request(request_id="r-1", tool_call=CALL, risk_explanation=MARK))
    await store.approvals.approve(token, "alice", f"fine for {MARK}")
    await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    await store.approvals.record_outcome(token, f"SUCCESS {MARK}")
    while await store.notifications.list("DUE"):
        await asyncio.sleep(0.01)
    await store.audit.write_many([secret_event(), make_event(request_id="neighbour", timestamp=OLD)])
    await store.audit.write(make_event(request_id="newest"))
    await store.evidence.seal()


@WITH_REDIS
@pytest.mark.parametrize("archived", [False, True], ids=["table", "archive"])
async def test_nothing_is_left_by_which_it_could_be_guessed(
    store: GatewayStore, tmp_path: Path, archived: bool, client: Any
) -> None:
    """No value, no hash, no salt: in any table, archive file, notice or Redis entry; neighbours are as they were."""
    await settle(store)
    folder = tmp_path / "a"
    neighbour = await store.audit.get_by_request_id("neighbour")
    if archived:
        await store.retention.prune(BEFORE, by="ops", archive=folder)
    secrets = await hashes_of(store, folder)
    before = await everything(store, folder if archived else None)
    assert all(secret in before for secret in secrets)

    erased = await store.retention.erase("r-1", reason="GDPR 17", by="dpo", archive=folder if archived else None)

    assert (erased.archived, erased.approvals, erased.notices >= 1) == (archived, 1, True)
    after = await everything(store, folder if archived else None)
    assert [secret for secret in secrets if secret in after] == []
    keys = [key async for key in client.scan_iter("*")]
    values = [await client.get(key) or b"" for key in keys if await client.type(key) == b"string"]
    assert not [value for value in values if MARK.encode() in value]
    verified = await store.evidence.verify(archive=folder if archived else None)
    assert (verified.ok, verified.erased) == (True, 1)
    left = next(Archive(folder).events(request_id="r-1")) if archived else await store.audit.get_by_request_id("r-1")
    assert left is not None
    assert (left.caller_id, left.tool_name, left.deterministic_rationale) == ("dev-agent", "read_file", "[ERASED]")
    same = next(Archive(folder).events(request_id="neighbour")) if archived else await store.audit.get_by_request_id(
        "neighbour")  # fmt: skip
    assert same == neighbour
    if archived:
        assert Archive(folder).verify().ok
        assert len(list(folder.rglob("*.parquet"))) == 1


async def test_the_log_says_who_erased_what_and_why(store: GatewayStore) -> None:
    """The event holds nothing of the erased one; a second call finds nothing left to do."""
    await store.audit.write_many([secret_event(), make_event()])
    await store.retention.erase("r-1", reason="GDPR 17", by="dpo")
    await store.retention.erase("r-1", reason="GDPR 17", by="dpo")
    [door] = [event async for event in store.audit.stream(tool_name="audit.erase")]
    assert door.caller_id == "dpo"
    assert door.sanitized_args["reason"] == "GDPR 17"
    assert door.sanitized_args.keys() == {"position", "row_sha256", "reason", "approvals", "archived"}
    with pytest.raises(AuditEventNotFoundError):
        await store.retention.erase("never-was", reason="r", by="dpo")
    with pytest.raises(ValueError, match="reason must not be blank"):
        await store.retention.erase("r-1", reason="", by="dpo")


async def test_a_blanked_event_without_a_sealed_erasure_is_found(store: GatewayStore, tmp_path: Path) -> None:
    """Whoever blanks a row past the store is found, also one who changes what is left of an erased one."""
    await store.audit.write_many([secret_event(), make_event(request_id="r-2")])
    await store.retention.erase("r-1", reason="r", by="dpo")
    await tamper(store.database.engine, "UPDATE audit_events SET caller_id = 'someone' WHERE request_id = 'r-1'")
    found = await store.evidence.verify()
    assert [(each.kind, each.request_id) for each in found.findings] == [(FindingKind.ALTERED, "r-1")]


@pytest.mark.parametrize("archived", [False, True], ids=["table", "archive"])
async def test_what_arrives_later_under_the_id_is_kept_blanked(
    store: GatewayStore, tmp_path: Path, archived: bool
) -> None:
    """A replay, as of a spool, and once more: by every way in. It is known by its label, and stored once."""
    await store.audit.write_many([secret_event(), make_event(request_id="newest")])
    if archived:
        await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
    await store.retention.erase("r-1", reason="r", by="dpo", archive=tmp_path / "a" if archived else None)
    outcomes = [
        await store.audit.write(secret_event()),
        await store.audit.write(secret_event()),
    ]
    await store.audit.write_many([secret_event(), make_event()])
    async with store.database.sessions() as session:
        await store.audit.record(secret_event(), session=session)
        await session.commit()

    assert outcomes == ["STORED", "DUPLICATE"]
    assert MARK not in await everything(store)
    later = [e async for e in store.audit.stream(risk_label="REQUEST_ID_REUSED")]
    assert [(event.sanitized_args, event.deterministic_rationale) for event in later] == [({}, "[ERASED]")]
    assert later[0].request_id.startswith("r-1~")
    await store.evidence.seal()
    assert (await store.evidence.verify(archive=tmp_path / "a" if archived else None)).ok


async def test_an_id_that_holds_a_hash_is_replaced(store: GatewayStore) -> None:
    """As of an event that came second under a used id: its id would let the event be guessed."""
    await store.audit.write(make_event(request_id="r-1"))
    await store.audit.write(secret_event())
    [second] = [e async for e in store.audit.stream(risk_label="REQUEST_ID_REUSED")]
    erased = await store.retention.erase(second.request_id, reason="r", by="dpo")
    assert erased.request_id == "r-1~erased-1"
    left = await store.audit.get_by_request_id("r-1~erased-1")
    assert left is not None
    assert second.request_id not in await everything(store)
    assert (await store.evidence.verify()).erased == 1


async def test_held_and_open_things_are_not_erased(store: GatewayStore, tmp_path: Path) -> None:
    """In the table and in the archive; nothing changes."""
    await settle(store)
    await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
    await store.audit.write(secret_event(request_id="r-3", session_id="s"))
    await store.retention.hold("archived", reason="r", by="c", request_id="r-1")
    await store.retention.hold("stored", reason="r", by="c", session_id="s")
    for request_id, name in (("r-1", "archived"), ("r-3", "stored")):
        with pytest.raises(EventHeldError) as raised:
            await store.retention.erase(request_id, reason="r", by="dpo", archive=tmp_path / "a")
        assert raised.value.holds == (name,)
    await store.approvals.issue_token(make_request(request_id="r-4"))
    await store.audit.write(secret_event(request_id="r-4"))
    with pytest.raises(ValueError, match="still open"):
        await store.retention.erase("r-4", reason="r", by="dpo")
    assert len([e async for e in store.audit.stream(tool_name="audit.erase")]) == 0


async def test_an_organisation_erases_its_own(store: GatewayStore) -> None:
    """The same id in two organisations: the unbound store asks for one of them."""
    for org_id in ("acme", "globex"):
        await store.audit.write(secret_event(org_id=org_id))
    with pytest.raises(ValueError, match="'acme', 'globex'"):
        await store.retention.erase("r-1", reason="r", by="dpo")
    await store.for_org("acme").retention.erase("r-1", reason="r", by="dpo")
    kept = {e.org_id: e.sanitized_args async for e in store.audit.stream(request_id="r-1")}
    assert kept == {"acme": {}, "globex": {"path": MARK}}


async def test_find_names_what_a_request_is_about(store: GatewayStore, tmp_path: Path) -> None:
    """By caller, by a text anywhere; in tables and archive, approvals included."""
    await settle(store)
    for folder in (None, tmp_path / "a"):
        if folder is not None:
            await store.retention.prune(BEFORE, by="ops", archive=folder)
            clock.move(timedelta(days=200))
            await store.retention.prune_approvals(timedelta(0), by="ops", archive=folder, below_floor=True)
        by_text = await store.retention.find(text=MARK.upper(), archive=folder)
        assert {(each.kind, each.request_id, each.file is None) for each in by_text} == {
            ("event", "r-1", folder is None), ("approval", "r-1", folder is None)}  # fmt: skip
        by_caller = await store.retention.find(caller_id="dev-agent", archive=folder)
        assert {each.request_id for each in by_caller} == {"r-1", "neighbour", "newest"}
        assert await store.retention.find(caller_id="nobody", text=MARK, archive=folder) == []
    with pytest.raises(ValueError, match="Give caller_id"):
        await store.retention.find()


class TestApprovals:
    """Approvals that are over and that nothing cites any more."""

    async def test_they_go_after_their_events(self, store: GatewayStore, tmp_path: Path) -> None:
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

    async def test_archived_ones_are_erased_with_their_event(self, store: GatewayStore, tmp_path: Path) -> None:
        """Their file is written anew, and the old one is gone."""
        await settle(store)
        clock.move(timedelta(days=200))
        await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
        await store.retention.prune_approvals("190d", by="ops", archive=tmp_path / "a")
        erased = await store.retention.erase("r-1", reason="r", by="dpo", archive=tmp_path / "a")
        assert erased.approvals == 1
        assert MARK not in await everything(store, tmp_path / "a")
        assert len(list((tmp_path / "a").glob("approvals-*.jsonl"))) == 1
        assert (await store.evidence.verify(archive=tmp_path / "a")).ok
