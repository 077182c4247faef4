"""Erasing: nothing of an event is left by which it could be known or guessed, and the log still verifies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis.asyncio
from contract_helpers import POSTGRES, WITH_REDIS
from erasure_helpers import (
    BEFORE,
    MARK,
    OLD,
    everything,
    secret_call,
    secret_event,
    secrets_of,
    settle,
    used_approval,
)

from agent_gateway_store import GatewayStore, StoreSettings, SyncGatewayStore, clock
from agent_gateway_store.archive import Archive
from agent_gateway_store.archive.files import rewrite_approvals
from agent_gateway_store.audit.record import REUSED_LABEL
from agent_gateway_store.encoding.sanitize import storable_key
from agent_gateway_store.errors import AuditEventNotFoundError, EventHeldError, StoreUnavailableError
from agent_gateway_store.models.evidence import FindingKind
from agent_gateway_store.retention import erase
from builders import make_event, make_request
from servers import RedisServer
from tampering import tamper

# What differs on SQLite stands in `test_erasure_kills.py`.


@pytest.fixture
async def store(database_url: str, redis_setting: str) -> AsyncIterator[GatewayStore]:
    """An open store that seals when it is told to."""
    settings = StoreSettings(audit_seal_seconds=0, redis_timeout_seconds=5)
    async with GatewayStore(database_url, redis_url=redis_setting, settings=settings) as opened:
        yield opened


@POSTGRES
@WITH_REDIS
@pytest.mark.parametrize("archived", [False, True], ids=["table", "archive"])
async def test_nothing_is_left_by_which_it_could_be_guessed(
    store: GatewayStore, tmp_path: Path, archived: bool
) -> None:
    """No value, no hash, no salt: in any table, archive file, notice or Redis entry; neighbours are as they were."""
    await settle(store)
    folder = tmp_path / "a"
    neighbour = await store.audit.get_by_request_id("neighbour")
    if archived:
        await store.retention.prune(BEFORE, by="ops", archive=folder)
    secrets = await secrets_of(store, "r-1", folder=folder if archived else None)
    before = await everything(store, folder if archived else None)
    assert all(secret in before for secret in secrets)

    erased = await store.retention.erase("r-1", reason="GDPR 17", by="dpo", archive=folder if archived else None)

    assert (erased.archived, erased.approvals, erased.notices >= 1) == (archived, 1, True)
    after = await everything(store, folder if archived else None)
    assert [secret for secret in secrets if secret in after] == []
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


@POSTGRES
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


@POSTGRES
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


@POSTGRES
async def test_an_id_that_holds_a_hash_is_replaced(store: GatewayStore) -> None:
    """As of an event that came second under a used id, however long: its id would let the event be guessed."""
    for request_id in ("r-1", "y" * 460, "y" * 513):
        await store.audit.write(make_event(request_id=request_id))
        await store.audit.write(secret_event(request_id=request_id))
        await store.audit.write(secret_event(request_id=request_id, risk_labels=[MARK, REUSED_LABEL]))
    events = [each async for each in store.audit.stream(risk_label=REUSED_LABEL)]
    reused, copies = [each.request_id for each in events], store.for_org("of-copies")
    erased = [await store.retention.erase(each, reason="r", by="dpo") for each in reused]
    # Under the same ids, whose hashes are those of the first organisation.
    await copies.audit.write_many(events)
    for each in reused:
        await copies.retention.erase(each, reason="r", by="dpo")
    after = await everything(store)
    assert [each.request_id for each in erased] == [
        f"{given[:-65]}~erased-{each.position}" for given, each in zip(reused, erased, strict=True)
    ]
    assert [each for each in reused if each in after] == []
    assert await store.audit.get_by_request_id("r-1~erased-1") is not None
    assert (await store.evidence.verify()).erased == 12


@POSTGRES
@WITH_REDIS
@pytest.mark.parametrize("archived", [False, True], ids=["table", "archive"])
async def test_an_id_that_only_looks_as_if_it_held_a_hash_is_kept(
    store: GatewayStore, tmp_path: Path, archived: bool
) -> None:
    """A long one, which is stored so, or as its caller chose it: approvals and late arrivals are found by it."""
    folder = tmp_path / "a" if archived else None
    given = ("y" * 513, "job~" + "a" * 64)
    events = [secret_event(request_id=request_id, risk_labels=[MARK]) for request_id in given]
    for request_id in given:
        await used_approval(store, request_id)
    await store.audit.write_many([*events, make_event()])
    if archived:
        await store.retention.prune(BEFORE, by="ops", archive=folder)
        clock.move(timedelta(days=200))
        await store.retention.prune_approvals("190d", by="ops", archive=folder)
    for event in events:
        erased = await store.retention.erase(event.request_id, reason="r", by="dpo", archive=folder)
        assert (erased.request_id[-65:], erased.approvals) == (storable_key(event.request_id)[-65:], 1)
        await store.audit.write(event)
    assert MARK not in await everything(store, folder)
    await store.evidence.seal()
    verified = await store.evidence.verify(archive=folder)
    assert (verified.ok, verified.erased) == (True, 2)


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
        await store.retention.erase("r-4", reason="r", by="dpo", archive=tmp_path / "a")
    assert len([e async for e in store.audit.stream(tool_name="audit.erase")]) == 0


@POSTGRES
async def test_archived_calls_of_a_held_approval_are_not_erased(store: GatewayStore, tmp_path: Path) -> None:
    """A hold may name the approval, one or several."""
    ids = [uuid4(), uuid4()]
    await store.audit.write_many([secret_event(request_id=f"r-{at}", approval_id=each) for at, each in enumerate(ids)])
    await store.audit.write(make_event(request_id="newest"))
    await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
    for name, given, held in (("one", ids[0], "r-0"), ("several", [*ids, uuid4()], "r-1")):
        await store.retention.hold(name, reason="r", by="c", approval_id=given)
        with pytest.raises(EventHeldError, match=name):
            await store.retention.erase(held, reason="r", by="dpo", archive=tmp_path / "a")
    assert [event.sanitized_args for event in Archive(tmp_path / "a").events()] == [{"path": MARK}] * 2


@POSTGRES
async def test_a_store_of_one_organisation_is_not_told_the_names_of_holds(store: GatewayStore, tmp_path: Path) -> None:
    """It is told that there is one, in the table and in the archive, and lists none; the others are told which."""
    await store.audit.write_many([secret_event(org_id="acme"), make_event(timestamp=OLD), make_event()])
    await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
    await store.audit.write(secret_event(request_id="r-2", org_id="acme"))
    await store.retention.hold("globex vs. regulator", reason="r", by="c")
    for request_id in ("r-1", "r-2"):
        for view, holds in ((store.for_org("acme"), ()), (store, ("globex vs. regulator",))):
            with pytest.raises(EventHeldError) as raised:
                await view.retention.erase(request_id, reason="r", by="dpo", archive=tmp_path / "a")
            assert raised.value.holds == holds
            assert ("globex" in str(raised.value)) == bool(holds)
            assert "is held" in str(raised.value)
    with pytest.raises(ValueError, match="all organisations"):
        await store.for_org("acme").retention.holds()


@POSTGRES
async def test_an_erased_event_is_archived_as_that(store: GatewayStore, tmp_path: Path) -> None:
    """What was blanked in the table and goes to an archive later is no forgery there."""
    await settle(store)
    await store.retention.erase("r-1", reason="r", by="dpo")
    await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
    verified = await store.evidence.verify(archive=tmp_path / "a")
    assert (verified.ok, verified.erased, verified.archived) == (True, 1, 2)
    assert Archive(tmp_path / "a").verify().ok


@POSTGRES
async def test_deadlines_and_the_floor_are_those_of_the_database_clock(
    store: GatewayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process whose clock is a year ahead takes nothing that is young or open."""

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(days=365)

    await store.audit.write(make_event(request_id="r-2"))
    await store.approvals.issue_token(make_request(request_id="r-2"))
    await store.evidence.seal()
    monkeypatch.setattr(clock, "datetime", Ahead)
    with pytest.raises(ValueError, match="still open"):
        await store.retention.erase("r-2", reason="r", by="dpo")
    pruned = await store.retention.prune_approvals("0d", by="ops", discard=True, below_floor=True)
    assert pruned.approvals == 0
    assert (await store.retention.prune("200d", by="ops", discard=True)).events == 0
    with pytest.raises(ValueError, match="AUDIT_RETENTION_FLOOR_DAYS"):
        await store.retention.prune(Ahead.now(UTC) - timedelta(days=200), by="ops", discard=True)
    await store.retention.hold("case", reason="r", by="c", since="24h")
    with pytest.raises(EventHeldError, match="case"):
        await store.retention.erase("r-2", reason="r", by="dpo")


