"""Writers, a follower, a sealer, holds that come and go, and two prunes at once: nothing is missed, lost or doubled."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from erasure_helpers import OLD

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.archive import Archive
from agent_gateway_store.errors import EventsPrunedError
from agent_gateway_store.retention import prune
from builders import make_event

pytestmark = pytest.mark.system

STEP = timedelta(hours=3)
HELD = "s-held"


class Together:
    """What works at the same time, each on a store of its own.

    Writers write in rounds, the events of a round three hours later than those of the one before. What the follower has
    read of all writers may be pruned.

    Attributes:
        written: The ids of what was acknowledged.
        read: The ids of what the follower was given.
        pruned: How many events the two prunes took.
    """

    def __init__(self, writers: int, rounds: int, each: int, archive: Path) -> None:
        self._writers, self._rounds, self._each, self._archive = writers, rounds, each, archive
        self.written: list[str] = []
        self.read: list[str] = []
        self.pruned = self.seals = self.holds = 0
        self._read_of: Counter[int] = Counter()

    @property
    def _rounds_read(self) -> int:
        """How many rounds the follower has read to their end."""
        whole = self._writers * self._each
        return next((number for number in range(self._rounds) if self._read_of[number] < whole), self._rounds)

    @property
    def _is_over(self) -> bool:
        return self._rounds_read == self._rounds

    async def write(self, store: GatewayStore, writer: int) -> None:
        for number in range(self._rounds):
            for n in range(self._each):
                session_id = HELD if n == 0 else f"s-{writer}"
                name = f"{number}-{writer}-{n}"
                event = make_event(request_id=name, timestamp=OLD + number * STEP, session_id=session_id)
                # On SQLite a prune may have the lock for longer than a write waits: the spool brings it in later.
                assert await store.audit.write(event) in ("STORED", "SPOOLED")
                self.written.append(name)

    async def follow(self, store: GatewayStore, cursor: str) -> None:
        while not self._is_over:
            page = await store.audit.changes(cursor, limit=100)
            cursor = page.next_cursor or ""
            names = [event.request_id for event in page if event.mcp_server != "gateway-store"]
            self.read += names
            self._read_of.update(int(name.partition("-")[0]) for name in names)
            await asyncio.sleep(0)

    async def seal(self, store: GatewayStore) -> None:
        while not self._is_over:
            await store.evidence.seal()
            self.seals += 1
            await asyncio.sleep(0.01)

    async def prune(self, store: GatewayStore) -> None:
        is_last = False
        while not is_last:
            is_last = self._is_over
            before = OLD + self._rounds_read * STEP
            pruned = await store.retention.prune(before, by="ops", archive=self._archive)
            self.pruned += pruned.events
            await asyncio.sleep(0.01)

    async def hold(self, store: GatewayStore) -> None:
        """What is there when a hold was placed is there until it is released."""
        while not self._is_over:
            await store.retention.hold("case", reason="r", by="counsel", session_id=HELD)
            covered = await self.held(store)
            await asyncio.sleep(0.05)
            assert covered <= await self.held(store)
            await store.retention.release_hold("case", by="counsel")
            self.holds += 1

    async def held(self, store: GatewayStore) -> set[str]:
        return {event.request_id async for event in store.audit.stream(session_id=HELD)}


@pytest.fixture
async def stores(database_url: str, no_plugins: None) -> AsyncIterator[list[GatewayStore]]:
    """As many processes have them."""
    settings = StoreSettings(audit_seal_seconds=0)
    async with AsyncExitStack() as stack:
        each = [GatewayStore(database_url, redis_url="", settings=settings) for _ in range(6)]
        yield [await stack.enter_async_context(store) for store in each]


@pytest.mark.parametrize(
    ("writers", "rounds", "each", "batch"), [(5, 3, 3, 7), pytest.param(50, 20, 20, 200, marks=pytest.mark.slow)]
)
async def test_a_follower_misses_nothing_beside_writers_a_sealer_holds_and_two_prunes(
    writers: int,
    rounds: int,
    each: int,
    batch: int,
    stores: list[GatewayStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is given each event once. Each is in the table or in the archive at the end, once, and the log verifies; a
    follower that has read nothing is told where the events are.
    """
    monkeypatch.setattr(prune, "_BATCH_ROWS", batch)
    archive = tmp_path / "a"
    work = Together(writers, rounds, each, archive)
    begin = (await stores[0].audit.changes("now")).next_cursor or ""
    jobs: list[Awaitable[None]] = [work.write(stores[0], writer) for writer in range(writers)]
    jobs += [work.follow(stores[1], begin), work.seal(stores[2]), work.hold(stores[3])]
    jobs += [work.prune(stores[4]), work.prune(stores[5])]

    async with asyncio.TaskGroup() as group:
        for job in jobs:
            group.create_task(job)  # type: ignore[arg-type]

    print(f"{len(work.written):,} events, {work.pruned:,} pruned, {work.seals:,} seals, {work.holds:,} holds")
    assert sorted(work.read) == sorted(work.written)
    archived = [event.request_id for event in Archive(archive).events()]
    kept = [event.request_id async for event in stores[0].audit.stream() if event.mcp_server != "gateway-store"]
    assert sorted(archived + kept) == sorted(work.written)
    assert len(archived) == work.pruned > 0
    found = await stores[0].evidence.verify(archive=archive)
    assert (found.ok, found.archived) == (True, work.pruned)
    with pytest.raises(EventsPrunedError) as raised:
        await stores[1].audit.changes(begin)
    assert raised.value.archive == str(archive)
