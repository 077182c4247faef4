"""Take the pictures of the console that the README and the docs show, light and dark, from the demo store.

Run this file after the pages change: `python scripts/picture_console.py`. It needs Chromium and the extra `test`.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT / "tests"))

from agent_gateway_store import GatewayStore, StoreSettings  # noqa: E402
from agent_gateway_store.console import create_console  # noqa: E402
from agent_gateway_store.console.command import prepare_demo  # noqa: E402
from browser import browser  # noqa: E402

# Pixels: as wide as a page of the docs shows it at twice the density.
_WIDTH, _HEIGHT = 1100, 760


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, str]]:
    """Serve the console of a filled demo store; yields its address and a key to sign in with."""
    import uvicorn

    settings = StoreSettings(database_url=f"sqlite:///{folder}/gateway.db", audit_spool_path=folder / "spool.db")

    async def prepare() -> str:
        async with GatewayStore(settings=settings, redis_url="") as store:
            return await prepare_demo(store)

    key = asyncio.run(prepare())
    app = create_console(GatewayStore(settings=settings, redis_url=""))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.05)
            assert thread.is_alive(), "the server did not start"
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", key
    finally:
        server.should_exit = True
        thread.join()


def main() -> None:
    """Write the pictures."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as (url, key):
        for theme in ("light", "dark"):
            with browser(dark=theme == "dark", local=True, width=_WIDTH) as (context, _):
                page = context.new_page()
                page.goto(f"{url}/login")
                page.fill("#key", key)
                page.click("text=Sign in >> nth=-1")
                page.get_by_role("link", name="payments.refund_payment").click()
                page.wait_for_selector("[data-until]:has-text('left')")
                page.screenshot(
                    path=IMAGES / f"console-{theme}.png", clip={"x": 0, "y": 0, "width": _WIDTH, "height": 760}
                )


if __name__ == "__main__":
    main()
