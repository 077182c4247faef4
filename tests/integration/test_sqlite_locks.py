"""The write lock of a SQLite file: none is left by a cancelled task, and none holds up the audit log."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiosqlite
import pytest

from agent_gateway_store import GatewayStore, StoreSettings, errors
from builders import make_event, make_request

pytestmark = pytest.mark.system


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    """Python's garbage collector, which would end a forgotten statement at some time, stands still."""
    gc.disable()
    yield
    gc.enable()


def take_the_write_lock(path: Path) -> None:
    """Write as another process would; fail unless that is possible within a second."""
    connection = sqlite3.connect(path, timeout=1, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    finally:
        connection.close()


@pytest.mark.parametrize("is_read", [False, True])
async def test_a_cancelled_statement_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_read: bool
) -> None:
    """Whether its rows were fetched or not when the task was cancelled: others write at once, and so does the store."""
    path = tmp_path / "gateway.db"
    arrived = asyncio.Event()
    fetch = aiosqlite.Cursor.fetchall

    async def stand_still(cursor: aiosqlite.Cursor) -> Any:
        if is_read:
            await fetch(cursor)
        arrived.set()
        await asyncio.sleep(60)

    async with GatewayStore(f"sqlite:///{path}", redis_url="") as store:
        token = await store.approvals.issue_token(make_request())
        monkeypatch.setattr(aiosqlite.Cursor, "fetchall", stand_still)
        deciding = asyncio.create_task(store.approvals.approve(token, "approver-1"))
        await arrived.wait()
        deciding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await deciding
        monkeypatch.undo()
        await asyncio.to_thread(take_the_write_lock, path)
        async with asyncio.timeout(5):
            result = await store.approvals.approve(token, "approver-2")

        assert (result.status, result.approver_id) == ("APPROVED", "approver-2")


async def test_tasks_cancelled_at_any_moment_leave_no_lock(tmp_path: Path) -> None:
    """Deciders are cancelled after every number of turns of the loop; after each the file can be written."""
    path = tmp_path / "gateway.db"
    async with GatewayStore(f"sqlite:///{path}", redis_url="") as store:
        for turns in range(60):
            token = await store.approvals.issue_token(make_request())
            deciding = asyncio.create_task(store.approvals.approve(token, "approver-1"))
            for _ in range(turns):
                await asyncio.sleep(0)
            deciding.cancel()
            await asyncio.wait([deciding])
            await asyncio.to_thread(take_the_write_lock, path)


@pytest.mark.parametrize(("mode", "crowd"), [("spool", 0), ("strict", 12)])
async def test_a_write_ends_within_five_seconds_while_another_process_has_the_lock(
    tmp_path: Path, mode: Any, crowd: int
) -> None:
    """A crowd of deciders that wait for the lock, too, takes it no longer; nothing is lost and nothing comes twice."""
    path = tmp_path / "gateway.db"
    settings = StoreSettings(audit_mode=mode)
    async with GatewayStore(f"sqlite:///{path}", redis_url="", settings=settings) as store:
        assert await store.audit.write(make_event(request_id="r-0")) == "STORED"
        tokens = [await store.approvals.issue_token(make_request()) for _ in range(crowd)]
        holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        # In a thread: a task of the store that has the lock needs this event loop to let it go.
        await asyncio.to_thread(holder.execute, "BEGIN IMMEDIATE")
        deciding = [asyncio.create_task(store.approvals.approve(token, "approver-1")) for token in tokens]
        await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            writing = [store.audit.write(make_event(request_id=f"r-{number}")) for number in (1, 2)]
            outcomes = await asyncio.gather(*writing, return_exceptions=True)
        holder.execute("ROLLBACK")
        holder.close()
        await asyncio.gather(*deciding)
        await store.audit.flush()
        stored = [event.request_id for event in await store.audit.search()]
        timeouts = set()
        for _ in range(20):
            async with store.database.engine.connect() as connection:
                timeouts.add((await connection.exec_driver_sql("PRAGMA busy_timeout")).scalar())

    if mode == "spool":
        assert outcomes == ["SPOOLED", "SPOOLED"]
        assert sorted(stored) == ["r-0", "r-1", "r-2"]
    else:
        assert {type(outcome) for outcome in outcomes} == {errors.AuditUnavailableError}
        assert stored == ["r-0"]
    # What has no spool still waits its turn.
    assert timeouts == {10_000}
