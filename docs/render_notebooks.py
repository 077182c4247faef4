"""Runs the notebooks of the docs on a demo store and makes pages of them; a hook of MkDocs, used by the tests, too.

Charts are drawn as SVG in the kernel, so that a page runs no script of theirs and asks for nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

EVENTS = 50_000
_KINDS = ("image/svg+xml", "text/html", "text/plain")
_PLACE = '<div class="nb-output" data-output="{}"></div>'
_STARTUP = "import altair\naltair.renderers.enable('svg')\n"


def demo_store(folder: Path, events: int = EVENTS) -> str:
    """Fill a store with made-up history and return its URL."""
    url = f"sqlite:///{folder / 'gateway-demo.db'}"
    command = [sys.executable, "-m", "agent_gateway_store.cli", "--database-url", url, "demo", "--events", str(events)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603  our own program
    return url


@contextmanager
def kernel(folder: Path, url: str) -> Iterator[AsyncKernelManager]:
    """Start a kernel in `folder` for notebooks that are run one after the other, on the store at `url`."""
    start = folder / "ipython" / "profile_default" / "startup"
    start.mkdir(parents=True, exist_ok=True)
    (start / "00-svg.py").write_text(_STARTUP)
    manager = AsyncKernelManager(kernel_name="python3")
    environment = {**os.environ, "IPYTHONDIR": str(folder / "ipython"), "DATABASE_URL": url}
    run_sync(manager.start_kernel)(env=environment, cwd=str(folder))
    try:
        yield manager
    finally:
        run_sync(manager.shutdown_kernel)(now=True)


def execute(notebook: Path, kernel: AsyncKernelManager) -> Any:
    """Run a notebook, which finds no name of an earlier one; return it with its outputs. A cell that fails raises."""
    node = nbformat.read(notebook, as_version=4)
    node.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client = NotebookClient(node, km=kernel, timeout=300)
    try:
        client.execute()
    finally:
        if client.kc is not None:
            client.kc.stop_channels()
    del node.cells[0]
    return node


def page_of(node: Any, name: str) -> tuple[str, dict[str, str]]:
    """Return a run notebook as Markdown, and the HTML of its outputs by the names of the places left for them."""
    parts, outputs = [], {}
    for at, cell in enumerate(node.cells):
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\.ipynb\)", ".md)", cell.source))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for number, output in enumerate(cell.outputs):
            place = f"{name}-{at}-{number}"
            outputs[place] = _html(output)
            parts.append(_PLACE.format(place))
    parts.insert(1, f"*[Download this notebook]({name}.ipynb)*")
    return "\n\n".join(parts) + "\n", outputs


def fill(html: str, outputs: dict[str, str]) -> str:
    """Return a page's HTML with its outputs in their places."""
    for place, output in outputs.items():
        html = html.replace(_PLACE.format(place), f'<div class="nb-output">{output}</div>')
    return html


def _html(output: Any) -> str:
    if output.output_type == "stream":
        return f"<pre>{escape(output.text)}</pre>"
    kind = next(kind for kind in _KINDS if kind in output.data)
    content = output.data[kind]
    return f"<pre>{escape(content)}</pre>" if kind == "text/plain" else str(content)


@cache
def _rendered(docs: Path) -> dict[str, tuple[str, dict[str, str]]]:
    with TemporaryDirectory(prefix="ags-notebooks-") as folder:
        url = demo_store(Path(folder))
        found = sorted((docs / "notebooks").glob("*.ipynb"))
        with kernel(Path(folder), url) as started:
            return {path.stem: page_of(execute(path, started), path.stem) for path in found}


def on_files(files: Any, config: Any) -> Any:
    """MkDocs: add a page for each notebook."""
    from mkdocs.structure.files import File

    for name, (markdown, _) in _rendered(Path(config.docs_dir)).items():
        files.append(File.generated(config, f"notebooks/{name}.md", content=markdown))
    return files


def on_page_content(html: str, page: Any, config: Any, **_: Any) -> str:
    """MkDocs: put the outputs in, after the Markdown was rendered."""
    path = Path(page.file.src_uri)
    if path.parent.name != "notebooks":
        return html
    return fill(html, _rendered(Path(config.docs_dir))[path.stem][1])
