"""The docs' site as a reader sees it: the notebooks' pages, run on 50,000 events, in a real browser that is offline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from browser import browser, picture, show

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
# Of each page: tables with at least one row, charts.
PAGES = {
    "01-first-look": (5, 2),
    "02-incident-review": (4, 4),
    "03-approvals-review": (4, 1),
    "04-weekly-report": (2, 5),
    "05-sealed-log": (5, 0),
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

    assert seen.tried == []
    assert seen.requests == []
    assert [error for error in seen.errors if not error.startswith("Failed to load resource: net::")] == []


def test_wide_tables_stay_in_their_column(site: Path) -> None:
    """On no page does a table, or a block of code, make the page itself wider than a small screen."""
    with browser(width=1000) as (context, seen):
        for path in sorted(site.rglob("index.html")):
            page = show(context, path)
            inside = page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            hidden = page.locator(".md-typeset__table table").evaluate_all(
                "tables => tables.filter(t => t.getBoundingClientRect().right > "
                "t.closest('.md-content').getBoundingClientRect().right + 1 && "
                "getComputedStyle(t.closest('.md-typeset__table')).overflowX != 'auto').length"
            )
            assert (inside, hidden) == (True, 0), path
            page.close()

    assert seen.tried == []
