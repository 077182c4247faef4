"""One at a time in all processes: what prunes, erases or ships lets go of its lock however it ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from agent_gateway_store import GatewayStore
from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.retention.manager import retention_lock
from agent_gateway_store.storage import exclusive, migrate
from agent_gateway_store.storage.database import create_engine
from agent_gateway_store.storage.exclusive import ExclusiveLock, folder_lock


@pytest.mark.parametrize("while_asking", [True, False], ids=["in a statement", "between two statements"])
async def test_a_cancelled_holder_lets_go(store: GatewayStore, other: GatewayStore, while_asking: bool) -> None:
    """Whoever is cancelled holds the lock no longer, also in the middle of a statement, and without the collector."""
    held = asyncio.Event()

    async def hold() -> None:
        async with retention_lock(store.database)() as still_held:
            held.set()
            while True:
                await (still_held() if while_asking else asyncio.sleep(60))
                await asyncio.sleep(0)

    gc.disable()
    try:
        for _ in range(5):
            held.clear()
            holder = asyncio.create_task(hold())
            await held.wait()
            await asyncio.sleep(0.05)
            holder.cancel()
            with pytest.raises(asyncio.CancelledError):
                await holder
            async with asyncio.timeout(5), retention_lock(other.database)():
                pass
    finally:
        gc.enable()


def by_link(file: Path, away: Path) -> str:
    (away / "linked.db").symlink_to(file)
    return str(away / "linked.db")


def by_folder(file: Path, away: Path) -> str:
    (away / "folder").symlink_to(file.parent, target_is_directory=True)
    return str(away / "folder" / file.name)


def by_uri(file: Path, away: Path) -> str:
    return f"file://{file}?uri=true"


def by_encoded_uri(file: Path, away: Path) -> str:
    return f"file:{file.parent}/%2567ateway.db?uri=true"


def from_its_folder(file: Path, away: Path) -> str:
    return file.name


@pytest.mark.parametrize("spelt", [by_link, by_folder, by_uri, by_encoded_uri, from_its_folder])
async def test_a_sqlite_file_has_one_lock_however_it_is_named(
    spelt: Callable[[Path, Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that name it by two ways are one after the other, also where one has changed its folder since."""
    file, away = tmp_path / "data" / "gateway.db", tmp_path / "away"
    for folder in (file.parent, away):
        folder.mkdir()
    monkeypatch.chdir(file.parent)
    opened = (GatewayStore(f"sqlite:///{name}", redis_url="") for name in (file, spelt(file, away)))
    async with next(opened) as store, next(opened) as other:
        monkeypatch.chdir(away)
        first, second = (
            ExclusiveLock(each.database, key=1, suffix=".test.lock", wait_s=0, busy="Another process has it")
            for each in (store, other)
        )
        async with first():
            with pytest.raises(StoreUnavailableError, match="Another process has it: wait for it or end it"):
                async with second():
                    pass
        async with second():
            pass
    assert not list(away.glob("*.lock"))


async def test_a_migration_by_a_link_waits_for_one_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would change the same tables."""
    file, link = tmp_path / "gateway.db", tmp_path / "linked.db"
    link.symlink_to(file)
    monkeypatch.setattr(migrate, "_LOCK_TIMEOUT_S", 0)
    engine = create_engine(f"sqlite:///{link}")
    async with exclusive.file_lock(tmp_path / "gateway.db.lock", wait_s=0, busy=""):
        with pytest.raises(StoreUnavailableError, match="another process migrates it"):
            await migrate.upgrade(engine)
    await migrate.upgrade(engine)
    await engine.dispose()


async def test_a_folder_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on some network file systems."""

    class Refusing(sqlite3.Connection):
        def execute(self, *arguments: object) -> sqlite3.Cursor:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_LOCK
            raise error

    connect = sqlite3.connect
    monkeypatch.setattr(exclusive.sqlite3, "connect", lambda *a, **options: connect(*a, factory=Refusing, **options))
    with caplog.at_level(logging.WARNING):
        async with folder_lock(tmp_path, wait_s=0, busy="Another process works there"):
            pass
    assert "let one process at a time work there" in caplog.text
