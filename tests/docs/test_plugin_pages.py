"""The pages for authors of plugins: generated from the specs, naming every fixture, and runnable from top to bottom."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from agent_gateway_store import testing
from generate_hooks_page import PAGE, generate
from pages import BLOCK, DOCS
from wheels import ROOT, dependencies, offline, run

pytestmark = pytest.mark.system

HOW_TO = DOCS / "how-to" / "write-a-notifier.md"
CLONE = "git clone https://github.com/agent-gateway-store/agent-gateway-store\n"
VENV = "python3 -m venv .venv\n"
VENV_WITH_LINKED_PIP = """python3 -m venv --without-pip .venv
echo 'exec "${0%/*}/python" -m pip "$@"' > .venv/bin/pip
chmod +x .venv/bin/pip
"""
"""Its pip is the one that PYTHONPATH links: to unpack another takes two seconds."""


@pytest.mark.unit
def test_hooks_page_is_generated_from_the_specs() -> None:
    assert PAGE.read_text(encoding="utf-8") == generate()
    assert PAGE.read_text(encoding="utf-8").count("```python") == 4


@pytest.mark.unit
def test_every_fixture_and_name_of_the_kit_is_on_its_page() -> None:
    page = (DOCS / "how-to" / "testing-plugins.md").read_text()
    module = ast.parse((ROOT / "src/agent_gateway_store/testing/fixtures.py").read_text())
    fixtures = {
        node.name
        for node in module.body
        if isinstance(node, ast.FunctionDef)
        and any("fixture" in ast.unparse(each) for each in node.decorator_list)
        and not node.name.startswith("_")
    }

    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == fixtures
    for name in testing.__all__:
        assert f"::: agent_gateway_store.testing.{name}\n" in page


def script_of(page: Path) -> str:
    """Return the page as a script: its files written where they are shown, its commands run as they stand."""
    parts = ["set -euo pipefail"]
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if found["title"]:
            parts.append(f"cat > {found['title']} <<'END_OF_FILE'\n{found['body']}END_OF_FILE")
        elif found["kind"] == "sh":
            parts.append(found["body"])
    return "\n".join(parts)


@pytest.mark.unit
def test_files_of_the_page_are_those_of_the_example() -> None:
    shown = {found["title"]: found["body"] for found in BLOCK.finditer(HOW_TO.read_text()) if found["title"]}

    assert len(shown) == 3
    for name, body in shown.items():
        assert body == (ROOT / "examples" / "gateway-store-notify-file" / name).read_text()


@pytest.mark.integration
def test_a_stranger_who_follows_the_page_has_a_tested_plugin(tmp_path: Path) -> None:
    """Every command of *Write a notifier*, in an empty folder, with this checkout in place of the clone."""
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "agent-gateway-store").symlink_to(ROOT)
    script = script_of(HOW_TO).replace(CLONE, "")
    assert script.count(VENV) == 1

    variables = offline(dependencies(tmp_path / "deps"), tmp_path)
    said = run("bash", "-c", script.replace(VENV, VENV_WITH_LINKED_PIP), cwd=folder, **variables).stdout

    project = folder / "notify-file"
    assert re.search(r"^\d\d passed", said, re.MULTILINE), said
    assert "failed" not in said
    assert re.search(r"notify-file.*active", said), said
    assert said.count("decision CANCELLED 'plugins_check'") == 2
    told = re.findall(r"^decision (\w+) 'delete_file'", said, re.MULTILINE)
    assert sorted(told) == ["APPROVED", "DENIED"]
    [wheel] = (project / "dist").glob("gateway_store_notify_file-0.1.0-*.whl")
    assert script.count("cat > ") == 3

    # As others install it.
    python = project / ".venv/bin/python"
    run(python, "-m", "pip", "install", "--force-reinstall", "--no-deps", wheel, cwd=tmp_path, **variables)
    (project / "src").rename(tmp_path / "gone")

    def listed(**settings: str) -> dict[str, object]:
        """What `plugins list` knows of it, in another folder and without a warning."""
        command = (python.with_name("gateway-store"), "plugins", "list", "--json")
        items = json.loads(run(*command, cwd=tmp_path, PYTHONWARNINGS="error", **variables, **settings).stdout)["items"]
        [plugin] = [item for item in items if item["name"] == "notify-file"]
        return plugin  # type: ignore[no-any-return]

    plugin = listed()
    assert (plugin["distribution"], plugin["version"]) == ("gateway-store-notify-file", "0.1.0")
    assert (plugin["state"], plugin["notifiers"]) == ("active", [])
    assert plugin["settings"] == {"prefix": "NOTIFY_FILE_", "state": "defaults", "problems": []}
    assert listed(NOTIFY_FILE_PATH="x")["notifiers"] == ["notify-file"]
    # Blocked, it is not even imported.
    blocked = listed(AGENT_GATEWAY_STORE_BLOCK_PLUGINS="notify-file")
    assert (blocked["state"], blocked["hooks"]) == ("blocked", [])
