"""A process that works on an archive or appends to a file, and freezes: `python frozen_process.py WORK AT URL PATH`.

WORK: `prune`, `erase`, `approvals`, or without a URL `send` or `witness`. AT: the function before which it stops itself
by SIGSTOP, as in a virtual machine that is paused; whoever started it lets it go on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

# Run as a script, this module finds the others of the tests beside its folder.
sys.path.insert(0, str(Path(__file__).parent.parent))

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.archive import files, manifest
from agent_gateway_store.plugins.file_sink import FileSink, append
from builders import make_event

_SEAMS: dict[str, tuple[Any, str]] = {
    "clean-up": (manifest, "files_of"),
    "write": (files, "write_day"),
    "append": (manifest.Manifest, "append"),
    "truncate": (os, "ftruncate"),
}


def freeze_before(owner: Any, name: str) -> None:
    """Let the first call of a function wait for SIGCONT."""
    function = getattr(owner, name)

    def frozen(*arguments: Any, **options: Any) -> Any:
        setattr(owner, name, function)
        os.kill(os.getpid(), signal.SIGSTOP)
        # The signal reaches one thread, and this one may be another.
        time.sleep(0.2)
        return function(*arguments, **options)

    setattr(owner, name, frozen)


def short_write() -> None:
    """Let the next write take one byte, as a disk that is nearly full does."""
    write = os.write
    os.write = lambda file, data: write(file, data[:1])


async def main(work: str, at: str, url: str, path: str) -> None:
    freeze_before(*_SEAMS[at])
    if work == "send":
        await FileSink(path).send([make_event(request_id="frozen")])
        return
    if work == "witness":
        short_write()
        with suppress(OSError):
            append(Path(path), b"frozen\n")
        return
    async with GatewayStore(url, redis_url="", settings=StoreSettings(audit_seal_seconds=0)) as store:
        if work == "prune":
            await store.retention.prune("400d", by="frozen", archive=path)
        elif work == "erase":
            await store.retention.erase("r-1", reason="r", by="frozen", archive=path)
        else:
            await store.retention.prune_approvals(timedelta(0), by="frozen", archive=path, below_floor=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
