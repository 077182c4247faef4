"""A DBA rewrites a table (pg_repack, ALTER TABLE) as somebody begins to read: to old snapshots it is empty then."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agent_gateway_store import GatewayStore
from builders import make_event, make_request
from proofs.harness import eventually
from servers import connected

pytestmark = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)

WAITING = """
SELECT EXISTS (SELECT FROM pg_locks JOIN pg_database ON pg_database.oid = database
    WHERE NOT granted AND datname = current_database())
"""


@pytest.mark.parametrize("table", ["audit_events", "audit_leaves", "approval_requests"])
async def test_what_is_read_meanwhile_is_all_there_is(own_database_url: str, table: str, tmp_path: Path) -> None:
    """Each read waits for the table, and then sees every row: verify and COPY, whose snapshots come first, too."""
    async with GatewayStore(own_database_url, redis_url="") as store, connected(own_database_url) as dba:
        await store.audit.write_many(make_event() for _ in range(9))
        await store.approvals.issue_token(make_request())
        await store.evidence.seal()
        reads: dict[str, Callable[[], Awaitable[Any]]] = {
            "verify": store.evidence.verify,
            "arrow": store.audit.to_arrow,
            "export": lambda: store.audit.export(tmp_path / "events.parquet"),
            "approvals": lambda: store.approvals.export(tmp_path / "approvals.parquet"),
        }
        found: dict[str, Any] = {}
        for name, begin in reads.items():
            async with dba.transaction():
                # A default of its own in each row.
                await dba.execute(f"ALTER TABLE {table} ADD COLUMN {name} timestamptz DEFAULT clock_timestamp()")
                reading = asyncio.ensure_future(begin())

                async def waits_or_is_done(reading: asyncio.Future[Any] = reading) -> bool:
                    return reading.done() or bool(await dba.fetchval(WAITING))

                await eventually(waits_or_is_done)
            found[name] = await reading

    assert (found["verify"].ok, found["verify"].checked) == (True, 9)
    assert (found["arrow"].num_rows, found["export"].rows, found["approvals"].rows) == (9, 9, 1)
