"""Whose rows the spool holds, and where it may stand: by the database's identity, in a place tried beforehand."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from contract_helpers import POSTGRES
from sqlalchemy import make_url

from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings, WriteOutcome
from agent_gateway_store.audit.doors import renew_identity
from agent_gateway_store.audit.record import encode_event, to_values
from agent_gateway_store.audit.spool import Spool
from agent_gateway_store.errors import AuditUnavailableError, SchemaOutOfDateError, StoreUnavailableError
from builders import make_event, rehash
from proofs.harness import (
    WatchedBackend,
    eventually,
    identity_of,
    migrated,
    spool_is_empty,
    spooled_ids,
    stored_ids,
)

SPOOLED, STORED = WriteOutcome.SPOOLED, WriteOutcome.STORED


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


async def leave(url: str, request_id: str) -> None:
    """Leave an event in the spool, by a store whose database is away."""
    async with GatewayStore(url, redis_url="") as store:
        (await WatchedBackend.within(store)).fault = "away"
        assert await store.audit.write(make_event(request_id=request_id)) is SPOOLED


async def restored(store: GatewayStore) -> None:
    await renew_identity(store.database.engine, by="ann", environment="test")


def respelt(url: str, folder: Path) -> str:
    """The URL of the same database by another name of its host, or of its folder."""
    if url.startswith("sqlite"):
        (folder / "link").symlink_to(folder)
        return f"sqlite+aiosqlite:///{folder}/link/gateway.db"
    parsed = make_url(url)
    host = "localhost" if parsed.host == "127.0.0.1" else "127.0.0.1"
    return parsed.set(drivername="postgres", host=host).render_as_string(hide_password=False)


async def test_the_same_database_under_another_spelling_gets_its_rows(
    database_url: str, tmp_path: Path, path: Path
) -> None:
    """The host was an address and is a name now, or the folder was reached by a link."""
    await leave(database_url, "waits")
    assert spooled_ids(path) == ["waits"]

    async with GatewayStore(respelt(database_url, tmp_path), redis_url="") as store:
        assert await store.audit.flush() == 0
        assert await stored_ids(store) == {"waits": 1}
    assert spooled_ids(path) == []


@POSTGRES
async def test_another_database_under_the_same_spelling_gets_no_foreign_row(database_url: str, path: Path) -> None:
    """It stands where the other one stood; the rows wait on, and are counted for the other one."""
    before = await identity_of(database_url)
    await leave(database_url, "waits")
    async with GatewayStore(database_url, redis_url="") as store:
        (await WatchedBackend.within(store)).fault = "away"
        await restored(store)
    async with GatewayStore(database_url, redis_url="") as store:
        assert await store.audit.flush() == 0
        assert "waits" not in await stored_ids(store)
    spool = Spool(path, make_url(database_url), await identity_of(database_url))
    (found,) = await spool.targets()
    assert (found.target, found.waiting, spool.is_own(found)) == (before, 1, False)
    assert await spool.counts() == (0, 0)

    assert await spool.adopt(before) == 1
    await spool.close()

    async with GatewayStore(database_url, redis_url="") as store:
        assert await store.audit.flush() == 0
        assert (await stored_ids(store))["waits"] == 1


@POSTGRES
async def test_another_database_that_comes_up_in_an_outage_gets_no_foreign_row(
    database_url: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The store stays open meanwhile: its rows wait on, its new events go to the database that answers now."""
    async with GatewayStore(database_url, redis_url="") as store:
        backend = await WatchedBackend.within(store)
        backend.fault = "away"
        assert await store.audit.write(make_event(request_id="waits")) is SPOOLED
        await restored(store)
        backend.fault = None
        await eventually(lambda: spool_is_empty(store))
        backend.fault = "away"
        assert await store.audit.write(make_event(request_id="later")) is SPOOLED
        backend.fault = None
        await eventually(lambda: spool_is_empty(store))
        found = await stored_ids(store)

    assert found["later"] == 1
    assert "waits" not in found
    assert spooled_ids(path) == ["waits"]
    assert caplog.text.count("leads to another one now") == 1


async def test_rows_of_earlier_versions_go_to_the_database_of_their_url(database_url: str, path: Path) -> None:
    """They name it as its URL was spelt, without its user; those of another URL wait on."""
    parsed = make_url(database_url)
    spool = Spool(path, parsed, "identity")
    own = f"{parsed.get_backend_name()}://{parsed.host or ''}:{parsed.port or ''}/{parsed.database}"
    for name in ("mine", "foreign"):
        await spool.add([to_values(encode_event(make_event(request_id=name)))])
    await spool.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE spooled_events SET url = NULL, target = 'postgresql://other:5432/db'")
        connection.execute("UPDATE spooled_events SET target = ? WHERE request_id = 'mine'", [own])

    async with GatewayStore(database_url, redis_url="") as store:
        assert await store.audit.flush() == 0
        assert await stored_ids(store) == {"mine": 1}
    assert spooled_ids(path) == ["foreign"]


