"""The JSON of an event, in tables and archives, is what somebody of ours has written, letter by letter."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pyarrow import array, parquet
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.archive import Archive
from agent_gateway_store.archive.manifest import Entry, sha256_of
from agent_gateway_store.models.evidence import FindingKind
from agent_gateway_store.storage.database import create_engine
from builders import make_event
from proofs.hostile import Hostile
from tampering import tamper

SETTINGS = StoreSettings(audit_seal_seconds=0)
OLD = datetime(2025, 3, 1, 12, tzinfo=UTC)
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
        for number in range(60):
            event = hostile.event(timestamp=OLD + timedelta(days=number // 40), org_id="default")
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
@pytest.mark.parametrize("written", IN_OTHER_WORDS)
async def test_json_in_other_words_is_seen(database_url: str, written: str) -> None:
    """SQLite keeps any text."""
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        await store.audit.write(make_event(sanitized_args=ARGS))
        await store.evidence.seal()
        change = "UPDATE audit_events SET sanitized_args = :written"
        await tamper(store.database.engine, change, values=[{"written": written}])

        found = await store.evidence.verify()
    assert [each.kind for each in found.findings] == [FindingKind.ALTERED]


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_number_in_other_digits_is_seen(database_url: str) -> None:
    """A jsonb keeps its zeros; all else of it has one form."""
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        await store.audit.write(make_event(sanitized_args=ARGS))
        await store.evidence.seal()
        change = """UPDATE audit_events SET sanitized_args = sanitized_args || '{"amount": 1.00}'"""
        await tamper(store.database.engine, change)

        found = await store.evidence.verify()
    assert [each.kind for each in found.findings] == [FindingKind.ALTERED]


@pytest.mark.parametrize("written", IN_OTHER_WORDS)
async def test_archived_json_in_other_words_is_seen(database_url: str, tmp_path: Path, written: str) -> None:
    """By the archive itself and by the log, whichever database it was written from."""
    folder = tmp_path / "archive"
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        await store.audit.write_many([make_event(sanitized_args=ARGS, timestamp=OLD), make_event()])
        await store.evidence.seal()
        await store.retention.prune(OLD + timedelta(days=1), by="ops", archive=folder)
        await store.evidence.seal()
        assert (await store.evidence.verify(archive=folder)).ok
        rewrite_arguments(folder, written)

        found = await store.evidence.verify(archive=folder)
        assert [each.kind for each in found.findings] == [FindingKind.ALTERED]
        assert [each.kind for each in Archive(folder).verify().findings] == [FindingKind.ALTERED]


def rewrite_arguments(folder: Path, written: str) -> None:
    """Put other arguments into the one file of an archive, and its new hash into the manifest."""
    manifest = folder / "manifest.jsonl"
    entry = Entry.from_line(manifest.read_text())
    with parquet.ParquetFile(folder / entry.file) as file:
        table = file.read()
    place = table.schema.get_field_index("sanitized_args")
    parquet.write_table(table.set_column(place, table.schema.field(place), array([written])), folder / entry.file)
    manifest.write_text(replace(entry, sha256=sha256_of(folder / entry.file)).to_line())
