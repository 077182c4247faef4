"""A store that works for a long time holds no more than after a minute, also where reads are cancelled all the time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

ROOT = Path(__file__).parent.parent.parent
# Measured: Python's own memory still grows by so much while its pools fill.
MOST_GROWTH_MB = 8.0


@pytest.mark.parametrize("seconds", [6, pytest.param(1_200, marks=pytest.mark.slow)])
def test_a_store_at_work_holds_no_more_and_more(seconds: int) -> None:
    """Five cancelled reads a second, beside calls with approvals: memory, descriptors, tasks and threads stay."""
    command = [sys.executable, "-W", "error", "-m", "tests.proofs.soak", str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    growth = json.loads(done.stdout)["growth"]

    assert growth["memory_mb"] < MOST_GROWTH_MB
    assert growth["descriptors"] <= 0
    assert growth["tasks"] <= 0
    assert growth["threads"] <= 0
