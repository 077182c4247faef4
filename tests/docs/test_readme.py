"""The README does what it says, and the docs name what there is: links, pages, settings, errors, hooks, commands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import agent_gateway_store
from agent_gateway_store import errors
from agent_gateway_store.hooks import PROJECT, specs
from agent_gateway_store.settings import StoreSettings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WRITTEN = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")), *PAGES]
COMMANDS = (
    "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/gateway-store demo",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest",
)
pytestmark = pytest.mark.unit
FENCE = re.compile(r"^ *```.*\n(?:.*\n)*? *```$", re.MULTILINE)


def reference(name: str) -> str:
    return (DOCS / "reference" / f"{name}.md").read_text()


def test_ci_runs_the_readme_command() -> None:
    """The workflow runs the script of the checkout, and the README's test command, with no right to write."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())

    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert runs == ["bash .ci/run", COMMANDS[1]]
    assert workflow["permissions"] == {"contents": "read"}
    for command in COMMANDS:
        assert (ROOT / "README.md").read_text().splitlines().count(command) == 1


def links_in(page: Path) -> Iterator[str]:
    """Yield the relative links of a page, code left out."""
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if not re.match(r"[a-z]+:", link):
            yield link


@pytest.mark.parametrize(
    "page", [*WRITTEN, *(ROOT / "examples").rglob("*.md")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_page_names_what_is_there_and_can_be_copied(page: Path) -> None:
    """Links and files exist (`mkdocs build --strict` looks at the anchors); blocks of commands hold no prompt.

    A page includes nothing, so that it reads the same on the repository's site.
    """
    written = page.read_text()
    for link in links_in(page):
        target = link.partition("#")[0]
        # A notebook's page is made when the site is built.
        target = re.sub(r"notebooks/(.+)\.md$", r"notebooks/\1.ipynb", target)
        assert not target or (page.parent / target).is_file(), link
    for path in re.findall(r"`((?:tests|docs|examples|scripts|src)/[\w./-]+)`", written):
        assert (ROOT / path).exists(), path
    assert re.findall(r"^ *(?:\$ |>>> |--8<--|;--8<--).*", written, re.MULTILINE) == []
    assert re.findall(r"^ *```(?:console|shell-session|pycon|mermaid)", written, re.MULTILINE) == []


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without importing what it names."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda _loader, suffix, _node: suffix)


def pages_in(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for item in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from pages_in(item)


def test_nav_covers_every_page() -> None:
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"]

    notebooks = [path.with_suffix(".md") for path in DOCS.rglob("*.ipynb")]
    assert sorted(pages_in(nav)) == sorted(str(page.relative_to(DOCS)) for page in (*PAGES, *notebooks))


def test_settings_are_documented() -> None:
    page = reference("settings")
    assert sorted(re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE)) == sorted(
        map(str.upper, StoreSettings.model_fields)
    )
    for name, field in StoreSettings.model_fields.items():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name.upper()}` |")]
        words = ((None, "none"), (True, "`true`"), (False, "`false`"))
        shown = next((word for value, word in words if field.default is value), f"`{field.default}`")

        assert field.default_factory or row.split(" | ")[1] == shown


def test_fields_are_documented() -> None:
    for name in (
        *("ApiKey", "ApprovalRequest", "ApprovalResult", "ApprovalVote", "AuditEvent", "CallerIdentity", "IssuedKey"),
        *("NotificationDelivery", "ToolCall"),
    ):
        found = re.search(rf"^## {name}\n((?:(?!## ).*\n)*)", reference("models"), re.MULTILINE)
        assert found is not None
        for field in getattr(agent_gateway_store, name).model_fields:
            assert f"`{field}`" in found[1], field


def test_glossary_gives_each_word_one_sentence() -> None:
    sections = [
        re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE)[2:]
        for text in reference("glossary").split("\n## ")[1:]
    ]
    words = [word.strip("`").lower() for entries in sections for word, _ in entries]

    assert len(words) == len(set(words)) > 50
    for entries in sections:
        names = [word.strip("`").lower() for word, _ in entries]
        assert names == sorted(names)
        for word, meaning in entries:
            assert re.fullmatch(r"[^.]*(?:\.\w[^.]*)*\.", meaning), word


def commands_of(group: Any, prefix: str = "") -> Iterator[str]:
    """Yield the visible commands below a group, with the names of their groups before them."""
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if hasattr(command, "commands"):
            yield from commands_of(command, f"{prefix}{name} ")
        elif not command.hidden:
            yield f"{prefix}{name}"


def test_commands_errors_and_hooks_are_documented() -> None:
    """Each has its row or its entry, and the tree of errors is that of the module."""
    import typer

    from agent_gateway_store.cli.app import app

    rows = re.findall(r"^\| `([a-z][a-z -]+)` \|", reference("cli"), re.MULTILINE)
    assert sorted(rows) == sorted(commands_of(typer.main.get_command(app)))
    tree = re.search(r"^```text\n((?:.*\n)*?)```$", reference("errors"), re.MULTILINE)
    assert tree is not None
    assert inspect.cleandoc(tree[1]) in inspect.cleandoc((errors.__doc__ or "").replace("\n    ", "\n"))
    for name in (name for name in vars(errors) if name.endswith("Error") and not name.startswith("_")):
        assert name == "GatewayStoreError" or f"| `{name}`" in reference("errors"), name
    for name, function in inspect.getmembers(specs, inspect.isfunction):
        if hasattr(function, f"{PROJECT}_spec"):
            assert f"::: agent_gateway_store.hooks.specs.{name}\n" in reference("hooks")


def test_first_pages_begin_with_a_clone() -> None:
    for page in ("README.md", "docs/index.md", "docs/tutorial/first-store.md", "docs/how-to/write-a-notifier.md"):
        written = (ROOT / page).read_text()

        assert "not on PyPI yet" in written
        first = next(line for line in re.findall(r"^```sh\n((?:.*\n)*?)```$", written, re.MULTILINE))
        assert first.startswith("git clone https://github.com/agent-gateway-store/agent-gateway-store")
