"""Wheels built from folders, and environments that install them without the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

__all__ = ["ROOT", "build_wheel", "dependencies", "offline", "run"]

ROOT = Path(__file__).parents[1]
OWN = ("agent_gateway_store", "gateway_store_notify", "notify_")
_PACKAGED = ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "src", "migrations")


def run(*command: str | Path, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with nothing of this checkout in its environment. It must end well, unless `check` is False."""
    clean = {"PATH": os.environ["PATH"], "HOME": str(cwd), "LANG": "C.UTF-8", "COLUMNS": "200", "NO_COLOR": "1"}
    ended = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not check or ended.returncode == 0, ended.stdout + ended.stderr
    return ended


def build_wheel(source: Path, folder: Path) -> Path:
    """Build the wheel of a project from a copy of its sources; of this one if `source` is ROOT."""
    copied = folder / f"source-{source.name}"
    if source == ROOT:
        copied.mkdir(parents=True)
        for name in _PACKAGED:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copied / name)
    else:
        shutil.copytree(source, copied)
    out = folder / f"dist-{source.name}"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", copied, *options, cwd=folder)
    (built,) = out.iterdir()
    return built


def dependencies(folder: Path) -> Path:
    """Make a folder for PYTHONPATH that holds what is installed here, less this package and its plugins."""
    folder.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for installed in Path(place).iterdir():
            if installed.suffix != ".pth" and not installed.name.lstrip("_").startswith(OWN):
                (folder / installed.name).symlink_to(installed)
    return folder


def offline(dependencies: Path, wheels: Path) -> dict[str, str]:
    """Return variables with which pip takes wheels from a folder, finds the rest installed, and asks no index."""
    return {
        "PYTHONPATH": str(dependencies),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_QUIET": "1",
    }
