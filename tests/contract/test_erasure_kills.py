"""`erase` and `prune_approvals` killed at every step: the next run completes them, and nothing is left or lost."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from contract_helpers import WITH_REDIS, run_script
from erasing_process import APPROVALS, LATER, archived_approvals

from agent_gateway_store import GatewayStore, clock

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
    """After each kill every approval is in the table or in the archive; in the end all are in the archive."""
    killed = await kills(database_url, redis_setting, tmp_path, "approvals", stride)
    assert killed >= 30 // stride

    async with GatewayStore(database_url, redis_url="") as store:
        clock.move(LATER)
        await store.retention.prune_approvals(timedelta(days=190), by="ops", archive=tmp_path / "archive")
        assert len(await store.approvals.list_requests()) == 0
        assert (await store.evidence.verify()).ok
    assert len(archived_approvals(tmp_path / "archive")) == APPROVALS * (killed + 1)
