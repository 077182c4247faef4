"""What the pages for contributors say is true: floors, map, traced calls, checks, generated files, glossary."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import generate_floors
from wheels import ROOT

pytestmark = pytest.mark.unit

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CI = ROOT / ".ci" / "run"
PARTS = re.findall(r"^ {4}(\w+)\) ", CI.read_text(), re.MULTILINE)
PACKAGE = ROOT / "src" / "agent_gateway_store"

# Stands for every program: it writes down how it was called, and fails where FAILING names its call.
STUB = """#!/bin/sh
call="$(basename "$0") $*"
echo "$call" >> "$CALLS"
[ "$call" != "${FAILING:-}" ]
"""
README_TEST = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"


def section(title: str) -> str:
    """Return the text of a section of CONTRIBUTING.md."""
    found = re.search(rf"^## {title}\n((?:(?!## ).*\n)*)", CONTRIBUTING, re.MULTILINE)
    assert found is not None
    return found[1]


def rows(text: str) -> list[str]:
    """Return the first cells of the tables in a text, those in backticks."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


@pytest.mark.parametrize("page", generate_floors.PAGES, ids=lambda path: path.name)
def test_page_shows_the_floors_of_the_import_contract(page: Path) -> None:
    assert generate_floors.table_in(page.read_text(encoding="utf-8")) == generate_floors.generate()


def test_every_module_stands_on_a_floor() -> None:
    """The import contract names each module and folder of the package once, so that none is free of it."""
    floors = [module for floor in generate_floors.floors() for module in floor]

    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert sorted({module.partition(".")[0] for module in floors}) == sorted(there - {"__init__"})
    assert len(set(floors)) == len(floors)


def names_in(source: str) -> set[str]:
    """Return the names that a module defines: classes, functions, constants and fields."""
    nodes = list(ast.walk(ast.parse(source)))
    defined = {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)}
    return defined | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def test_pages_name_what_is_there() -> None:
    """The map of CONTRIBUTING.md, the traced calls, the glossary and the list of generators."""
    where = re.findall(r"^\| (.+) \| `(\w[\w/]*\.py)` \|$", section("Where things are"), re.MULTILINE)
    traced = re.findall(r"`(\w[\w/]*\.py)`", (ROOT / "docs/explanation/architecture.md").read_text())
    words = set(rows((ROOT / "docs/reference/glossary.md").read_text()))
    scripts = re.findall(r"`python (scripts/\w+\.py)`", section("Generated files"))

    assert min(len(where) - 5, len(traced), len(words)) > 15
    for what, module in where:
        named = re.findall(r"`(\w+)`", what.partition(": ")[2])
        assert set(named) <= names_in((PACKAGE / module).read_text()), module
    assert {module for module in traced if not (PACKAGE / module).is_file()} == set()
    assert words <= set[str]().union(*(names_in(path.read_text()) for path in PACKAGE.rglob("*.py")))
    assert sorted(scripts) == sorted(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py"))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the CI script and a README, in which all programs are stubs that write down their calls."""
    for name in ("bin", ".venv/bin", ".ci"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(CI, tmp_path / ".ci")
    (tmp_path / "README.md").write_text(f"The tests:\n\n{README_TEST}\n")
    for name in ("python3", "apt-get", "sudo", "pgbouncer", "chromium"):
        _stub(tmp_path / "bin" / name)
    for name in ("pip", "python", "ruff", "mypy", "lint-imports", "mkdocs", "pytest"):
        _stub(tmp_path / ".venv" / "bin" / name)
    return tmp_path


def _stub(path: Path) -> None:
    path.write_text(STUB)
    path.chmod(0o755)


def run_ci(checkout: Path, *parts: str, failing: str = "") -> tuple[int, list[str]]:
    """Run the CI script in a checkout of stubs; return its exit code and the calls it made."""
    calls = checkout / "calls"
    environment = {"PATH": f"{checkout / 'bin'}:/usr/bin:/bin", "CALLS": str(calls), "FAILING": failing}
    done = subprocess.run(
        ["bash", str(checkout / ".ci" / "run"), *parts],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


def test_parts_of_the_checks_are_those_of_the_table() -> None:
    """CONTRIBUTING.md lists every part of the CI script and no other, and names those that it runs by itself."""
    by_itself = re.search(r"set -- (.*)$", CI.read_text(), re.MULTILINE)

    assert sorted(rows(section("Check"))) == sorted(PARTS)
    assert by_itself is not None
    assert f"`{by_itself[1]}`" in section("Check")


@pytest.mark.parametrize("part", PARTS)
def test_part_runs_alone(checkout: Path, part: str) -> None:
    code, calls = run_ci(checkout, part)

    assert (code, bool(calls)) == (0, True)


def test_ci_ends_with_the_command_of_the_readme(checkout: Path) -> None:
    code, calls = run_ci(checkout)

    assert code == 0
    assert calls[:2] == ["python3 -m venv .venv", "pip install -e .[dev]"]
    assert calls[-3:] == ["python3 -m venv .venv", "pip install -e .[test]", "pytest "]
    assert {
        "ruff check .",
        "ruff format --check .",
        "mypy ",
        "lint-imports ",
        "pytest -q -m system and not slow",
    } < set(calls)


def test_ci_ends_at_the_first_failure(checkout: Path) -> None:
    """Nothing is run after it; an unknown part and a README that has lost its test command are failures."""
    for failing in ("ruff check .", "lint-imports ", "pytest -q -m system and not slow", "pytest "):
        (checkout / "calls").unlink(missing_ok=True)
        code, calls = run_ci(checkout, failing=failing)
        assert (code != 0, calls[-1]) == (True, failing)
    (checkout / "calls").unlink()
    assert run_ci(checkout, "tests") == (2, [])
    (checkout / "README.md").write_text("No command.\n")
    code, calls = run_ci(checkout, "test")
    assert (code != 0, calls) == (True, [])
