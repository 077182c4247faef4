"""What stands around the package: forms for issues, workflows, hosted docs, hooks of pre-commit, the source archive."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from wheels import ROOT

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def load(path: str) -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load((ROOT / path).read_text())
    return content


@pytest.mark.unit
def test_issue_forms_are_valid() -> None:
    """One for a bug and one for a feature, as GitHub shows them; no blank issue; vulnerabilities go to SECURITY.md."""
    config = load(".github/ISSUE_TEMPLATE/config.yml")
    assert [form.stem for form in FORMS] == ["bug", "feature"]
    assert config["blank_issues_enabled"] is False
    assert config["contact_links"][0]["url"] in (ROOT / "SECURITY.md").read_text()
    for form in FORMS:
        content = load(str(form.relative_to(ROOT)))
        fields = [item for item in content["body"] if item["type"] != "markdown"]

        assert all(isinstance(content[name], str) and content[name] for name in ("name", "description"))
        assert set(content) <= {"name", "description", "title", "labels", "assignees", "body"}
        assert len({field["id"] for field in fields}) == len(fields) > 0
        for field in fields:
            assert field["type"] in {"input", "textarea", "dropdown", "checkboxes"}
            assert re.fullmatch(r"[\w-]+", field["id"])
            assert field["attributes"]["label"]
            assert set(field) <= {"type", "id", "attributes", "validations"}
            options = field["attributes"].get("options", ["one"])
            assert len(set(options)) == len(options) > 0


@pytest.mark.unit
def test_release_checks_before_it_publishes() -> None:
    """A tag runs all of CI, then builds, then publishes; the last job alone may ask PyPI to trust it."""
    release, ci = load(".github/workflows/release.yml"), load(".github/workflows/ci.yml")
    jobs = release["jobs"]

    assert "workflow_call" in ci[True]  # YAML reads the key `on` as true
    assert release[True] == {"push": {"tags": ["v*"]}}
    assert release["permissions"] == {"contents": "read"}
    assert jobs["check"] == {"uses": "./.github/workflows/ci.yml"}
    assert (jobs["build"]["needs"], jobs["publish"]["needs"]) == ("check", "build")
    assert [name for name, job in jobs.items() if "permissions" in job] == ["publish"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["environment"]["name"] == "pypi"
    assert jobs["publish"]["steps"][-1]["with"] == {"attestations": True}
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()


@pytest.mark.unit
def test_actions_are_pinned() -> None:
    """Each action is named by its commit, so that a moved tag runs nothing new."""
    for workflow in ("ci", "release"):
        for job in load(f".github/workflows/{workflow}.yml")["jobs"].values():
            for step in job.get("steps", []):
                assert "uses" not in step or re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"]), step


@pytest.mark.unit
def test_hosted_docs_and_hooks_of_pre_commit_are_those_of_ci() -> None:
    """Read the Docs builds the same site, and fails on a warning; the local hooks are the linters of CI."""
    config = load(".readthedocs.yaml")
    [local] = [repo for repo in load(".pre-commit-config.yaml")["repos"] if repo["repo"] == "local"]

    assert config["version"] == 2
    assert config["python"]["install"] == [{"method": "pip", "path": ".", "extra_requirements": ["dev"]}]
    assert config["mkdocs"] == {"configuration": "mkdocs.yml", "fail_on_warning": True}
    assert {hook["entry"].split()[0] for hook in local["hooks"]} == {"ruff", "mypy", "lint-imports"}
    assert all(hook["language"] == "system" for hook in local["hooks"])


@pytest.mark.system
@pytest.mark.integration
def test_archive_holds_what_the_tests_read(tmp_path: Path) -> None:
    """The source distribution has every file of the root that a test names, and nothing of this machine."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}

    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    named = {name for name in re.findall(r'ROOT / "([^"]+)"', sources) if (ROOT / name).is_file()}
    assert {".ci/run", ".github/workflows/release.yml", "scripts/generate_floors.py", "benchmarks/report.py"} <= held
    assert named <= held
    assert not [name for name in held if re.search(r"\.venv|__pycache__|\.git/|gateway\.db", name)]


LEAKS = """
import socket, pytest

class Leak:
    def __init__(self):
        self.socket, self.circle = socket.socket(), self

@pytest.fixture(scope="session")
def of_session():
    return Leak()

@pytest.fixture
def of_test():
    return Leak()

def test_passes(of_session, of_test):
    assert of_session and of_test
"""


@pytest.mark.system
def test_what_the_last_test_leaks_fails_the_run(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_leak.py").write_text(LEAKS)
    command = [sys.executable, "-m", "pytest", "-q", "-n1", "-pno:cacheprovider"]
    ended = subprocess.run(
        [*command, "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, tmp_path / "test_leak.py"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert len(set(re.findall(r"Exception ignored in: <socket.socket fd=\d+", ended.stdout))) == 2, ended.stdout
