"""Processes that seal, write, and are killed: `python sealing_process.py URL WHAT`, WHAT being `kills` or `crowd`.

They are forked from one that has imported everything and opened nothing.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from os import _exit as end_process
from pathlib import Path
from typing import Any, NoReturn

import asyncpg
from sqlalchemy import event

# Run as a script, this module finds the others of the tests beside its folder.
sys.path.insert(0, str(Path(__file__).parent.parent))


from agent_gateway_store import GatewayStore, StoreSettings
from builders import make_event

# More than a tile is wide, so that each seal completes one.
EVENTS = 300
SECONDS = 1.0


class Countdown:
    """Kills this process before its n-th statement from when it is armed."""

    def __init__(self) -> None:
        self.left = -1
        self._last = ""

    def step(self, statement: object = None) -> None:
        # SQLite names a statement once for each row that it inserts.
        if isinstance(statement, str) and statement[:30] == self._last:
            return
        self._last = str(statement)[:30]
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, store: GatewayStore) -> None:
        """Count what goes to the drivers."""
        for name in ("execute", "fetch", "copy_records_to_table"):
            setattr(asyncpg.Connection, name, self.counting(getattr(asyncpg.Connection, name)))
        if store.database.dialect == "sqlite":
            engine = store.database.engine.sync_engine
            event.listen(engine, "connect", lambda made, _: made.run_async(lambda it: it.set_trace_callback(self.step)))

    def watch_files(self) -> None:
        """Count the steps by which files come and go."""
        os.fsync = self.counting(os.fsync)
        for name in ("rename", "unlink"):
            setattr(Path, name, self.counting(getattr(Path, name)))

    def counting(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function, or a coroutine function, that is a step."""

        def counted(*args: Any, **options: Any) -> Any:
            self.step(object())
            return run(*args, **options)

        return counted


def opened(url: str) -> GatewayStore:
    return GatewayStore(url, redis_url="", settings=StoreSettings(audit_seal_seconds=0))


async def seal_until_killed(url: str, at: int) -> None:
    """Write, then seal; die at a statement of the seal, if it has so many."""
    countdown, store = Countdown(), opened(url)
    countdown.watch(store)
    async with store:
        await store.audit.write_many([make_event() for _ in range(EVENTS)])
        countdown.left = at
        await store.evidence.seal()
        countdown.left = -1


async def seal_all_the_time(url: str, _number: int) -> None:
    async with opened(url) as store:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            await store.evidence.seal()


async def write_all_the_time(url: str, number: int) -> None:
    """Write; on PostgreSQL also in transactions that stay open for a while, some of which are taken back."""
    chance = random.Random(number)
    async with opened(url) as store:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            await store.audit.write_many([make_event() for _ in range(chance.randrange(1, 200))])
            if store.database.dialect == "sqlite":
                await asyncio.sleep(0.05)
                continue
            async with store.database.sessions() as session:
                for _ in range(3):
                    await store.audit.record(make_event(), session=session)
                    await asyncio.sleep(chance.random() * 0.2)
                if chance.random() < 0.5:
                    await session.commit()


def fork(work: Callable[[str, int], Awaitable[None]], url: str, number: int) -> int:
    """Run `work` in a process of its own; return its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        asyncio.run(work(url, number))  # type: ignore[arg-type]
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        # Past what the parent would do at its end.
        end_process(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_each_step(work: Callable[[str, int], Awaitable[None]], url: str, stride: int = 1) -> NoReturn:
    """Run `work` until it ends, each time killed so many steps later; print how often it was."""
    at, kills = 1, 0
    while (code := wait(fork(work, url, at))) == -signal.SIGKILL:
        at, kills = at + stride, kills + 1
    print(kills)
    sys.exit(code)


def main(url: str, what: str) -> None:
    if what == "kills":
        kill_at_each_step(seal_until_killed, url)
    children = [fork(seal_all_the_time, url, number) for number in range(8)]
    children += [fork(write_all_the_time, url, number) for number in range(3)]
    sys.exit(sum(map(wait, children)))


if __name__ == "__main__":
    main(*sys.argv[1:])
