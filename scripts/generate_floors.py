"""Write the table of floors into the two pages that show it: run this file when its test says so.

The source is the layers contract of import-linter in `pyproject.toml`. Beside each module stands the first sentence of
its docstring.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "explanation" / "architecture.md")

_CONTRACT = "Imports point down"
_HEAD = "| Floor | Module | What is there |\n| --- | --- | --- |\n"
_BEGIN, _END = "<!-- floors: made by scripts/generate_floors.py -->\n\n", "\n<!-- end of the floors -->"
_BLOCK = re.compile(f"(?<={re.escape(_BEGIN)}).*?(?={re.escape(_END)})", re.DOTALL)


def floors() -> list[list[str]]:
    """Return the modules of each floor, without the package's name, the highest floor first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    [contract] = [each for each in settings["contracts"] if each["name"] == _CONTRACT]
    package = f"{settings['root_package']}."
    return [[name.strip().removeprefix(package) for name in layer.split("|")] for layer in contract["layers"]]


def generate() -> str:
    """Return the table, its floors numbered from the ground up."""
    highest = len(floors())
    rows = [(highest - depth, module) for depth, floor in enumerate(floors()) for module in floor]
    return _HEAD + "".join(f"| {floor} | `{module}` | {_first_sentence(module)} |\n" for floor, module in rows)


def table_in(page: str) -> str:
    """Return the table that a page holds between its markers."""
    [table] = _BLOCK.findall(page)
    return str(table)


def _first_sentence(module: str) -> str:
    path = ROOT / "src" / "agent_gateway_store" / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0].replace("\n", " ")


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(_BLOCK.sub(lambda _: generate(), path.read_text(encoding="utf-8")), encoding="utf-8")
