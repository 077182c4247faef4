"""An export that is killed: whatever stands under a final name is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from pyarrow import dataset, parquet

from agent_gateway_store import SyncGatewayStore
from builders import make_event

pytestmark = [pytest.mark.usefixtures("no_plugins"), pytest.mark.system]

BEFORE, EVENTS = 250, 300
WAYS = {
    "new.jsonl": {},
    "new.parquet": {},
    "new.days": {"partition_by": "day"},
    "old.jsonl": {"overwrite": True},
    "old.days": {"partition_by": "day", "overwrite": True},
}
"""The name of each export and its options; at an `old` name an export of the first events stands already."""

KILLS = """
import itertools, json, os, shutil, signal, sys
from pathlib import Path
from agent_gateway_store import SyncGatewayStore

url, root, ways = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
ON_FILES = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"}

def export(path, options, moment):
    left = itertools.count(moment - 1, -1)

    def step(*_):
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with SyncGatewayStore(url, redis_url="") as store:
        sys.addaudithook(lambda event, args: event in ON_FILES and str(path.parent) in str(args[0]) and step())
        store.audit.export(path, progress=step, **options)

# What is imported here need not be imported by each that is killed.
(root / "whole").mkdir()
with SyncGatewayStore(url, redis_url="") as store:
    for name, options in ways.items():
        store.audit.export(root / "whole" / name, **options)
for name, options in ways.items():
    for moment in itertools.count(1):
        folder = root / f"{name}-{moment}"
        shutil.copytree(root / "before", folder)
        if (pid := os.fork()) == 0:
            export(folder / name, options, moment)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""
"""Exports in every way, each killed before its first operation on a file or report of progress, then before its second,
and so on, until one comes to its end."""


def rows_of(path: Path) -> int:
    if path.suffix == ".days":
        return dataset.dataset(path, partitioning="hive").to_table().num_rows
    if path.suffix == ".parquet":
        return parquet.read_table(path).num_rows
    return len([json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")])


def test_no_partial_file_stands_under_a_final_name(tmp_path: Path) -> None:
    """Killed at every step in every format: what has its final name is whole, and the rest is named `.partial`."""
    url, exports = f"sqlite:///{tmp_path}/gateway.db", tmp_path / "exports"
    with SyncGatewayStore(url, redis_url="") as store:
        store.audit.write_many(make_event(request_id=f"r-{number}") for number in range(BEFORE))
        (exports / "before").mkdir(parents=True)
        store.audit.export(exports / "before" / "old.jsonl")
        store.audit.export(exports / "before" / "old.days", partition_by="day")
        store.audit.write_many(make_event(request_id=f"r-{number}") for number in range(BEFORE, EVENTS))
    program = [sys.executable, "-c", KILLS, url, str(exports), json.dumps(WAYS)]
    subprocess.run(program, check=True, timeout=240)

    for name in WAYS:
        *killed, ended = sorted(exports.glob(f"{name}-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
        found: Counter[str] = Counter()
        for folder in killed:
            found.update(path.suffix for path in folder.iterdir() if path.suffix in (".partial", ".old"))
            if (folder / name).exists():
                rows = rows_of(folder / name)
                found[f"{rows} rows"] += 1
                assert rows == EVENTS or (rows == BEFORE and name.startswith("old"))

        assert len(killed) > 3
        # Killed before it had a name, while it was written, and after it was whole.
        assert found[".partial"] > 1
        assert found[f"{EVENTS} rows"] > 0
        assert (name == "old.days") == (found[".old"] > 0)
        assert rows_of(ended / name) == EVENTS
