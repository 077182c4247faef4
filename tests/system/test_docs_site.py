"""The docs' site as a reader sees it: the notebooks' pages, run on 50,000 events, in a real browser that is offline."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from browser import browser, picture, show

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
# What the theme itself asks for: the stars of the repository, and, where pages are files, a helper of its search.
THEME = ("https://api.github.com/repos/", "https://unpkg.com/iframe-worker/")
# Of each page: tables with at least one row, charts.
PAGES = {
    "01-first-look": (5, 2),
    "02-incident-review": (4, 4),
    "03-approvals-review": (4, 1),
    "04-weekly-report": (2, 5),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as in CI."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_notebook_pages_show_tables_and_charts(site: Path, dark: bool) -> None:
    """Each has what it promises, in both schemes; no script fails and nothing is asked of the network."""
    with browser(dark=dark, width=1300) as (context, seen):
        for name, (tables, charts) in PAGES.items():
            page = show(context, site / "notebooks" / name / "index.html")
            page.wait_for_timeout(200)

            picture(page, f"docs-{name}-{'dark' if dark else 'light'}")
            assert page.locator(".ags-view:has(tbody tr)").count() >= tables, name
            drawings = page.locator(".nb-output > svg")
            assert drawings.count() == charts, name
            assert all(
                drawing.locator("[role='graphics-symbol'], .mark-rect, .mark-symbol").count()
                for drawing in drawings.all()
            )
            sizes = [drawing.bounding_box() for drawing in drawings.all()]
            assert all(size is not None and size["width"] > 400 and size["height"] > 100 for size in sizes), name
            folded = page.locator("details summary").first
            if folded.count():
                folded.click()
                assert page.locator("details[open] pre").first.is_visible()
            page.close()

    assert [url for url in seen.tried if not url.startswith(THEME)] == []
    hosts = {re.sub(r"^CONNECT (.+):443 .*", r"\1", line) for line in seen.requests}
    assert hosts <= {url.split("/")[2] for url in THEME}
    assert [error for error in seen.errors if not error.startswith("Failed to load resource: net::")] == []
