"""kill -9 anywhere: the sink has each event at least once and in order, and of repeats only those of a last batch."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from contract_helpers import run_script
from shipping_process import BATCH, EVENTS

from agent_gateway_store import GatewayStore
from agent_gateway_store.plugins.file_sink import FileSink

pytestmark = [pytest.mark.usefixtures("no_plugins"), pytest.mark.system]


async def require_shipped(store: GatewayStore, file: Path) -> int:
    """Ship the rest, and check the file against the log; return how many events came again."""
    await store.audit.ship(FileSink(file), once=True)
    cursor, expected = "beginning", []
    while page := await store.audit.changes(cursor, limit=10_000):
        expected += [event.id for event in page]
        cursor = page.next_cursor or ""
    shipped = [json.loads(line)["id"] for line in file.read_text().split("\n")[:-1]]
    place = repeats = 0
    for event_id in shipped:
        if place == len(expected) or event_id != expected[place]:
            back = place - expected.index(event_id)
            assert 0 < back <= BATCH, f"event {event_id} does not follow"
            place, repeats = place - back, repeats + back
        place += 1
    assert place == len(expected), "events are missing at the end"
    return repeats


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
async def test_killed_at_any_step_it_skips_nothing(
    store: GatewayStore, database_url: str, tmp_path: Path, stride: int
) -> None:
    """Before each of its statements, writes and fsyncs in turn, also with half a line written."""
    file = tmp_path / "log.jsonl"
    kills = await asyncio.to_thread(run_script, "shipping_process.py", database_url, file, "barriers", stride)
    repeats = await require_shipped(store, file)

    assert kills >= 30 // stride
    assert repeats > 0
    assert len(await store.audit.list_recent(100_000)) == EVENTS * (kills + 1)


@pytest.mark.slow
async def test_killed_at_any_moment_it_skips_nothing(store: GatewayStore, database_url: str, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    assert await asyncio.to_thread(run_script, "shipping_process.py", database_url, file, "moments", 100) == 100
    await require_shipped(store, file)

    assert len(file.read_text()) > 0
