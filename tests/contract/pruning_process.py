"""A process that prunes and is killed: `python pruning_process.py URL ARCHIVE STRIDE`; prints how often it was killed.

It is killed before each statement of a prune in turn, and before each step of its files.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

# Run as a script, this module finds the others of the tests beside its folder.
sys.path.insert(0, str(Path(__file__).parent.parent))

import pyarrow.dataset
import pyarrow.parquet  # noqa: F401  loaded once, before the forks
from sealing_process import Countdown, fork, opened, wait

from agent_gateway_store.archive import Archive
from agent_gateway_store.archive.manifest import NAME
from agent_gateway_store.retention import prune
from builders import make_event

OLD = datetime(2025, 3, 1, 23, 59, 58, tzinfo=UTC)
# Over two days, so that a batch writes two files.
EVENTS = 6


def counting(countdown: Countdown, run: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **options: Any) -> Any:
        countdown.step(object())
        return run(*args, **options)

    return counted


async def prune_until_killed(url: str, archive: Path, at: int) -> None:
    """Require that nothing was lost by the kill before; write, then prune, and die at one of its steps."""
    countdown, store = Countdown(), opened(url)
    countdown.watch(store)
    os.fsync = counting(countdown, os.fsync)
    for name in ("rename", "unlink"):
        setattr(Path, name, counting(countdown, getattr(Path, name)))
    prune.DELETE_ROWS = {"postgresql": 2, "sqlite": 2}
    async with store:
        await require_all(store, archive, EVENTS * (at - 1))
        events = [make_event(request_id=f"{at}-{n}", timestamp=OLD + timedelta(seconds=n)) for n in range(EVENTS)]
        await store.audit.write_many(events)
        countdown.left = at
        await store.retention.prune(OLD + timedelta(days=2), by="ops", archive=archive)
        countdown.left = -1


async def require_all(store: Any, archive: Path, least: int) -> None:
    """Each event is in the table or in the archive, in each of them once, and everything verifies."""
    is_there = (archive / NAME).exists()
    archived = [event.request_id for event in Archive(archive).events()] if is_there else []
    stored = {event.request_id async for event in store.audit.stream() if event.mcp_server != "gateway-store"}
    assert len(archived) == len(set(archived))
    assert all(f"{at}-{n}" in stored or f"{at}-{n}" in archived for at in written(least) for n in range(EVENTS))
    found = await store.evidence.verify(archive=archive if is_there else None)
    assert found.ok, found.findings
    assert not is_there or Archive(archive).verify().ok


def written(count: int) -> range:
    return range(1, count // EVENTS + 1, STRIDE)


STRIDE = 1


def main(url: str, archive: str, stride: str) -> None:
    global STRIDE
    STRIDE = int(stride)
    at, kills = 1, 0

    def work(url: str, number: int) -> Any:
        return prune_until_killed(url, Path(archive), number)

    while (code := wait(fork(work, url, at))) == -signal.SIGKILL:
        at, kills = at + STRIDE, kills + 1
    print(kills)
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
