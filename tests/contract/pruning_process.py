"""A process that prunes and is killed: `python pruning_process.py URL ARCHIVE STRIDE`; prints how often it was killed.

It is killed before each statement of a prune in turn, and before each step of its files.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

# Run as a script, this module finds the others of the tests beside its folder.
sys.path.insert(0, str(Path(__file__).parent.parent))

import pyarrow.dataset
import pyarrow.parquet  # noqa: F401  loaded once, before the forks
from sealing_process import Countdown, kill_at_each_step, opened

from agent_gateway_store import GatewayStore
from agent_gateway_store.archive import Archive
from agent_gateway_store.archive.manifest import NAME
from agent_gateway_store.retention import prune
from builders import make_event

OLD = datetime(2025, 3, 1, 23, 59, 58, tzinfo=UTC)
# Over two days, so that a batch writes two files.
EVENTS = 6


async def prune_until_killed(url: str, archive: Path, before: range, at: int) -> None:
    """Require that nothing was lost by the kill before; write, then prune, and die at one of its steps."""
    countdown, store = Countdown(), opened(url)
    countdown.watch(store)
    countdown.watch_files()
    prune.DELETE_ROWS = {"postgresql": 2, "sqlite": 2}
    async with store:
        await require_all(store, archive, before)
        events = [make_event(request_id=f"{at}-{n}", timestamp=OLD + timedelta(seconds=n)) for n in range(EVENTS)]
        await store.audit.write_many(events)
        countdown.left = at
        await store.retention.prune(OLD + timedelta(days=2), by="ops", archive=archive)
        countdown.left = -1


async def require_all(store: GatewayStore, archive: Path, runs: range) -> None:
    """Each event is in the table or in the archive, in each of them once, and everything verifies."""
    is_there = (archive / NAME).exists()
    archived = [event.request_id for event in Archive(archive).events()] if is_there else []
    stored = {event.request_id async for event in store.audit.stream() if event.mcp_server != "gateway-store"}
    assert len(archived) == len(set(archived))
    assert all(f"{at}-{n}" in stored or f"{at}-{n}" in archived for at in runs for n in range(EVENTS))
    found = await store.evidence.verify(archive=archive if is_there else None)
    assert found.ok, found.findings
    assert not is_there or Archive(archive).verify().ok


def main(url: str, archive: str, given: str) -> None:
    stride = int(given)
    kill_at_each_step(lambda _, at: prune_until_killed(url, Path(archive), range(1, at, stride), at), url, stride)


if __name__ == "__main__":
    main(*sys.argv[1:])
