"""The writer and its spool: a row leaves the spool once it is committed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

import agent_gateway_store.audit.writer as writer_module
from agent_gateway_store import WriteOutcome
from agent_gateway_store.audit.backends import RowResult
from agent_gateway_store.audit.record import EncodedRow, encode_event, key_of, to_values
from agent_gateway_store.audit.spool import Spool
from agent_gateway_store.audit.writer import AuditWriter
from agent_gateway_store.errors import StoreUnavailableError
from builders import make_event

pytestmark = pytest.mark.unit


class Database:
    """Keeps the request ids that are committed; while it is `away` it answers, and commits nothing."""

    places = 2

    def __init__(self) -> None:
        self.committed: list[str] = []
        self.is_away = False
        self.probed = 0

    async def store(self, rows: Sequence[EncodedRow]) -> list[RowResult]:
        if self.is_away:
            raise ConnectionResetError
        self.committed += [key_of(row)[0] for row in rows]
        return [WriteOutcome.STORED] * len(rows)

    async def probe(self) -> str:
        self.probed += 1
        return "identity"

    async def close(self) -> None: ...


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[Spool]:
    opened = Spool(tmp_path / "spool.db", make_url("postgresql://host/db"), "identity")
    yield opened
    await opened.close()


async def fill(spool: Spool, count: int) -> list[str]:
    events = [make_event() for _ in range(count)]
    await spool.add([to_values(encode_event(event)) for event in events])
    return [event.request_id for event in events]


async def test_a_row_leaves_the_spool_after_its_commit(database: Database, spool: Spool) -> None:
    ids = await fill(spool, 3)
    writer = AuditWriter(database, spool)
    database.is_away = True
    assert await writer.flush() == 3

    database.is_away = False
    assert await writer.flush() == 0
    await writer.close()

    assert database.committed == ids


class FullDisk(Spool):
    is_full = True

    async def _delete(self, ids: Sequence[int]) -> None:
        if self.is_full and ids:
            raise StoreUnavailableError("The disk is full.")
        await super()._delete(ids)


async def test_a_spool_that_cannot_be_emptied_is_brought_in_all_the_same(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each row once, which is said once; what came in leaves the spool when there is room, and nothing else does."""
    spool = FullDisk(tmp_path / "spool.db", make_url("postgresql://host/db"), "identity")
    ids = await fill(spool, 1_201)
    writer = AuditWriter(database, spool)
    assert [await writer.flush() for _ in range(2)] == [1_201] * 2
    assert database.committed == ids
    late = await fill(spool, 1)
    database.is_away = True
    spool.is_full = False
    assert await writer.flush() == 1_202
    database.is_away = False
    assert await writer.flush() == 0
    await writer.close()
    await spool.close()

    assert database.committed == ids + late
    assert caplog.text.count("cannot be emptied") == 1


class Broken(Spool):
    async def waiting(self, limit: int) -> Any:
        raise KeyError(limit)


@pytest.mark.parametrize(("kind", "count"), [(Broken, 1), (Spool, 0)])
async def test_a_spool_that_cannot_be_read_is_named_once(
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Spool],
    count: int,
) -> None:
    """However often it is tried again; that the database is away was said before, and is not said again."""
    monkeypatch.setattr(writer_module, "RETRY_AFTER_S", 0.01)
    spool = kind(tmp_path / "spool.db", make_url("postgresql://host/db"), "identity")
    writer = AuditWriter(database, spool)
    database.is_away = True
    await writer.write(encode_event(make_event()))
    async with asyncio.timeout(20):
        while database.probed < 10:
            await asyncio.sleep(0.01)
    await writer.close()
    await spool.close()

    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "is away" in said[0]
    assert ["cannot be brought in yet (KeyError)" in line for line in said[1:]] == [True] * count
