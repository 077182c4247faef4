"""Runs `gateway-store` for the tests: in this process, where that is enough, or as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from agent_gateway_store.cli.app import app
from builders import event_fields
from forks import forks

_TIMEOUT_S = 120


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as the one JSON document that it must be."""
        return json.loads(self.out)

    @property
    def said(self) -> str:
        """Both outputs."""
        return self.out + self.err

    def assert_fails(self, code: int, *words: str) -> None:
        """It failed with this exit code and one sentence that holds these words; no traceback, nothing on stdout.

        Another line may say before it which database is read.
        """
        assert self.code == code, self.said
        assert "Traceback" not in self.said
        assert self.out == ""
        lines = self.err.strip().splitlines()
        if lines[0].startswith("Reading "):
            del lines[0]
        assert len(lines) == 1, self.err
        assert lines[0].endswith("."), lines[0]
        assert [word for word in words if word not in lines[0]] == []


def gateway_store(*args: str, input: str | bytes | None = None, **environment: str) -> Outcome:  # noqa: A002
    """Run a command in this process."""
    # color=True: Typer does not hide control bytes that a terminal would get.
    settings = {"COLUMNS": "200", "NO_COLOR": "1", **environment}
    result = CliRunner().invoke(app, args, input=input, env=settings, color=True)
    return Outcome(result.exit_code, result.stdout, result.stderr)


def process(*args: str, is_new: bool = False, **options: Any) -> subprocess.Popen[str]:
    """Start `gateway-store` as a process, with the package loaded unless it `is_new`; its outputs are pipes."""
    command = [sys.executable, "-m", "agent_gateway_store.cli"] if is_new else [str(forks().programs / "gateway-store")]
    environment: Mapping[str, str] = {**os.environ, "PYTHONUNBUFFERED": "1", **options.pop("environment", {})}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *args], text=True, env=environment, **(pipes | options))


def run_process(*args: str, input: str | None = None, is_new: bool = False, **environment: str) -> Outcome:  # noqa: A002
    """Run `gateway-store` as a process to its end."""
    with process(*args, is_new=is_new, environment=environment) as started:
        out, err = started.communicate(input, timeout=_TIMEOUT_S)
    return Outcome(started.returncode, out, err)


def event_line(request_id: str, **fields: Any) -> str:
    """Return an audit event as a JSON line."""
    given = {"request_id": request_id, "execution_status": "SUCCESS"} | fields
    return json.dumps(event_fields(**given))


def python_path(*folders: Path) -> str:
    """PYTHONPATH of a process that runs the same package as its test: these folders, then those that were given."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))