@POSTGRES
async def test_an_organisation_erases_its_own(store: GatewayStore) -> None:
    """The same id in two organisations: the unbound store asks for one of them."""
    for org_id in ("acme", "globex"):
        await store.audit.write(secret_event(org_id=org_id))
    with pytest.raises(ValueError, match="'acme', 'globex'"):
        await store.retention.erase("r-1", reason="r", by="dpo")
    await store.for_org("acme").retention.erase("r-1", reason="r", by="dpo")
    kept = {e.org_id: e.sanitized_args async for e in store.audit.stream(request_id="r-1")}
    assert kept == {"acme": {}, "globex": {"path": MARK}}


@POSTGRES
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


@POSTGRES
@WITH_REDIS
@pytest.mark.parametrize("decodes", [False, True], ids=["bytes", "text"])
async def test_an_entry_is_found_that_no_other_entry_leads_to(
    store: GatewayStore, database_url: str, redis_setting: str, decodes: bool
) -> None:
    """As Redis has it after it lost its keys between the question and the decision; other entries stay."""
    async with redis.asyncio.from_url(redis_setting, decode_responses=decodes) as client:
        asked = [make_request(request_id=f"r-{n}", tool_call=secret_call(), risk_explanation=MARK) for n in (1, 2)]
        tokens = [await store.approvals.issue_token(request) for request in asked]
        await client.flushdb()
        for token in tokens:
            await store.approvals.deny(token, "alice", MARK)
        await store.audit.write_many([secret_event(), make_event()])
        assert sorted(await client.keys("approval*")) == sorted(
            key if decodes else key.encode() for key in (f"approval:{token}" for token in tokens)
        )

        # Of others, which are no text.
        for key in ("approval:other", b"approval:\xff"):
            await client.set(key, b"\xff")

        async with GatewayStore(database_url, redis=client, settings=StoreSettings(audit_seal_seconds=0)) as own:
            await own.retention.erase("r-1", reason="r", by="dpo")

        assert [await client.exists(f"approval:{token}") for token in tokens] == [0, 1]
        assert await client.exists("approval:other", b"approval:\xff") == 2


