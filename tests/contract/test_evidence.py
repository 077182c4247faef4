"""`store.evidence`: dense positions, checkpoints, and a verification that names what was changed."""

from __future__ import annotations

import asyncio
import logging
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from contract_helpers import POSTGRES, require_one_log, selected, until

from agent_gateway_store import Decision, GatewayStore, StoreSettings, SyncGatewayStore, hookimpl
from agent_gateway_store.errors import LogMismatchError
from agent_gateway_store.evidence import check, sealer
from agent_gateway_store.evidence.notes import SigningKey, parse_note
from agent_gateway_store.evidence.publish import publish_lock
from agent_gateway_store.evidence.tree import GrowingTree
from agent_gateway_store.models.evidence import Checkpoint
from builders import CALL, CALLER, make_event, make_request
from tampering import put_back, sealed_rows, tamper, triggers_off

LEAVES = "SELECT position FROM audit_leaves"
EVENT = "(SELECT id FROM audit_events WHERE request_id = 'r-{}')"
KEY = SigningKey.generate("example.org/log")
SETTINGS = StoreSettings(audit_signing_key=KEY.to_text(), audit_log_origin="example.org/log")  # type: ignore[arg-type]


@pytest.fixture
async def sealing(database_url: str) -> AsyncIterator[GatewayStore]:
    """An open store that signs its checkpoints, and seals when it is told to."""
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        yield store


async def write(store: GatewayStore, count: int, **fields: Any) -> None:
    await store.audit.write_many([make_event(**fields) for _ in range(count)])


