"""The JSON of an event, in tables and archives, is what somebody of ours has written, letter by letter."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from archive_helpers import entries_of, rewritten, save, with_column
from contract_helpers import POSTGRES, store_sealed_by_hand
from erasure_helpers import OLD
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.archive import Archive
from agent_gateway_store.models.evidence import FindingKind
from agent_gateway_store.storage.database import create_engine
from builders import make_event
from proofs.hostile import Hostile
from tampering import tamper

store = store_sealed_by_hand

SETTINGS = StoreSettings(audit_seal_seconds=0)
ARGS = {"amount": 1.0, "at": "C:/ü", "small": 1e-7}
# Two names, the second by an escape; a needless escape; other numbers; other spaces.
IN_OTHER_WORDS = [
    r'{"amount":1.0,"at":"/ü","at":"C\u003a/ü","small":1e-07}',
    r'{"amount":1.0,"at":"C:\u002fü","small":1e-07}',
    '{"amount":100e-2,"at":"C:/ü","small":1e-07}',
    '{"amount":1.0,"at":"C:/ü","small":0.1e-06}',
    '{"amount":1.0, "at":"C:/ü","small":1e-07}',
]


def serialized(value: Any) -> str:
    """JSON as an application may have it written: other escapes, other spaces."""
    return json.dumps(value, indent=1).replace("/", r"\/")


async def test_what_was_written_by_any_way_is_no_alarm(database_url: str, tmp_path: Path) -> None:
    """Events as they come, alone and in a session; on an engine with its own JSON; erased ones, archived ones."""
    hostile, folder = Hostile(7), tmp_path / "archive"
    engine = create_async_engine(create_engine(database_url).url, json_serializer=serialized)
    async with GatewayStore(engine=engine, redis_url="", settings=SETTINGS) as store:
        for number in range(24):
            event = hostile.event(timestamp=OLD + timedelta(days=number // 16), org_id="default")
            if number % 2:
                await store.audit.write(event)
                continue
            async with AsyncSession(engine) as session, session.begin():
                await store.audit.record(event, session=session)
        for request_id in ("a", "b"):
            await store.audit.write(make_event(request_id=request_id, sanitized_args=ARGS, timestamp=OLD))
        await store.audit.write(make_event())
        await store.evidence.seal()
        await store.retention.erase("a", reason="asked for", by="dpo")
        assert (await store.evidence.verify()).findings == ()

        await store.retention.prune(OLD + timedelta(days=1), by="ops", archive=folder)
        await store.retention.erase("b", reason="asked for", by="dpo", archive=folder)
        await store.evidence.seal()
        found = await store.evidence.verify(archive=folder)
        assert (found.findings, found.erased) == ((), 2)
        assert Archive(folder).verify().findings == ()
    await engine.dispose()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_json_in_other_words_is_seen(store: GatewayStore) -> None:
    """SQLite keeps any text."""
    change = "UPDATE audit_events SET sanitized_args = :written WHERE id = :id"
    values = [{"written": written, "id": number} for number, written in enumerate(IN_OTHER_WORDS, 1)]
    assert await found_after(store, change, values) == [FindingKind.ALTERED] * len(values)


@POSTGRES
async def test_a_number_in_other_digits_is_seen(store: GatewayStore) -> None:
    """A jsonb keeps its zeros; all else of it has one form."""
    change = """UPDATE audit_events SET sanitized_args = sanitized_args || '{"amount": 1.00}'"""
    assert await found_after(store, change, [{}]) == [FindingKind.ALTERED]


async def found_after(store: GatewayStore, change: str, values: list[dict[str, Any]]) -> list[FindingKind]:
    await store.audit.write_many(make_event(sanitized_args=ARGS) for _ in values)
    await store.evidence.seal()
    await tamper(store.database.engine, *[change] * len(values), values=values)
    return [each.kind for each in (await store.evidence.verify()).findings]


@POSTGRES
async def test_archived_json_in_other_words_is_seen(store: GatewayStore, tmp_path: Path) -> None:
    """By the archive itself and by the log, whichever database it was written from."""
    folder = tmp_path / "archive"
    await store.audit.write_many([make_event(sanitized_args=ARGS, timestamp=OLD), make_event()])
    await store.evidence.seal()
    await store.retention.prune(OLD + timedelta(days=1), by="ops", archive=folder)
    await store.evidence.seal()
    assert (await store.evidence.verify(archive=folder)).ok
    for written in IN_OTHER_WORDS:
        save(folder, [rewritten(folder, each, with_column("sanitized_args", [written])) for each in entries_of(folder)])
        for found in (await store.evidence.verify(archive=folder), Archive(folder).verify()):
            assert [each.kind for each in found.findings] == [FindingKind.ALTERED], written
