"""The published log and its notes, verified by `aics-tlog` from PyPI, which is not ours and shares no code with us.

It needs Python 3.12, so it is installed into an environment of its own.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agent_gateway_store.evidence.publish import publish
from agent_gateway_store.evidence.tree import TileHashes
from sealed_log import KEY, ORIGIN, SealedLog, events

pytestmark = pytest.mark.system

TOOL = "aics-tlog==0.2.1"
LOG = SealedLog(events(3), leaves=69_997)
TILES = LOG.tiles


def newer_python() -> str:
    """Return a Python of version 3.12 or later: this one, one on PATH, or one of pyenv."""
    pyenv = Path("~/.pyenv/versions").expanduser()
    found = [sys.executable, *filter(None, map(shutil.which, ("python3.13", "python3.12")))]
    for python in (*found, *map(str, sorted(pyenv.glob("3.1[2-9].*/bin/python")))):
        asked = subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 12))"], capture_output=True)
        if asked.returncode == 0:
            return python
    raise AssertionError(f"{TOOL} needs Python 3.12 or later, and this machine has none on PATH and none of pyenv.")


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aics")
    subprocess.run([newer_python(), "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin/pip", "install", "-q", TOOL], check=True, capture_output=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    asyncio.run(publish(folder, LOG.checkpoint(), read))
    return folder


async def read(names: Sequence[tuple[int, int]]) -> TileHashes:
    return TileHashes({name: TILES[name] for name in names})


def verdict(tool: Path, *arguments: str | Path) -> dict[str, Any]:
    command = [tool / "aics-tlog", *arguments, "--log-key", str(KEY.verifier), "--origin", ORIGIN]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    found: dict[str, Any] = json.loads(ended.stdout)
    assert found["ok"] is (ended.returncode == 0), ended.stderr
    return found


def test_it_verifies_the_checkpoint_and_the_tiles(tool: Path, folder: Path) -> None:
    found = verdict(tool, "verify-checkpoint", "--tiles", folder)

    assert found["ok"], found
    assert (found["origin"], found["size"]) == (ORIGIN, 70_000)


@pytest.mark.parametrize("position", [0, 65_535, 69_999])
def test_it_verifies_that_a_leaf_is_in_the_log(tool: Path, folder: Path, position: int) -> None:
    leaf = LOG.leaves[position].hex()
    place = ("--tiles", folder, "--index", str(position))

    assert verdict(tool, "verify-inclusion", *place, "--leaf-hash", leaf)["ok"]
    assert not verdict(tool, "verify-inclusion", *place, "--leaf-hash", LOG.leaves[position - 1].hex())["ok"]


@pytest.mark.parametrize("old", [300, 65_536])
def test_it_verifies_that_the_log_goes_on_from_a_kept_checkpoint(
    tool: Path, folder: Path, tmp_path: Path, old: int
) -> None:
    (tmp_path / "kept").write_text(LOG.checkpoint(old).note)
    (tmp_path / "forked").write_text(SealedLog(leaves=old).checkpoint().note)

    assert verdict(tool, "verify-consistency", "--tiles", folder, "--old-checkpoint", tmp_path / "kept")["ok"]
    assert not verdict(tool, "verify-consistency", "--tiles", folder, "--old-checkpoint", tmp_path / "forked")["ok"]


def test_it_verifies_a_tlog_proof_by_its_parts(tool: Path, tmp_path: Path) -> None:
    """The leaf from the extra data, the path, and the note, each in a file of its own."""
    evidence = SealedLog(events(9)).evidence(4)
    head, _, note = evidence.to_tlog_proof().partition("\n\n")
    _, extra, index, *path = head.split("\n")
    (tmp_path / "note").write_text(note)
    (tmp_path / "path").write_text("\n".join(path))
    (tmp_path / "entry").write_bytes(base64.b64decode(extra.removeprefix("extra ")))

    found = verdict(
        tool,
        *("verify-inclusion", "--leaf", tmp_path / "entry", "--index", index.removeprefix("index ")),
        *("--proof", tmp_path / "path", "--checkpoint", tmp_path / "note"),
    )

    assert found["ok"], found
    assert found["checkpoint_verified"]


def test_it_reads_every_tile(tool: Path, folder: Path, tmp_path: Path) -> None:
    """The walk over the whole tree that its own writer does at start, ours published without entries."""
    program = (
        "import sys, aics_tlog.verified as v, aics_tlog as a; from pathlib import Path;"
        "folder = Path(sys.argv[1]); note = a.parse_note((folder / 'checkpoint').read_bytes());"
        "found = a.verify_checkpoint(note, a.parse_vkey(sys.argv[2])); assert found.ok, found;"
        "report = v.audit_tiles(a.FileSystemTileReader(folder), found.size, found.root, entries=False);"
        "print(report.tiles)"
    )
    command = [tool / "python", "-c", program]
    assert int(subprocess.check_output([*command, folder, str(KEY.verifier)])) == 277

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tile = copy / "tile/0/100"
    tile.write_bytes(bytes(32) + tile.read_bytes()[32:])
    assert subprocess.run([*command, copy, str(KEY.verifier)], capture_output=True).returncode != 0
