"""The commands of the runbook run as they stand there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from commands import event_line
from forks import forks
from pages import PAGES, blocks

pytestmark = [pytest.mark.integration, pytest.mark.system]


def test_every_command_of_the_runbook_runs(tmp_path: Path) -> None:
    (tmp_path / "lost.jsonl").write_text(event_line("lost-1"))
    commands = [line for block in blocks("sh", PAGES["how-to/runbook.md"]) for line in block.splitlines()]
    environment = {**os.environ, "PATH": f"{forks().programs}:{os.environ['PATH']}", "USER": "operator"}
    environment |= {"DATABASE_URL": f"sqlite:///{tmp_path}/gateway.db", "AUDIT_SPOOL_PATH": f"{tmp_path}/spool.db"}
    failed = []
    for command in ("gateway-store db upgrade", *dict.fromkeys(commands)):
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            failed.append((command, done.returncode, done.stdout + done.stderr))

    assert len(set(commands)) > 8
    assert failed == []
