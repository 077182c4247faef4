"""Processes that ship to a file and are killed: `python shipping_process.py URL FILE WHAT NUMBER`.

WHAT is `barriers` (kill before each NUMBER-th step of a run: a statement, a write, an fsync) or `moments` (NUMBER kills
at random moments, while another process writes). They are forked from one that has imported everything.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

# Run as a script, this module finds the others of the tests beside its folder.
sys.path.insert(0, str(Path(__file__).parent.parent))

from sealing_process import Countdown, fork, kill_at_each_step, opened, wait

from agent_gateway_store.plugins.file_sink import FileSink
from builders import make_event

EVENTS, BATCH = 17, 5
# Longer than a store takes to open and to ship a batch or two, on a busy machine.
LONGEST_S = 1.0

FILE = ""


def watch_file(countdown: Countdown) -> None:
    """Count the steps of the sink, too; the last one may leave a half of what it writes."""
    write = os.write

    def counted_write(file: int, data: Any) -> int:
        if bytes(data[:1]) != b"{":
            return write(file, data)
        countdown.step(object())
        if countdown.left == 1:
            write(file, data[: len(data) // 2 + 3])
        countdown.step(object())
        return write(file, data)

    os.write, os.fsync = counted_write, countdown.counting(os.fsync)


async def ship_until_killed(url: str, at: int) -> None:
    """Write, then ship to the end; die at a step of that, if it has so many."""
    countdown, store = Countdown(), opened(url)
    countdown.watch(store)
    watch_file(countdown)
    async with store:
        await store.audit.write_many([make_event() for _ in range(EVENTS)])
        countdown.left = at
        await store.audit.ship(FileSink(FILE), once=True, batch=BATCH)
        countdown.left = -1


async def follow(url: str, _number: int) -> None:
    async with opened(url) as store:
        await store.audit.ship(FileSink(FILE), batch=BATCH, poll_s=0.01)


async def write_all_the_time(url: str, number: int) -> None:
    chance = random.Random(number)
    async with opened(url) as store:
        while True:
            await store.audit.write_many([make_event() for _ in range(chance.randrange(1, 12))])
            await asyncio.sleep(0.02)


def main(url: str, file: str, what: str, number: int) -> None:
    global FILE
    FILE, kills = file, 0
    if what == "barriers":
        kill_at_each_step(ship_until_killed, url, number)
    chance, writer = random.Random(number), fork(write_all_the_time, url, number)
    try:
        for _ in range(number):
            shipper = fork(follow, url, 0)
            time.sleep(0.2 + chance.random() * LONGEST_S)
            os.kill(shipper, signal.SIGKILL)
            kills += wait(shipper) == -signal.SIGKILL
    finally:
        os.kill(writer, signal.SIGKILL)
        wait(writer)
    print(kills)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
