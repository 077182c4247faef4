"""No event waits for ever on its way through the plugins, whatever moment it comes or its task is cancelled at."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agent_gateway_store import AuditEvent, hookimpl
from agent_gateway_store.audit.hooks import BeforeWriteHooks
from agent_gateway_store.audit.record import EncodedRow, encode_event, to_values
from agent_gateway_store.hooks.executor import PluginExecutor
from agent_gateway_store.hooks.manager import LOAD_VARIABLE, Plugins
from builders import make_event

pytestmark = pytest.mark.unit

GIVEN, CHANGED, WITHHELD = {"path": "/home/alice"}, {"path": "***"}, {"[WITHHELD]": "PLUGIN_FAILED"}


class Editor:
    """Hides the arguments."""

    @hookimpl
    def gateway_store_before_audit_write(self, event: AuditEvent) -> AuditEvent:
        return event.model_copy(update={"sanitized_args": CHANGED})


class SwiftExecutor(PluginExecutor):
    """Runs the call in this loop, so that it may end on any turn."""

    async def run(self, hook: str, name: str, function: Any) -> Any:
        return await function()


def make_hooks() -> BeforeWriteHooks:
    return BeforeWriteHooks(lambda: Plugins([Editor()], environ={LOAD_VARIABLE: ""}), SwiftExecutor(5))


async def come(hooks: BeforeWriteHooks, turn: int) -> list[EncodedRow]:
    for _ in range(turn):
        await asyncio.sleep(0)
    return await hooks.prepare([encode_event(make_event(sanitized_args=GIVEN))])


@pytest.mark.parametrize("is_first", [True, False])
async def test_the_last_event_needs_none_behind_it(is_first: bool) -> None:
    """It comes on any turn of the event loop after the one before it, also on that on which the plugin is done."""

    async def pair(late: int) -> list[list[EncodedRow]]:
        hooks = make_hooks()
        turns = (0, late) if is_first else (late, 0)
        return await asyncio.gather(*(come(hooks, turn) for turn in turns))

    async with asyncio.timeout(10):
        pairs = await asyncio.gather(*map(pair, range(40)))

    assert all(to_values(row)["sanitized_args"] == CHANGED for both in pairs for (row,) in both)


async def test_whenever_an_event_comes_the_plugin_sees_it() -> None:
    """One queue for all: before, during or just after a call of the plugin, on any turn of the event loop."""
    hooks = make_hooks()
    # Pairs, the second of which comes so many turns after the first, and in either order within a turn.
    turns = [start * 30 + late for start in range(40) for late in (0, start % 20)]

    async with asyncio.timeout(10):
        prepared = await asyncio.gather(
            *(come(hooks, turn) for turn in (*turns, *(1200 + late for late in turns[::-1])))
        )

    assert hooks.withheld == 0
    assert [to_values(row)["sanitized_args"] for (row,) in prepared] == [CHANGED] * 160


@pytest.mark.parametrize("turn", range(12))
async def test_an_event_whose_call_is_cancelled_is_withheld(turn: int) -> None:
    """Somebody cancels every other task on any turn of the event loop, also before the first step of the call."""
    hooks = make_hooks()
    hooks.is_wanted  # noqa: B018  # the plugins are loaded
    writing = asyncio.create_task(come(hooks, 0))
    for _ in range(turn):
        await asyncio.sleep(0)
    for task in asyncio.all_tasks() - {asyncio.current_task(), writing}:
        task.cancel()
    (row,) = await asyncio.wait_for(writing, 10)

    assert to_values(row)["sanitized_args"] in (CHANGED, WITHHELD)
