"""The process ends whatever the moment was in which a SQLite connection was given up by a task that is cancelled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forks import forks

# The thread of a connection waits in `hold` while its task is cancelled twice, so that SQLAlchemy closes the connection
# and stops it as well. Then the thread goes on: to its end while the event loop waits, or only when the loop ends.
SCRIPT = """
import asyncio, gc, sys, threading
from agent_gateway_store.storage.database import create_engine

asked, released = threading.Event(), threading.Event()

def hold():
    asked.set()
    released.wait()

async def read(engine):
    async with engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        await driver.create_function("hold", 0, hold)
        await connection.exec_driver_sql("SELECT hold()")

async def main():
    engine = create_engine("sqlite:///test.db")
    before = set(threading.enumerate())
    task = asyncio.create_task(read(engine))
    while not asked.is_set():
        await asyncio.sleep(0.001)
    [thread] = set(threading.enumerate()) - before
    for _ in range(2):
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
    if sys.argv[1] == "ended":
        released.set()
        thread.join(timeout=1)
    else:
        threading.Timer(0.2, released.set).start()
    if sys.argv[2] == "disposed":
        await engine.dispose()
        print(thread.is_alive())

asyncio.run(main())
gc.collect()
"""

FLOW = """
import asyncio, threading, aiosqlite
from agent_gateway_store import ApprovalRequest, CallerIdentity, GatewayStore, StoreSettings, ToolCall, TrustLevel

caller = CallerIdentity(caller_id="crew", role="dev", trust_level=TrustLevel.LOW, environment="dev")
call = ToolCall(server="bank", tool="pay")

async def main():
    async with GatewayStore("sqlite:///gateway.db", redis_url="") as store:
        request = ApprovalRequest(request_id="r", caller_id="crew", tool_call=call, risk_explanation="Money.")
        asked = await store.approvals.acquire(request)
        await store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
        used = await store.approvals.acquire(request)
        async with store.audit.call(call, caller, decision="ALLOW", approval_id=used.approval_id):
            pass
        print(aiosqlite.__version__, used.status, len([event async for event in store.audit.stream()]))

asyncio.run(main())
print(threading.active_count())
"""


@pytest.mark.parametrize("thread", ["ended", "at work"])
@pytest.mark.parametrize("engine", ["disposed", "left"])
def test_a_connection_that_is_closed_and_stopped_at_once_lets_the_process_end(
    tmp_path: Path, thread: str, engine: str
) -> None:
    """No task waits for a thread that has ended, and no thread calls a loop that has: nothing hangs or is printed."""
    ended = forks().run(["-W", "error", "-c", SCRIPT, thread, engine], cwd=tmp_path, env=os.environ, timeout=30)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == ("False\n" if engine == "disposed" else "")


@pytest.mark.system
def test_the_oldest_driver_serves_a_store(tmp_path: Path) -> None:
    """aiosqlite 0.21, which CrewAI requires: its connections are threads, and do not stop by themselves."""
    install = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, "aiosqlite==0.21.0")
    subprocess.run(install, check=True, capture_output=True)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*arguments: str) -> str:
        command = (sys.executable, "-W", "error", "-c", *arguments)
        ended = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        return ended.stdout

    assert run(FLOW).split() == ["0.21.0", "USED", "1", "1"]
    for thread in ("ended", "at work"):
        assert run(SCRIPT, thread, "disposed") == "False\n"
        assert run(SCRIPT, thread, "left") == ""
