"""ASGI applications on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn


@asynccontextmanager
async def serving(app: Any, *, ws: Any) -> AsyncIterator[str]:
    """Serve an ASGI application on a free port of the loopback; yields `127.0.0.1:<port>`."""
    web = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws=ws))
    task = asyncio.create_task(web.serve())
    try:
        async with asyncio.timeout(20):
            while not web.started:
                await asyncio.sleep(0.01)
        yield f"127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
    finally:
        web.should_exit = True
        await task
