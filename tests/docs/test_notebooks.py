"""The notebooks of the docs run from top to bottom on a demo store, and show tables and charts."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jupyter import write_notebook
from pages import DOCS, PAGES, blocks

pytestmark = [pytest.mark.integration, pytest.mark.system]

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
EVENTS = 5_000
# Of each notebook: tables of ours with rows, charts, frames of pandas.
SHOWN = {
    "01-first-look": (5, 2, 1),
    "02-incident-review": (4, 4, 1),
    "03-approvals-review": (4, 1, 2),
    "04-weekly-report": (2, 5, 1),
    "05-sealed-log": (5, 0, 0),
}
# The same of each page whose blocks are cells; the live inbox brings its table for where widgets are off.
CELLS = {"inbox": (2, 0, 0), "jupyter": (2, 0, 1), "plots": (0, 8, 0)}


def rendering() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_notebooks", DOCS / "render_notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModuleType, Path, Any]]:
    """The hook, a folder with a demo store, and a kernel in it."""
    module, folder = rendering(), tmp_path_factory.mktemp("notebooks")
    with module.kernel(folder, module.demo_store(folder, EVENTS)) as kernel:
        yield module, folder, kernel


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, demo: tuple[ModuleType, Path, Any]) -> None:
    """Without an error or a warning; its tables have rows, its charts are drawings without a script."""
    module, _, kernel = demo

    node = module.execute(notebook, kernel)

    markdown, outputs = module.page_of(node, notebook.stem)
    html = module.fill(markdown, outputs)
    kinds: list[Any] = [output for cell in node.cells for output in cell.get("outputs", [])]
    assert [output for output in kinds if output.output_type in ("stream", "error")] == []
    tables, charts, frames = SHOWN[notebook.stem]
    assert len(re.findall(r"<tbody><tr>", html)) >= tables
    assert len(re.findall(r"<svg ", html)) == charts
    assert len(re.findall(r'<table border="1" class="dataframe">', html)) >= frames
    assert "<script" not in html
    assert "in this result." not in html


@pytest.mark.parametrize("page", CELLS)
def test_the_blocks_of_a_page_are_the_cells_of_a_notebook(page: str, demo: tuple[ModuleType, Path, Any]) -> None:
    """Without an error or a warning, on the history that the page has made; each block shows what the page says."""
    module, folder, kernel = demo
    notebook = folder / f"{page}.ipynb"
    write_notebook(notebook, *(cell.rstrip() for cell in blocks("python", PAGES[f"how-to/{page}.md"])))

    node = module.execute(notebook, kernel)

    outputs = [output for cell in node.cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type in ("stream", "error")] == []
    tables, charts, frames = CELLS[page]
    html = "".join(output.data.get("text/html", "") for output in outputs)
    assert len(re.findall(r"<tbody><tr>", html)) == tables
    assert len([output for output in outputs if "image/svg+xml" in output.data]) == charts
    assert len([output for output in outputs if "dtype: int64" in output.data["text/plain"]]) == frames
    assert page != "plots" or (folder / "week.svg").read_text().startswith("<svg")


@pytest.mark.unit
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(notebook: Path) -> None:
    content = json.loads(notebook.read_text())

    assert notebook.stem in SHOWN
    for at, cell in enumerate(content["cells"]):
        assert cell["id"] == f"cell-{at:02}"
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    assert content["cells"][0]["source"][0].startswith("# ")
