"""The pages of the docs and their blocks of code."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["BLOCK", "DOCS", "PAGES", "blocks", "python_of"]

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r'^```(?P<kind>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<body>(?:.*\n)*?)```$', re.MULTILINE)
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}


def blocks(kind: str, source: str) -> list[str]:
    """Return the blocks of one kind, less those with a title, which are files of their own."""
    return [block["body"] for block in BLOCK.finditer(source) if block["kind"] == kind and not block["title"]]


def python_of(page: str) -> str:
    """Return the Python of a page as one file."""
    return "\n\n".join(blocks("python", PAGES[page]))
