"""The wheel as a user gets it: built, installed into a fresh environment, run from another folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import closing
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
PACKAGED = ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "src", "migrations")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command in `cwd` with nothing of the checkout in its environment; return what it printed."""
    clean = {"PATH": os.environ["PATH"], "HOME": str(cwd), "LANG": "C.UTF-8", "COLUMNS": "200", **environment}
    # Where packages come from, and through what, is the machine's business.
    clean |= {name: value for name, value in os.environ.items() if name.upper().endswith("_PROXY") or "PIP_" in name}
    ended = subprocess.run(list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def wheel(work: Path) -> Path:
    """The wheel, built from a copy of the sources in which private files lie about."""
    source = work / "source"
    source.mkdir()
    for name in PACKAGED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    for folder in (source, source / "src" / "agent_gateway_store", source / "migrations"):
        (folder / ".env").write_text("DATABASE_URL=postgresql://user:private@host/db")
        (folder / "gateway.db").write_text("private")
    options = ["--no-deps", "--wheel-dir", work / "dist", "--disable-pip-version-check", "--quiet"]
    options += ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    run(sys.executable, "-m", "pip", "wheel", source, *options, cwd=work)
    (built,) = (work / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, work: Path) -> Path:
    """The interpreter of a fresh environment that holds the wheel and, linked from here, what it says it depends on."""
    run(sys.executable, "-m", "venv", "--without-pip", work / "venv", cwd=work)
    python = work / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=work)
    (site,) = (work / "venv" / "lib").glob("python*/site-packages")
    (own,) = metadata.distributions(path=[str(site)], name="agent-gateway-store")
    for found in dependencies_of(own):
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            (site / top).exists() or (site / top).symlink_to(Path(str(found.locate_file(top))))
    run(*pip, "check", cwd=work)
    return python


def dependencies_of(own: metadata.Distribution) -> list[metadata.Distribution]:
    """What is installed here of that which a distribution needs without its extras, and what that needs in turn."""
    found: dict[str, metadata.Distribution] = {}
    open_ = [(own, "")]
    seen = set()
    while open_:
        distribution, extra = open_.pop()
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                for wanted in ("", *requirement.extras):
                    if (requirement.name, wanted) not in seen:
                        seen.add((requirement.name, wanted))
                        found[requirement.name] = metadata.distribution(requirement.name)
                        open_.append((found[requirement.name], wanted))
    return list(found.values())


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    yield folder
    assert not list(folder.glob("**/*.pyc"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Every module, the migration scripts and the marker of typing; no test, no database, no private file."""
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    names = {name for name in contents if ".dist-info/" not in name}
    package, migrations = ROOT / "src/agent_gateway_store", ROOT / "migrations"
    modules = {f"agent_gateway_store/{path.relative_to(package)}" for path in sources("src")}
    scripts = {f"agent_gateway_store/migrations/{path.relative_to(migrations)}" for path in sources("migrations")}
    extra = {"agent_gateway_store/py.typed", "agent_gateway_store/migrations/script.py.mako"}

    assert "agent_gateway_store/migrations/versions/0001_initial.py" in scripts
    assert modules | scripts | extra <= names
    suffixes = set(".py .pyi .typed .mako .yaml .html .js .css .svg".split())  # noqa: SIM905  read as a sentence
    assert {Path(name).suffix for name in names} <= suffixes
    assert all(name.startswith("agent_gateway_store/") for name in names)
    assert not any(Path(name).name.startswith("test_") or "__pycache__" in name or ".env" in name for name in names)
    assert b"user:private@" not in b"".join(contents.values())
    info = {Path(name).name: text.decode() for name, text in contents.items() if ".dist-info/" in name}
    for words in ("Requires-Python: >=3.11", "License-Expression: MIT", "Provides-Extra: all"):
        assert words in info["METADATA"]
    for words in (
        "gateway-store = agent_gateway_store.cli:main",
        "log = agent_gateway_store.plugins.log",
        "[pytest11]\nagent_gateway_store = agent_gateway_store.testing.fixtures",
    ):
        assert words in info["entry_points.txt"]
    assert "LICENSE" in info


def sources(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).glob("**/*.py") if "__pycache__" not in path.parts]


def test_the_installed_command_migrates(python: Path, elsewhere: Path) -> None:
    command = python.with_name("gateway-store")
    environment = {"DATABASE_URL": f"sqlite:///{elsewhere}/own.db"}
    run(command, "db", "upgrade", cwd=elsewhere, **environment)
    run(command, "db", "check", cwd=elsewhere, **environment)
    with closing(sqlite3.connect(elsewhere / "own.db")) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}

    assert {"api_keys", "approval_requests", "approval_votes", "audit_events", "notification_deliveries"} < tables
    assert "0015_pending_of_caller" in run(command, "db", "current", cwd=elsewhere, **environment)
    assert "CREATE TABLE audit_events" in run(command, "db", "sql", cwd=elsewhere, **environment)


def test_the_installed_package_migrates_and_works(python: Path, elsewhere: Path) -> None:
    """`store.migrate()` under a running loop, a key, tables, cards and the plain inbox, by the core dependencies."""
    script = """
import asyncio, agent_gateway_store
from importlib.resources import files
from agent_gateway_store import GatewayStore, Page, SyncGatewayStore, ToolCall, TrustLevel
from agent_gateway_store.notebook import inbox

async def main():
    store = GatewayStore("sqlite:///library.db", auto_migrate=False)
    await store.migrate()
    async with store:
        issued = await store.keys.issue("dev", role="developer", trust_level=TrustLevel.LOW, environment="dev")
        caller = await store.keys.verify(issued.plaintext)
        print(caller.caller_id, agent_gateway_store.__version__, agent_gateway_store.__file__)

asyncio.run(main())
call = ToolCall(server="files", tool="read_file")
with SyncGatewayStore("sqlite:///library.db") as store:
    desk = inbox(store, approver="alice", widgets=False)._repr_html_()
shown = [Page([call])._repr_html_(), call._repr_html_(), desk]
assets = [files("agent_gateway_store.notebook").joinpath(name).is_file() for name in ("inbox.js", "inbox.css")]
print(all("--ags-bg" in html for html in shown), all(assets))
"""
    printed = run(python, "-W", "error", "-c", script, cwd=elsewhere, BCRYPT_ROUNDS="4").split()
    caller, version, file, *rendered = printed

    assert (caller, version, rendered) == ("dev", "0.1.0", ["True", "True"])
    assert Path(file).is_relative_to(python.parents[1] / "lib")
    assert "gateway-demo.db" in run(python.with_name("gateway-store"), "demo", cwd=elsewhere)
    assert (elsewhere / "gateway-demo.db").exists()
