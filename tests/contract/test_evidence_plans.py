"""A step on a long sealed log reads what is new, and little of what is old: no plan grows with the log."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from plan_helpers import Reports, copies

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.evidence.tree import TILE_WIDTH
from builders import make_event
from servers import connected, run

pytestmark = pytest.mark.system

# Large enough for an index to be worth it.
_EVENTS = 10_000
_TABLES = ("audit_events", "audit_leaves", "audit_checkpoints", "approval_requests")


async def _filled(url: str, *, is_analysed: bool) -> None:
    async with GatewayStore(url, redis_url="") as store:
        await store.audit.write(make_event(request_id="event-0"))
        async with connected(url) as connection:
            for table in _TABLES:
                await connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
            ago = "now() - n * interval '1 minute'"
            await connection.execute(
                copies("audit_events", _EVENTS, request_id="'event-' || n", timestamp=ago, session_id="'s-' || n % 500")
            )
        await store.evidence.seal()
        if is_analysed:
            async with connected(url) as connection:
                await connection.execute("ANALYZE")


@pytest.fixture(params=["analysed", "never analysed"])
def filled(request: pytest.FixtureRequest, migrated_postgres_database: Callable[[], str]) -> str:
    """The URL of a database with a long sealed log."""
    url = migrated_postgres_database()
    run(_filled(url, is_analysed=request.param == "analysed"))
    return url


async def _seal(store: GatewayStore) -> None:
    await store.audit.write_many([make_event() for _ in range(20)])
    assert await store.evidence.seal() is not None


async def _verify(store: GatewayStore) -> None:
    # Copies have the hash of the first event, but each is read.
    assert (await store.evidence.verify()).size > _EVENTS


async def _publish(store: GatewayStore) -> None:
    with tempfile.TemporaryDirectory() as folder:
        await store.evidence.publish(folder)


async def _hold(store: GatewayStore) -> None:
    await store.retention.hold("case-7", reason="asked by counsel", by="anna", session_id="s-7")
    await store.retention.holds()
    await store.retention.release_hold("case-7", by="anna")


async def _prune(store: GatewayStore) -> None:
    # The oldest fifty, or those that are left of them.
    before = timedelta(minutes=_EVENTS - 50)
    await store.retention.prune(before, by="anna", discard=True, below_floor=True)


async def _erase(store: GatewayStore) -> None:
    await store.retention.erase("event-888", by="anna", reason="asked by the person")


STEPS: dict[str, Callable[[GatewayStore], Awaitable[Any]]] = {
    "seal": _seal,
    "checkpoint": lambda store: store.evidence.checkpoint(),
    "prove": lambda store: store.evidence.prove("event-777"),
    "verify": _verify,
    "publish": _publish,
    "hold": _hold,
    "prune": _prune,
    "erase": _erase,
    "prune_approvals": lambda store: store.retention.prune_approvals(timedelta(days=365), by="anna", discard=True),
}


# A batch of pruning is as large as this log, and it counts what is left.
READING_ALL = {"prune", "verify", "publish"}


async def test_no_plan_of_a_step_surprises(filled: str, no_plugins: None) -> None:
    """No JIT, no whole table, no estimate far off, no sort on disk, and few rows read for one that is returned."""
    problems = []
    for setting in ("force_custom_plan", "force_generic_plan"):
        store = GatewayStore(filled, redis_url="", settings=StoreSettings(audit_seal_seconds=0))
        reports = Reports(store, setting)
        async with store:
            # At its start a sealer compares the whole log, once.
            await _seal(store)
            for name, step in STEPS.items():
                problems += await reports.faults_of(name, step(store), reads_all=name in READING_ALL)
                assert reports.plans, f"PostgreSQL reports no plans of {name}"
                tiles = [each["Plan"]["Plan Rows"] for each in reports.plans if "AS tile\n" in each["Query Text"]]
                assert max(tiles, default=0) < 2 * TILE_WIDTH, f"{name}: hashes of a part of the log are expected"

    assert not problems, "\n".join(problems)
