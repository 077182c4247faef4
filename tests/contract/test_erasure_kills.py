"""`erase` and `prune_approvals` killed at every step: the next run completes them, and nothing is left or lost."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from contract_helpers import WITH_REDIS, run_script
from erasing_process import APPROVALS, LATER, archived_approvals
from erasure_helpers import BEFORE, MARK, secret_event, settle, used_approval

from agent_gateway_store import GatewayStore, StoreSettings, clock

pytestmark = pytest.mark.system

# Every 23rd step, as each takes a second or two; `-m slow` takes every one.
STRIDES = [23, pytest.param(1, marks=pytest.mark.slow)]


kills = partial(asyncio.to_thread, run_script, "erasing_process.py", loads=["pyarrow.dataset"])
"""Kill a process at every so manieth step; return how often."""


@WITH_REDIS
@pytest.mark.parametrize("what", ["table", "archive"])
@pytest.mark.parametrize("stride", STRIDES)
async def test_an_erasure_killed_at_any_step_is_completed_by_the_next(
    stride: int, what: str, database_url: str, redis_setting: str, tmp_path: Path
) -> None:
    """No value, hash or salt is left then in any table, archive file, notice or Redis entry. In the archive, the event
    stands under an id that holds a hash, and goes with it. The log verifies after the kill, and after the next run.
    """
    assert await kills(database_url, redis_setting, tmp_path, what, stride) >= 30 // stride


@WITH_REDIS
@pytest.mark.parametrize("stride", STRIDES)
async def test_a_prune_of_approvals_killed_at_any_step_loses_nothing(
    stride: int, database_url: str, redis_setting: str, tmp_path: Path
) -> None:
    """After each kill every approval is in the table or in the archive; in the end all are in the archive, once."""
    killed = await kills(database_url, redis_setting, tmp_path, "approvals", stride)
    assert killed >= 30 // stride

    async with GatewayStore(database_url, redis_url="") as store:
        clock.move(LATER)
        await store.retention.prune_approvals(timedelta(days=190), by="ops", archive=tmp_path / "archive")
        assert len(await store.approvals.list_requests()) == 0
        assert (await store.evidence.verify()).ok
    assert len(archived_approvals(tmp_path / "archive")) == APPROVALS * (killed + 1)


async def test_no_value_is_left_in_a_file_of_sqlite(
    sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where SQLite by itself wipes nothing, as by default: while the store is open, and where it was pruned before."""
    connect = sqlite3.connect

    def connect_plainly(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.execute("PRAGMA secure_delete = OFF")
        return connection

    def left() -> int:
        # By another process: to close the file here would end SQLite's locks.
        found = subprocess.run(["grep", "-rac", MARK, str(tmp_path)], capture_output=True, text=True, check=False)
        return sum(int(line.rpartition(":")[2]) for line in found.stdout.splitlines())

    monkeypatch.setattr(sqlite3, "connect", connect_plainly)
    shutil.copy(sqlite_template, tmp_path / "gateway.db")
    settings = StoreSettings(audit_seal_seconds=0)
    async with GatewayStore(f"sqlite:///{tmp_path / 'gateway.db'}", redis_url="", settings=settings) as store:
        await settle(store)
        # So many that rows which grow move within their page, and leave what they were.
        names = [f"r-{number}" for number in range(2, 10)]
        for name in names:
            await used_approval(store, name)
            await store.audit.write(secret_event(request_id=name, timestamp=clock.utc_now()))
        await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
        for erased in ("r-1", *names):
            assert left() > 0
            await store.retention.erase(erased, reason="GDPR 17", by="dpo", archive=tmp_path / "a")
        assert left() == 0
