"""Headless Chromium for the tests: pages from memory, every request recorded and refused, every script error kept."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import BrowserContext, Page, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# What Chromium itself asks at its start, whatever it is told; no page of the tests names these hosts, and what pages
# ask for is kept in `tried` besides.
_OWN = re.compile(
    r"CONNECT ((accounts|android\.clients|clients2|www)\.google\.com|update\.googleapis\.com"
    r"|(optimizationguide-pa|content-autofill)\.googleapis\.com|edgedl\.me\.gvt1\.com):443 "
    r"|POST http://update\.googleapis\.com/service/update2/"  # once it runs for some minutes
)
OUTPUT = Path(__file__).parents[1] / "test-output"


@dataclass
class Seen:
    """What a browser did beside rendering.

    Attributes:
        requests: Request lines that reached the proxy, through which all that leaves must go.
        tried: URLs that pages asked for, whether or not they got through.
        errors: Uncaught exceptions, error lines of the console, dialogs.
    """

    requests: list[str] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def chromium() -> str:
    """The browser's path.

    Raises:
        LookupError: There is none.
    """
    given = os.environ.get("TEST_CHROMIUM")
    for name in (given,) if given else _NAMES:
        if found := shutil.which(name):
            return found
    raise LookupError("No Chromium: apt-get install chromium, or name one by TEST_CHROMIUM.")


@contextmanager
def browser(*, dark: bool = False, local: bool = False, width: int = 1100) -> Iterator[tuple[BrowserContext, Seen]]:
    """Open a browser that reaches nothing (with `local`: nothing but this machine) and tells what it tried."""
    seen = Seen()
    with _recording_proxy(seen.requests) as proxy, sync_playwright() as playwright:
        bypass = "--proxy-bypass-list=" + ("127.0.0.1;localhost" if local else "<-loopback>")
        program = playwright.chromium.launch(
            executable_path=chromium(), args=[*_QUIET, f"--proxy-server={proxy}", bypass]
        )
        try:
            context = program.new_context(
                color_scheme="dark" if dark else "light", viewport={"width": width, "height": 900}
            )
            context.on("request", lambda request: _note(seen, request.url, local))
            context.on("weberror", lambda error: seen.errors.append(str(error.error)))
            context.on("console", lambda line: seen.errors.append(line.text) if line.type == "error" else None)
            context.on("dialog", lambda dialog: (seen.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
            yield context, seen
        finally:
            program.close()


def show(context: BrowserContext, path: Path) -> Page:
    """Open a file in a new tab and wait until it stands still."""
    page = context.new_page()
    page.goto(path.as_uri(), wait_until="load")
    return page


def picture(page: Page, name: str) -> Path:
    """Keep a screenshot of the whole page in `test-output/`."""
    OUTPUT.mkdir(exist_ok=True)
    path = OUTPUT / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    return path


def _note(seen: Seen, url: str, local: bool) -> None:
    inside = ("file:", "data:", "blob:", "about:", *(("http://127.0.0.1:", "ws://127.0.0.1:") if local else ()))
    if not url.startswith(inside):
        seen.tried.append(url)


@contextmanager
def _recording_proxy(requests: list[str]) -> Iterator[str]:
    """A proxy that writes down the first line of every request and refuses it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.settimeout(2)
                    try:
                        line = client.recv(4096).split(b"\r\n")[0].decode("latin-1")
                        if not _OWN.match(line):
                            requests.append(line)
                        client.sendall(b"HTTP/1.1 403 Refused\r\nContent-Length: 0\r\n\r\n")
                    except OSError:
                        requests.append("a connection without a request")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)