OPTIONAL = [
    name
    for name, field in AuditEvent.model_fields.items()
    if not field.is_required() and name not in ("id", "content_hash", "org_id", "timestamp")
]


@pytest.mark.parametrize("mode", ["spool", "strict"])
async def test_an_older_file_lacks_fields_that_events_have_now(tmp_path: Path, path: Path, mode: str) -> None:
    """Its rows are read with the defaults, their hashes hold, and it takes new rows; in strict mode, too."""
    url = migrated(f"sqlite:///{tmp_path}/gateway.db")
    await leave(url, "older")
    with closing(sqlite3.connect(path)) as older:
        for name in (*OPTIONAL, "url"):
            older.execute(f"ALTER TABLE spooled_events DROP COLUMN {name}")
    await leave(url, "newer")

    async with GatewayStore(url, redis_url="", settings=StoreSettings(audit_mode=mode)) as store:
        await eventually(lambda: spool_is_empty(store))
        found = await store.audit.list_recent()

    assert [event.request_id for event in found] == ["newer", "older"]
    assert [event.model_dump(include=set(OPTIONAL)) for event in found[1:]] == [
        make_event().model_dump(include=set(OPTIONAL))
    ]
    assert all(rehash(event) == event.content_hash for event in found)


@POSTGRES
async def test_strict_brings_in_what_an_earlier_mode_left(database_url: str, path: Path) -> None:
    """By itself and in order; its own events still raise while the database is away, and none is spooled."""
    await leave(database_url, "one")
    await leave(database_url, "two")
    async with GatewayStore(database_url, redis_url="", settings=StoreSettings(audit_mode="strict")) as store:
        await eventually(lambda: asyncio.sleep(0, not spooled_ids(path)))
        backend = await WatchedBackend.within(store)
        backend.fault = "away"
        with pytest.raises(AuditUnavailableError):
            await store.audit.write(make_event())

        assert list(await stored_ids(store)) == ["one", "two"]
        assert spooled_ids(path) == []


@pytest.mark.parametrize(
    "name", ["a?mode=ro", "a#b;c=%2e&d.db", ":memory:", "file:a.db", "'ü@é:1\".db", "new/x?/b\\s~.db"]
)
async def test_any_name_of_a_file_is_that_file(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Also one that a URL would read otherwise."""
    path = tmp_path / "spools" / name
    async with GatewayStore("sqlite://", redis_url="", settings=StoreSettings(audit_spool_path=path)) as store:
        assert "lost" not in caplog.text
        # The place was tried without a trace.
        assert list(tmp_path.iterdir()) == []
        backend = await WatchedBackend.within(store)
        backend.fault = "away"
        assert await store.audit.write(make_event(request_id="here")) is SPOOLED
        assert spooled_ids(path) == ["here"]
        backend.fault = None
        await eventually(lambda: spool_is_empty(store))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file/spool.db", "Not a directory"),
        ("folder", "not a file"),
        ("/proc/none/spool.db", "No such file|Permission denied"),
        ("pipe", "not a file"),
        ("new.db", "new.db.lock' is not a file"),
        ("garbage.db", "not a database"),
        ("n" * 300, "name too long"),
        ("nul\0.db", "null"),
        ("~/spool.db", "no home folder"),
    ],
)
async def test_a_store_that_could_not_spool_says_so_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str, reason: str
) -> None:
    """When it is opened, in one line with what to do; it opens all the same. In strict mode nothing is spooled."""
    mode = "strict" if place == "folder" else "spool"
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "garbage.db").write_bytes(b"garbage" * 1_000)
    for name in ("pipe", "new.db.lock"):
        os.mkfifo(tmp_path / name)
    before = sorted(tmp_path.iterdir())
    settings = StoreSettings(audit_mode=mode).model_copy(
        update={"audit_spool_path": Path(place) if place[0] == "~" else tmp_path / place}
    )

    async with GatewayStore("sqlite://", redis_url="", settings=settings) as store:
        assert await store.audit.write(make_event()) is STORED
        if place == "pipe":
            with pytest.raises(StoreUnavailableError, match="set AUDIT_SPOOL_PATH"):
                await store.audit.flush()

    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    said = [line for line in said if "events would be lost" in line]
    assert len(said) == (mode == "spool")
    for line in said:
        assert "set AUDIT_SPOOL_PATH" in line
        assert re.search(reason, line, re.IGNORECASE), line
    assert sorted(tmp_path.iterdir()) == before


async def test_a_database_without_its_identity_is_not_opened(database_url: str) -> None:
    """Somebody has deleted the row: one sentence that says what to run; it runs, and the store opens."""
    async with GatewayStore(database_url, redis_url="") as store:
        async with store.database.engine.begin() as connection:
            await connection.exec_driver_sql("DELETE FROM database_identity")
        with pytest.raises(SchemaOutOfDateError, match="run `gateway-store db restored"):
            await identity_of(database_url)
        await restored(store)
    async with GatewayStore(database_url, redis_url=""):
        pass