@POSTGRES
async def test_an_erasure_waits_for_redis_and_is_not_held_up_by_large_entries(
    store: GatewayStore, database_url: str
) -> None:
    """Nothing is said while it is away. It may hold more than it could send in time, or at all."""
    token = await store.approvals.issue_token(make_request(request_id="r-1", tool_call=secret_call()))
    await store.audit.write_many([secret_event(), make_event()])
    settings = StoreSettings(audit_seal_seconds=0, redis_timeout_seconds=5)
    with RedisServer(options=["--client-output-buffer-limit", "normal 1mb 0 0"]) as server:
        async with (
            GatewayStore(database_url, redis_url=server.url, settings=settings) as other,
            redis.asyncio.from_url(server.url) as client,
        ):
            await other.approvals.deny(token, "alice", MARK)
            for number in range(8):
                await client.set(f"approval:{number}", "x" * 2**20)
                # In whatever order Redis names them, some of these come late.
                await client.copy(f"approval:{token}", f"approval:copy-{number}")
            async with GatewayStore(database_url, redis_url="redis://127.0.0.1:1", settings=settings) as cut_off:
                with pytest.raises(StoreUnavailableError, match="erase 'r-1' again"):
                    await cut_off.retention.erase("r-1", reason="r", by="dpo")
            assert [event async for event in store.audit.stream(tool_name="audit.erase")] == []
            await other.retention.erase("r-1", reason="r", by="dpo")
            assert sorted(await client.keys("approval*")) == sorted(f"approval:{n}".encode() for n in range(8))


@POSTGRES
@WITH_REDIS
async def test_what_is_cached_while_it_is_erased_goes_too(
    store: GatewayStore, database_url: str, redis_setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poll that reads the approval after its entry was deleted, and before it is blanked."""
    await store.audit.write_many([secret_event(), make_event(request_id="old", timestamp=OLD), make_event()])
    await store.retention.hold("h", reason="r", by="c", request_id="r-1")
    await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
    await store.retention.release_hold("h", by="c")
    request = make_request(request_id="r-1", tool_call=secret_call(), risk_explanation=MARK)
    token = await store.approvals.issue_token(request)
    await store.approvals.deny(token, "alice", MARK)
    seen: list[str] = []

    def poll(*given: Any) -> int:
        with SyncGatewayStore(database_url, redis_url=redis_setting) as other:
            seen.append(other.approvals.check_token(token, fresh=True).note)
        return rewrite_approvals(*given)

    monkeypatch.setattr(erase, "rewrite_approvals", poll)
    await store.retention.erase("r-1", reason="r", by="dpo", archive=tmp_path / "a")

    assert seen == [MARK]
    assert MARK not in await everything(store, tmp_path / "a")
