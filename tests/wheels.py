"""Environments that install wheels without the network."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

__all__ = ["ROOT", "dependencies", "offline", "run"]

ROOT = Path(__file__).parents[1]
OWN = ("agent_gateway_store", "gateway_store_notify", "notify_")


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
