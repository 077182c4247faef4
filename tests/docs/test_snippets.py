"""Every snippet of the docs runs as it stands, and every Python block of the docs is one of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

DOCS = Path(__file__).parents[2] / "docs"
SNIPPETS = sorted((DOCS / "snippets").glob("*.py"))
PAGES = sorted(path for path in DOCS.rglob("*.md"))
INCLUDE = re.compile(r'--8<-- "snippets/(?P<file>\w+\.py)(?::(?P<section>[\w-]+))?"')

# Runs a file like the cells of a notebook: `await` at top level, in a loop that runs already.
NOTEBOOK = """
import ast, asyncio, pathlib, sys

code = compile(pathlib.Path(sys.argv[1]).read_text(), sys.argv[1], "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
asyncio.run(eval(code, {"__name__": "__main__"}))
"""


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda path: path.stem)
def test_snippet_runs(snippet: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """It ends well on an empty SQLite folder, or on empty servers where it asks for them, without a warning."""
    source = snippet.read_text()
    environment = dict(os.environ)
    if "Needs DATABASE_URL and REDIS_URL." in source:
        new_database: Callable[[], str] = request.getfixturevalue("postgres_database")
        environment |= {"DATABASE_URL": new_database(), "REDIS_URL": request.getfixturevalue("fresh_redis_url")}
    command = ["-c", NOTEBOOK, str(snippet)] if "\n# run: notebook\n" in source else [str(snippet)]

    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_python_comes_from_snippets(page: Path) -> None:
    """A Python block of a page holds includes only, and each names a section that exists."""
    blocks = re.findall(r"^ *```python.*\n((?:.*\n)*?) *```$", page.read_text(), re.MULTILINE)

    for line in (line.strip() for block in blocks for line in block.splitlines() if line.strip()):
        found = INCLUDE.fullmatch(line)
        assert found is not None, f"{page.name} holds Python that no test runs: {line}"
        source = (DOCS / "snippets" / found["file"]).read_text()
        if found["section"] is not None:
            assert f"--8<-- [start:{found['section']}]" in source, line
            assert f"--8<-- [end:{found['section']}]" in source, line


def test_every_section_is_shown() -> None:
    """No section is left over from a page that changed."""
    shown = {(found["file"], found["section"]) for page in PAGES for found in INCLUDE.finditer(page.read_text())}

    for snippet in SNIPPETS:
        for section in re.findall(r"--8<-- \[start:([\w-]+)\]", snippet.read_text()):
            assert (snippet.name, section) in shown
