"""An export that is killed: whatever stands under a final name is whole."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from pyarrow import dataset, parquet

from agent_gateway_store import SyncGatewayStore
from builders import make_event

pytestmark = pytest.mark.integration

EVENTS = 4_000
EXPORTS = """
import itertools, sys
from pathlib import Path
from agent_gateway_store import SyncGatewayStore

folder, url = Path(sys.argv[1]), sys.argv[2]
with SyncGatewayStore(url, redis_url="") as store:
    print("ready", flush=True)
    for number in itertools.count():
        store.audit.export(folder / f"{number}.jsonl")
        store.audit.export(folder / f"{number}.parquet")
        store.audit.export(folder / f"{number}.days", partition_by="day")
        store.audit.export(folder / f"{number}.csv")
        store.audit.export(folder / "same.jsonl", overwrite=True)
"""


def rows_of(path: Path) -> int:
    """Read a whole export."""
    if path.suffix == ".days":
        return dataset.dataset(path, partitioning="hive").to_table().num_rows
    if path.suffix == ".parquet":
        return parquet.read_table(path).num_rows
    lines = path.read_bytes().splitlines(keepends=True)
    if path.suffix == ".csv":
        return len(lines) - 1
    return len([json.loads(line) for line in lines if line.endswith(b"\n")])


def kill_exports(tmp_path: Path, url: str, *, kills: int) -> Counter[str]:
    """Kill a process that exports without pause, at random moments; returns what was found under which kind of name."""
    rng = random.Random(4)
    found: Counter[str] = Counter()
    for number in range(kills):
        folder = tmp_path / f"out-{number}"
        folder.mkdir()
        process = subprocess.Popen([sys.executable, "-c", EXPORTS, str(folder), url], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.05 + rng.random())
        process.kill()
        process.wait(10)
        process.stdout.close()
        for path in folder.iterdir():
            if path.suffix in (".partial", ".old"):
                found[path.suffix] += 1
                continue
            assert rows_of(path) == EVENTS, path.name
            found["whole"] += 1
    return found


def test_no_partial_file_stands_under_a_final_name(tmp_path: Path) -> None:
    """Killed at random moments in every format: what has its final name is whole, and the rest is named `.partial`."""
    url = f"sqlite:///{tmp_path}/gateway.db"
    with SyncGatewayStore(url, redis_url="") as store:
        store.audit.write_many(make_event(request_id=f"r-{number}") for number in range(EVENTS))
    found = kill_exports(tmp_path, url, kills=5)

    assert found["whole"] > 0
    assert found[".partial"] > 0


@pytest.mark.slow
def test_no_partial_file_after_two_hundred_kills(tmp_path: Path) -> None:
    """The long form."""
    url = f"sqlite:///{tmp_path}/gateway.db"
    with SyncGatewayStore(url, redis_url="") as store:
        store.audit.write_many(make_event(request_id=f"r-{number}") for number in range(EVENTS))
    found = kill_exports(tmp_path, url, kills=200)

    assert found["whole"] > 100
    assert found[".partial"] > 100
