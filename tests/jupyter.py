"""A real JupyterLab for the tests: a server process of its own, with its files in a folder of the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page as Tab

__all__ = ["jupyter_environment", "lab", "run_all", "write_notebook"]

_START_S = 60


def jupyter_environment(folder: Path) -> dict[str, str]:
    """The environment in which Jupyter and IPython keep to `folder`."""
    places = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    return {**os.environ, **places, "JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "JUPYTER_PLATFORM_DIRS": "1"}


def write_notebook(path: Path, *cells: str) -> None:
    """Write a notebook of code cells."""
    code = [
        {"cell_type": "code", "id": f"c{at}", "metadata": {}, "source": cell, "outputs": [], "execution_count": None}
        for at, cell in enumerate(cells)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": code, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


def run_all(tab: Tab, address: str, name: str) -> None:
    """Open a notebook in a browser and run its cells, once its kernel has started."""
    tab.goto(address.format(name), wait_until="domcontentloaded")
    tab.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
    cells = tab.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-editor")
    cells.first.wait_for(timeout=60_000)
    for at in range(cells.count()):
        cells.nth(at).click()
        tab.keyboard.press("Control+Enter")


@contextmanager
def lab(folder: Path) -> Iterator[str]:
    """Run JupyterLab on the files of `folder` and give its address, token included, without the path."""
    environment = jupyter_environment(folder / ".jupyter")
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0"),
        *("--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None"),
        *("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly"),
    ]
    log = folder / "jupyter.log"
    with (
        log.open("wb") as out,
        subprocess.Popen(command, env=environment, cwd=folder, stdout=out, stderr=out) as server,
    ):
        try:
            yield _address(folder / ".jupyter" / "runtime", server, log)
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _address(runtime: Path, server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        for path in runtime.glob("jpserver-*.json"):
            try:
                found = json.loads(path.read_text())
            except ValueError:
                continue  # being written
            return f"{found['url']}lab/tree/{{}}?reset&token={found['token']}"
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()[-4000:]}")