async def test_sealing_gives_every_event_a_position(
    sealing: GatewayStore, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches, each with a checkpoint that vouches for it; the last one is signed, names the database, and stays
    while nothing is new."""
    monkeypatch.setattr(sealer, "_BATCH", dict.fromkeys(("sqlite", "postgresql"), 120))
    assert await sealing.evidence.seal() is await sealing.evidence.checkpoint() is None
    assert (await sealing.evidence.verify()).ok
    await write(sealing, 300)
    first = await sealing.evidence.seal()
    assert first is not None
    await require_one_log(sealing)
    assert await selected(sealing, "SELECT size FROM audit_checkpoints ORDER BY size") == [(120,), (240,), (300,)]
    assert (first.size, await sealing.evidence.checkpoint()) == (300, first)
    note = parse_note(first.note)
    assert note.signed_by([KEY.verifier])
    assert (note.origin, note.size, note.root.hex()) == (first.origin, 300, first.root_hash)
    assert first.origin.startswith("example.org/log/")
    assert await sealing.evidence.seal() == first

    await write(sealing, 2)
    second = await sealing.evidence.seal()
    assert second is not None
    assert second.size == 302
    found = await sealing.evidence.verify(against=[first, second.note], keys=[str(KEY.verifier)])
    assert (found.ok, found.size, found.checked, found.unsealed, found.anchored) == (True, 302, 302, 0, 302)
    assert found.root_hash == second.root_hash
    # Integrity, anchoring and completeness are three statements; another store seals what this one has left.
    await write(sealing, 2)
    found = await sealing.evidence.verify()
    assert (found.ok, found.checked, found.unsealed, found.anchored) == (True, 302, 2, 0)
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as other:
        await other.evidence.seal()
    assert await require_one_log(sealing) == 304


@POSTGRES
async def test_transactions_that_stay_open_are_sealed_after_their_commit(sealing: GatewayStore) -> None:
    """Their events have lower ids than sealed ones, and stand behind them in the log."""
    async with sealing.database.sessions() as session, session.begin():
        await sealing.audit.record(make_event(request_id="slow"), session=session)
        for _ in range(3):
            await write(sealing, 2)
            await sealing.evidence.seal()
        assert len(await selected(sealing, LEAVES)) == 6
    await sealing.evidence.seal()
    await require_one_log(sealing)
    evidence = await sealing.evidence.prove("slow")
    assert evidence.position == 6
    assert (await sealing.evidence.verify()).ok


async def test_a_store_that_writes_seals_by_itself(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every AUDIT_SEAL_SECONDS; each checkpoint is logged, and handed to the plugins."""
    received: list[Checkpoint] = []

    class Witness:
        @hookimpl
        async def gateway_store_checkpoint(self, checkpoint: Checkpoint) -> None:
            received.append(checkpoint)

    caplog.set_level(logging.INFO, "agent_gateway_store.checkpoints")
    settings = SETTINGS.model_copy(update={"audit_seal_seconds": 0.02})
    async with GatewayStore(database_url, redis_url="", settings=settings, plugins=[Witness()]) as store:
        await asyncio.sleep(0.1)
        assert await store.evidence.checkpoint() is None
        await write(store, 3)
        await until(lambda: bool(received))
        assert received == [await store.evidence.checkpoint()]
        assert received[0].note.rstrip("\n") in caplog.messages


async def test_a_store_that_only_reads_seals_nothing(sealing: GatewayStore, database_url: str) -> None:
    """Its loop looks at nothing before it has written."""
    await write(sealing, 3)
    settings = SETTINGS.model_copy(update={"audit_seal_seconds": 0.01})
    async with GatewayStore(database_url, redis_url="", settings=settings) as reader:
        assert len(await reader.audit.list_recent()) == 3
        await asyncio.sleep(0.1)
    assert await selected(sealing, LEAVES) == []


@POSTGRES
async def test_a_view_of_an_organisation_only_proves(sealing: GatewayStore, tmp_path: Path) -> None:
    """The log is that of all organisations."""
    await sealing.audit.write(make_event(request_id="r-1", org_id="acme"))
    await sealing.evidence.seal()
    view = sealing.for_org("acme").evidence
    calls: list[Callable[[], Any]] = [
        view.seal,
        view.checkpoint,
        view.verify,
        lambda: view.publish(tmp_path / "log"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="all organisations"):
            await call()
    assert (await view.prove("r-1")).position == 0


@POSTGRES
async def test_the_published_log_is_that_of_the_checkpoint(sealing: GatewayStore, tmp_path: Path) -> None:
    """From its tiles alone anybody computes the root; a second time it goes on."""
    for count in (300, 700):
        await write(sealing, count)
        last = await sealing.evidence.seal()
        assert await sealing.evidence.publish(tmp_path / "log") == last
    tree = GrowingTree()
    for name in ("000", "001", "002", "003.p/232"):
        tile = (tmp_path / "log/tile/0" / name).read_bytes()
        for at in range(0, len(tile), 32):
            tree.append(tile[at : at + 32])
    note = parse_note((tmp_path / "log/checkpoint").read_text())
    assert (tree.size, tree.root()) == (note.size, note.root) == (1_000, note.root)


@POSTGRES
async def test_one_publisher_at_a_time_writes_a_folder(sealing: GatewayStore, tmp_path: Path) -> None:
    """Who had to wait publishes what is the newest by then."""
    await write(sealing, 300)
    await sealing.evidence.seal()
    folder = tmp_path / "log"
    async with publish_lock(folder):
        waiting = asyncio.create_task(sealing.evidence.publish(folder))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        assert not (folder / "checkpoint").exists()
        await write(sealing, 100)
        last = await sealing.evidence.seal()
    assert await waiting == last
    assert parse_note((folder / "checkpoint").read_text()).size == 400


def test_the_blocking_twin_seals_and_verifies(database_url: str) -> None:
    with SyncGatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        store.audit.write(make_event())
        last = store.evidence.seal()
        assert store.evidence.verify(against=[last]).anchored == 1


SQLITE_TYPES = {
    "UPDATE audit_events SET tool_name = CAST(x'ff00ff' AS TEXT) WHERE id = 7": {"ALTERED"},
    "UPDATE audit_events SET sanitized_args = x'7b7d' WHERE id = 8": {"ALTERED"},
    "UPDATE audit_leaves SET salt = 'x' WHERE position = 9": {"ALTERED"},
    "UPDATE audit_leaves SET leaf_hash = 5 WHERE position = 10": {"ALTERED", "BAD_TREE"},
    "UPDATE audit_leaves SET event_id = 'x' WHERE position = 11": {"MISSING"},
    "UPDATE audit_checkpoints SET root_hash = zeroblob(64)": {"FORKED"},
    "UPDATE audit_checkpoints SET note = x'00'": {"BAD_SIGNATURE"},
    "UPDATE audit_tiles SET hashes = 'x'": {"BAD_TREE"},
    "INSERT INTO audit_tiles (level, \"index\", hashes) VALUES (9000000000000000, 1, x'00')": {"BAD_TREE"},
}
POSTGRES_TYPES = {
    "ALTER TABLE audit_checkpoints ALTER note DROP NOT NULL;UPDATE audit_checkpoints SET note = NULL": {
        "BAD_SIGNATURE"
    },
    "ALTER TABLE audit_leaves ALTER leaf_hash DROP NOT NULL;"
    "UPDATE audit_leaves SET leaf_hash = NULL WHERE position = 10": {"ALTERED", "BAD_TREE"},
    "INSERT INTO audit_tiles (level, \"index\", hashes) VALUES (2147483647, 1, '')": {"BAD_TREE"},
    "ALTER TABLE audit_leaves DROP CONSTRAINT pk_audit_leaves;ALTER TABLE audit_leaves ALTER position DROP NOT NULL;"
    "UPDATE audit_leaves SET position = NULL WHERE position = 12": {"MISSING", "BAD_TREE"},
}


async def test_what_is_of_no_type_of_its_column_is_seen(own_database_url: str) -> None:
    """SQLite keeps anything in any column, and on PostgreSQL the owner may alter the types: `verify` goes on."""
    async with GatewayStore(own_database_url, redis_url="", settings=SETTINGS) as store:
        await store.audit.write_many([make_event(request_id=f"r-{number}") for number in range(300)])
        await store.evidence.seal()
        is_postgres = store.database.dialect == "postgresql"
        for statement, kinds in (POSTGRES_TYPES if is_postgres else SQLITE_TYPES).items():
            await tamper(store.database.engine, *statement.split(";"))

            found = await store.evidence.verify()

            assert {str(each.kind) for each in found.findings} >= kinds, statement


@POSTGRES
class TestTampering:
    """Whoever owns the database changes it past the store; the leaf of each event was sealed before."""

    @pytest.fixture
    async def log(self, sealing: GatewayStore) -> tuple[GatewayStore, Checkpoint]:
        events = [make_event(request_id=f"r-{number}", latency_ms=number) for number in range(300)]
        await sealing.audit.write_many(events[:100])
        await sealing.evidence.seal()
        await sealing.audit.write_many(events[100:])
        kept = await sealing.evidence.seal()
        assert kept is not None
        return sealing, kept

    MUTATIONS: dict[str, tuple[list[str], set[str]]] = {  # noqa: RUF012
        "a column": (["UPDATE audit_events SET tool_name = 'harmless' WHERE request_id = 'r-7'"], {"ALTERED"}),
        "a number": (["UPDATE audit_events SET latency_ms = 1 WHERE request_id = 'r-7'"], {"ALTERED"}),
        "its hash": ([f"UPDATE audit_events SET content_hash = '{'0' * 64}' WHERE request_id = 'r-7'"], {"ALTERED"}),
        "an event gone": (["DELETE FROM audit_events WHERE request_id = 'r-7'"], {"MISSING"}),
        "two events swapped": (
            [
                "UPDATE audit_leaves SET event_id = -1 WHERE position = 7",
                f"UPDATE audit_leaves SET event_id = {EVENT.format(7)} WHERE position = 9",
                f"UPDATE audit_leaves SET event_id = {EVENT.format(9)} WHERE position = 7",
            ],
            {"MOVED"},
        ),
        "two leaves swapped": (
            [
                "UPDATE audit_leaves SET position = 9999 WHERE position = 7",
                "UPDATE audit_leaves SET position = 7 WHERE position = 9",
                "UPDATE audit_leaves SET position = 9 WHERE position = 9999",
            ],
            {"BAD_TREE", "FORKED"},
        ),
        "a salt": (["UPDATE audit_leaves SET salt = leaf_hash WHERE position = 7"], {"ALTERED"}),
        "a leaf": (
            ["UPDATE audit_leaves SET leaf_hash = (SELECT hashes FROM audit_tiles) WHERE position = 7"],
            {"ALTERED", "BAD_TREE", "FORKED"},
        ),
        "a leaf gone": (["DELETE FROM audit_leaves WHERE position = 7"], {"MISSING", "BAD_TREE", "FORKED"}),
        "the end cut": (["DELETE FROM audit_leaves WHERE position >= 270"], {"TRUNCATED"}),
        "a tile": (["UPDATE audit_tiles SET hashes = salt FROM (SELECT salt FROM audit_leaves LIMIT 1) AS other"],
                   {"BAD_TREE"}),
        "a tile gone": (["DELETE FROM audit_tiles"], {"BAD_TREE"}),
        "a root": (
            [f"UPDATE audit_checkpoints SET root_hash = '{'0' * 64}' WHERE size = 100"], {"BAD_SIGNATURE", "FORKED"},
        ),
        "a note": (["UPDATE audit_checkpoints SET note = 'x' WHERE size = 100"], {"BAD_SIGNATURE"}),
    }  # fmt: skip

    async def test_each_change_is_seen_and_named(self, log: tuple[GatewayStore, Checkpoint]) -> None:
        """By these kinds and no other; taken back, the log verifies."""
        store, kept = log
        before = await sealed_rows(store.database.engine)
        for name, (statements, kinds) in self.MUTATIONS.items():
            await tamper(store.database.engine, *statements)
            found = await store.evidence.verify(against=[kept])
            assert not found.ok, name
            assert {str(each.kind) for each in found.findings} == kinds, name
            async with store.database.engine.begin() as connection, triggers_off(connection):
                await put_back(connection, before)
        assert (await store.evidence.verify(against=[kept])).ok

    async def test_a_call_that_is_named_like_a_door_opens_none(self, sealing: GatewayStore) -> None:
        """An agent chooses names and arguments, and a gateway denies what it does not know."""
        named: dict[str, Any] = {"mcp_server": "gateway-store", "decision": Decision.DENY, "execution_status": None}
        await sealing.audit.write(make_event(request_id="r-0"))
        await sealing.audit.write(make_event(tool_name="audit.prune", sanitized_args={"positions": [[0, 0]]}, **named))
        await sealing.audit.write(make_event(tool_name="audit.erase", request_id="taken", **named))
        await sealing.audit.write(make_event(request_id="taken", tool_name="read_file"))
        await sealing.evidence.seal()

        stored = [event async for event in sealing.audit.stream(tool_name="read_file")]
        await tamper(sealing.database.engine, "DELETE FROM audit_events WHERE request_id = 'r-0'")
        found = await sealing.evidence.verify()

        assert [event.sanitized_args for event in stored if event.request_id.startswith("taken")] != [{}]
        assert [(str(each.kind), each.position) for each in found.findings] == [("MISSING", 0)]

    async def test_a_gap_longer_than_a_page_is_seen(self, sealing: GatewayStore) -> None:
        """What follows is checked all the same, and two pages are read on the way; of gaps 1,000 leaves are made up."""
        await sealing.audit.write_many([make_event(request_id=f"r-{number}") for number in range(1_500)])
        await sealing.evidence.seal()
        await tamper(
            sealing.database.engine,
            "DELETE FROM audit_leaves WHERE position BETWEEN 10 AND 1399 OR position BETWEEN 1410 AND 1419",
            "UPDATE audit_events SET tool_name = 'harmless' WHERE request_id = 'r-1450'",
        )

        found = await sealing.evidence.verify()

        assert (found.checked, found.size) == (10 + 89, 10 + 1_000 + 90)
        assert {(str(each.kind), each.position) for each in found.findings} >= {("MISSING", 10), ("ALTERED", 1_450)}

    async def test_everything_sealed_anew_is_caught_by_a_kept_checkpoint_alone(
        self, log: tuple[GatewayStore, Checkpoint], database_url: str
    ) -> None:
        """Without one it verifies, and says that nothing vouches for it."""
        store, kept = log
        await tamper(
            store.database.engine,
            "DELETE FROM audit_checkpoints",
            "DELETE FROM audit_tiles",
            "DELETE FROM audit_leaves",
            "DELETE FROM audit_events WHERE request_id = 'r-7'",
        )
        async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as forger:
            await forger.evidence.seal()
        found = await store.evidence.verify()
        assert (found.ok, found.anchored) == (True, 0)
        found = await store.evidence.verify(against=[kept])
        assert {str(each.kind) for each in found.findings} == {"TRUNCATED"}
        await write(store, 1)
        async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as forger:
            await forger.evidence.seal()
        found = await store.evidence.verify(against=[kept])
        assert {str(each.kind) for each in found.findings} == {"FORKED"}

    async def test_another_key_is_seen(self, log: tuple[GatewayStore, Checkpoint]) -> None:
        store, kept = log
        other = str(SigningKey.generate("example.org/log").verifier)
        for against in ([], [kept]):
            found = await store.evidence.verify(against=against, keys=[other])
            assert {str(each.kind) for each in found.findings} == {"BAD_SIGNATURE"}
            assert found.anchored == 0
            assert (await store.evidence.verify(against=against, keys=[other, str(KEY.verifier)])).ok

    async def test_a_log_without_any_checkpoint_is_said_to_be_signed_by_no_key(
        self, log: tuple[GatewayStore, Checkpoint]
    ) -> None:
        """Whoever deleted the log leaves events that look as if they were never sealed."""
        store, kept = log
        assert (await store.evidence.verify(keys=[str(KEY.verifier)])).origin == kept.origin
        tables = ("audit_leaves", "audit_tiles", "audit_checkpoints")
        await tamper(store.database.engine, *(f"DELETE FROM {table}" for table in tables))
        found = await store.evidence.verify(keys=[str(KEY.verifier)])
        assert (found.origin, ["so no key has signed" in each for each in found.remarks]) == ("", [True])

    async def test_a_forged_signature_of_an_earlier_checkpoint_is_seen(
        self, log: tuple[GatewayStore, Checkpoint]
    ) -> None:
        """Only with the key: whoever has none takes it for a signature of another time."""
        store, kept = log
        await write(store, 1)
        await store.evidence.seal()
        body, _, line = kept.note.rpartition("\n\n")
        name, encoded = line.split()[1:]
        forged = bytearray(b64decode(encoded))
        forged[-1] ^= 1
        note = f"{body}\n\n— {name} {b64encode(forged).decode()}\n"

        await tamper(store.database.engine, f"UPDATE audit_checkpoints SET note = '{note}' WHERE size = {kept.size}")

        found = await store.evidence.verify(keys=[str(KEY.verifier)])
        assert [(str(each.kind), "forged" in each.text) for each in found.findings] == [("BAD_SIGNATURE", True)]
        assert (await store.evidence.verify()).ok

    async def test_a_log_that_was_changed_is_not_extended(self, log: tuple[GatewayStore, Checkpoint]) -> None:
        store, _ = log
        await tamper(store.database.engine, "DELETE FROM audit_leaves WHERE position >= 270")
        await write(store, 1)
        with pytest.raises(LogMismatchError, match="evidence verify"):
            await store.evidence.seal()
        assert len(await selected(store, LEAVES)) == 270


async def test_a_recorded_call_proves_its_approval(sealing: GatewayStore) -> None:
    """`audit.call` puts the hash of the approval and its votes into the event; a changed vote is seen."""
    caller = CALLER.model_copy(update={"org_id": "default"})
    asked = await sealing.approvals.acquire(make_request())
    await sealing.approvals.approve(approval_id=asked.approval_id, approver_id="alice", note="seen")
    used = await sealing.approvals.acquire(make_request())
    async with sealing.audit.call(
        CALL, caller, decision="APPROVAL_REQUIRED", approval_id=used.approval_id, request_id="r-1"
    ):
        pass
    await sealing.approvals.record_outcome(approval_id=used.approval_id, outcome="SUCCESS")
    await sealing.evidence.seal()
    shown = (await sealing.evidence.prove("r-1")).to_json()
    assert '"approver_id": "alice"' in shown
    found = check(shown, keys=[str(KEY.verifier)])
    assert found.ok
    assert [remark.split(".")[0] for remark in found.remarks] == [
        "The approval and its votes are those that the event names"
    ]
    assert not check(shown.replace("alice", "mallory"), keys=[str(KEY.verifier)]).ok
