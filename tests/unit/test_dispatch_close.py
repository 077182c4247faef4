"""A dispatcher that closes cancels what is under way, says so, and never waits for a thread that is stuck."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

import agent_gateway_store
import dispatch_helpers
from agent_gateway_store.testing import make_notice
from dispatch_helpers import Blocker, Doing, Recorder, dispatching, until_called

pytestmark = pytest.mark.unit


async def test_closed_dispatcher_reports() -> None:
    """After close nothing is delivered and nothing is raised."""
    recorder = Recorder()

    with dispatching(recorder) as dispatcher:
        await dispatcher.aclose()
        reports = await dispatcher.deliver_all(make_notice())

    assert [report.error for report in reports] == ["the dispatcher is closed"]
    assert recorder.received == []


async def test_calls_under_way_are_cancelled_and_reported() -> None:
    """Whoever waits for a notifier learns that the dispatcher closed."""
    sleeper = Doing("sleeper", lambda: asyncio.sleep(20))
    with dispatching(sleeper, timeout=20) as dispatcher:
        task = asyncio.create_task(dispatcher.deliver("sleeper", make_notice()))
        await until_called(sleeper)
        await dispatcher.aclose(5)
        report = await asyncio.wait_for(task, 5)

    assert report.error == "the dispatcher was closed before it was done"


async def test_close_does_not_wait_for_a_blocked_thread() -> None:
    """It waits as long as it was told, and not at all for threads known to be stuck."""
    blocker, fresh = Blocker(), Blocker("fresh")

    with dispatching(blocker, fresh) as dispatcher:
        await dispatcher.deliver("blocker", make_notice())
        task = asyncio.create_task(dispatcher.deliver("fresh", make_notice()))
        await until_called(fresh)
        started = time.monotonic()
        dispatcher.close(0.1)
        waited = time.monotonic() - started
        assert not (await task).ok

    assert waited < 5


@pytest.mark.system
def test_process_exits_while_plugins_are_stuck() -> None:
    """Neither a blocked thread nor a blocked `to_thread` holds up the end of the process."""
    code = f"""
import asyncio, sys, time
sys.path.insert(0, {str(Path(dispatch_helpers.__file__).parent)!r})
from dispatch_helpers import *
from agent_gateway_store.testing import make_notice

async def main():
    actions = [lambda: time.sleep(60), lambda: asyncio.to_thread(time.sleep, 60), stubborn]
    plugins = Plugins([Doing(f"n-{{i}}", action) for i, action in enumerate(actions)], environ={{LOAD_VARIABLE: ""}})
    dispatcher = Dispatcher(plugins, StoreSettings(plugin_timeout_seconds=0.2))
    print([report.ok for report in await dispatcher.deliver_all(make_notice())])
    await dispatcher.aclose()

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(Path(agent_gateway_store.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.stdout == "[False, False, False]\n", done.stderr
    assert done.returncode == 0
