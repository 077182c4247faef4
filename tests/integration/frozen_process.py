"""A process that works on an archive or ships to a file, and freezes: `python frozen_process.py WORK AT URL PATH`.

WORK: `prune`, `erase`, `approvals` or `ship`. AT: the function before which it stops itself by SIGSTOP, as in a virtual
machine that is paused; whoever started it lets it go on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.archive import files, manifest
from agent_gateway_store.plugins.file_sink import FileSink

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


async def main(work: str, at: str, url: str, path: str) -> None:
    freeze_before(*_SEAMS[at])
    async with GatewayStore(url, redis_url="", settings=StoreSettings(audit_seal_seconds=0)) as store:
        if work == "prune":
            await store.retention.prune("400d", by="frozen", archive=path)
        elif work == "erase":
            await store.retention.erase("r-1", reason="r", by="frozen", archive=path)
        elif work == "approvals":
            await store.retention.prune_approvals(timedelta(0), by="frozen", archive=path, below_floor=True)
        else:
            await store.audit.ship(FileSink(Path(path)), once=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
