"""One at a time in all processes: what prunes, erases or ships lets go of its lock however it ends."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from agent_gateway_store import GatewayStore
from agent_gateway_store.archive.manifest import archive_lock
from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.evidence.publish import publish_lock
from agent_gateway_store.retention.manager import retention_lock
from agent_gateway_store.storage import exclusive, migrate
from agent_gateway_store.storage.database import create_engine
from agent_gateway_store.storage.exclusive import ExclusiveLock, folder_lock
from forks import forks


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


@pytest.mark.parametrize(
    "spelt",
    [
        "{away}/linked.db",
        "{away}/folder/gateway.db",
        "file://{file}?uri=true",
        "file:{file.parent}/%2567ateway.db?uri=true",
        "gateway.db",
    ],
)
async def test_a_sqlite_file_has_one_lock_however_it_is_named(
    spelt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that name it by two ways are one after the other, also where one has changed its folder since."""
    file, away = tmp_path / "data" / "gateway.db", tmp_path / "away"
    for folder in (file.parent, away):
        folder.mkdir()
    (away / "linked.db").symlink_to(file)
    (away / "folder").symlink_to(file.parent, target_is_directory=True)
    monkeypatch.chdir(file.parent)
    names = (file, spelt.format(file=file, away=away))
    opened = (GatewayStore(f"sqlite:///{name}", redis_url="") for name in names)
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
    file, link = tmp_path / "gateway.db", tmp_path / "linked.db"
    link.symlink_to(file)
    monkeypatch.setattr(migrate, "_LOCK_TIMEOUT_S", 0)
    engine = create_engine(f"sqlite:///{link}")
    async with exclusive.file_lock(tmp_path / "gateway.db.lock", wait_s=0, busy=""):
        with pytest.raises(StoreUnavailableError, match="another process migrates it"):
            await migrate.upgrade(engine)
    await migrate.upgrade(engine)
    await engine.dispose()


async def test_a_folder_that_answers_each_lock_with_an_error_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(sqlite3.Connection):
        def execute(self, *arguments: object) -> sqlite3.Cursor:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_LOCK
            raise error

    connect = sqlite3.connect
    monkeypatch.setattr(exclusive.sqlite3, "connect", lambda *a, **options: connect(*a, factory=Refusing, **options))
    with pytest.raises(StoreUnavailableError, match="on a file system that has locks"):
        async with folder_lock(tmp_path, wait_s=0, busy="Another process works there"):
            pass


@pytest.mark.parametrize("content", ["12345\n", "somebody's notes\n" * 100])
async def test_a_lock_file_of_something_else_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(content)
    with pytest.raises(StoreUnavailableError, match=r"\.lock cannot be locked, for it is a file of something else"):
        async with folder_lock(tmp_path, wait_s=0, busy=""):
            pass
    assert (tmp_path / ".lock").read_text() == content


@pytest.mark.parametrize("umask", [0o002, 0o077])
async def test_others_publish_where_the_umask_lets_them(umask: int, tmp_path: Path) -> None:
    """As for the files that are published; the lock of an archive, which is private, is for its owner alone."""
    before = os.umask(umask)
    try:
        async with publish_lock(tmp_path / "public"), archive_lock(tmp_path / "archive"):
            pass
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / folder / ".lock").stat().st_mode) for folder in ("public", "archive")]
    assert modes == [0o666 & ~umask, 0o600]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_lock_file_of_another_user_is_told(mode: int, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes files of other users")
    (tmp_path / ".lock").touch(mode)
    script = """
import asyncio, os, sys
from pathlib import Path
from agent_gateway_store.storage.exclusive import folder_lock

async def main():
    async with folder_lock(Path("."), wait_s=0, busy=""):
        pass

os.chmod(".", 0o777)
os.setuid(65534)
asyncio.run(main())
"""
    said = forks().run(["-c", script], cwd=tmp_path, env=os.environ, timeout=60).stderr
    assert ".lock belongs to another user: work as that one, or let this one write it." in said
